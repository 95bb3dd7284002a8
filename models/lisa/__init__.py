"""LiSA, learnable sharing attention (arXiv 2408.01890): a trained LLM whose layers reuse their predecessor's scores.

`similarity` and `probe` say which layers can share, `convert` turns a model into one that does (`model`, built
from `layers`, `alignment` and `kernels`), `distill` and `losses` train what conversion added, `delta` keeps it in a
file of its own, `accounting` counts what is saved. The other "LISA" (layerwise importance sampled AdamW) is an
optimiser and has nothing to do with it; hence the config key `lisa_attention`.
"""
