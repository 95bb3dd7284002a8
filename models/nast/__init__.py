"""CTC-NAST (arXiv 2305.17358): non-autoregressive speech translation by two stacked encoders and CTC.

From files to features: `audio` reads any file, `layouts` and `manifest` make typed rows of any data set, `vocabulary`
learns and applies SentencePiece, `features` and `frontend` make what the models see, `synthetic` generates recordings.

The models: `config`, `model` (CTC-NAST), `autoregressive` (its sibling with a decoder), built from `subsampler`, `layers`,
`attention`, `prediction` and `encoder`; trained by `losses` with `alignment` and `curriculum`.

From logits to texts and figures: `decoding`, `ngram`, `translator` (a model folder behind one call), `segmentation` of long
recordings, `metrics`, `reordering`, `plots`.
"""
