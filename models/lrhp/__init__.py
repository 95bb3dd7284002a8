"""LRHP, representations of whole preference pairs (arXiv 2410.04503).

A prompt with two answers and a special token behind them (`prompts`) goes through a causal language model without its
head; the hidden state at that token is the pair's representation (`model`, `representer`), trained by telling which
answer is the better one (`losses`). On representations rest selection of preference data and prediction of
preference margins (`margins`); they are kept in a folder of Parquet files (`store`).
"""
