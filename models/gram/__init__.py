"""GRAM, a generative foundation reward model (arXiv 2506.14175): prompts, losses, judge, ranking, alignment.

A pair of answers is rendered into one judge prompt (`prompts`); the reward is the probability that a causal
language model puts on the label token of one answer (`scoring`, `judge`), trained with a label-smoothed
ranking loss (`losses`) and used to rank answers (`ranking`) or to align a policy (`alignment`).
"""
