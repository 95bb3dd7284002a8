"""CTC-NAST (arXiv 2305.17358): non-autoregressive speech translation by two stacked encoders and CTC.

Data side (pure functions, no torch model):
- `audio`: `Clip` (file, offset, duration, pause after it), `probe(path)`, `read_clips(clips) -> float32 [N]` at 16 kHz.
- `manifest`: `Utterance` (id, clips, source, target, speaker) and the readers of all layouts.
- `vocabulary`: `Vocabulary` with `encode(text) -> list[int]`, `decode(ids) -> str`, `train`, `save`, `load`;
  ids `<s>` = blank = 0, `<pad>` = 1, `</s>` = 2, `<unk>` = 3.
- `synthetic`: generated speech-like audio of number words with re-ordered targets.

Model side:
- `features`: `fbank(waveform_N) -> [T, 80]` (waveform in [-1, 1], 16 kHz), `frame_count(samples)`, `normalise(features_TF)`,
  `speed(waveform_N, factor)`, `spec_augment(features_TF, generator=...)`.
- `subsampler`: `subsampled_length(frames)`, on ints and tensors.
- `model`: `NastConfig`, `NastModel` with `save_pretrained`/`from_pretrained`;
  `model(features_BTF, lengths_B, ...)` gives `source_logits`, `target_logits` [B, S, V], `lengths` [B] and the inner ones.
- `losses`: `nast_loss(model, features_BTF, lengths_B, source_BU, source_lengths_B, target_BU, target_lengths_B, ...)` gives
  the summed loss and a dict of detached sums (all over the same weight: target pieces with `</s>`).
- `autoregressive`: the sibling, with the same `save_pretrained` and a loss of the same signature, and its beam search.
- `decoding`: `greedy(logits_BSV, lengths_B) -> list[list[int]]`, prefix beam.
- `metrics`: BLEU, chrF, WER, exact match, length ratio, bootstrap intervals on lists of hypotheses and references.
"""
