"""Choosing preference data that match a target: cosine similarity (LRHP) and optimal transport (RoVRM).

Both papers pick from a large pool the pairs closest to a small target set, in whatever feature space. `cosine` scores
by similarity, `transport` by the optimal-transport plan between pool and target (`sinkhorn`, or `exact` through POT),
`choice` turns scores into a selection, `chain` selects backwards through the phases of RoVRM, `features` makes vectors
of texts, hidden states and gradients. Everything is keyed by id and works in row blocks of bounded memory.
"""
