"""RoVRM, a visual reward model trained in three phases (arXiv 2408.12109): records, model, loss, scorer.

A prompt, a picture and an answer go through a LLaVA-style model (`model`, `families`, `encoding`); a bias-free head
reads the reward at the last token. Ranked answers are learnt with the Plackett-Luce loss (`losses`), and each phase
hands its whole weights, with their history, to the next (`checkpoint`).
"""
