"""Train the textual encoder alone to translate sentences: what CTC can re-order without speech in between.

    python -m eagleray.jobs.nast.text --config configs/nast/text_tiny.yaml train.max_steps=200

Data are parallel text files, line n of one translating line n of the other, plain or gzip. The model is
`models/nast/text.py`; losses, curriculum mixing and the loop are those of `nast.train`. With `data.test` the finished
model translates these sentences greedily: `test.jsonl` in the run folder has the translations, `test.json` BLEU with its
signature and interval, by length and by how much a sentence is re-ordered.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from eagleray.jobs.nast.data import VocabularySection
from eagleray.jobs.nast.model import CurriculumSection
from eagleray.models.nast.decoding import greedy
from eagleray.models.nast.losses import LossWeights
from eagleray.models.nast.metrics import (
    LENGTH_EDGES,
    REORDERING_EDGES,
    bleu,
    bleu_estimate,
    by_bucket,
    exact_match,
)
from eagleray.models.nast.prediction import AdapterKind
from eagleray.models.nast.reordering import reordering
from eagleray.models.nast.text import TextConfig, TextModel, text_loss
from eagleray.models.nast.vocabulary import (
    PAD_ID,
    Vocabulary,
    ctc_length,
    load_vocabularies,
    save_vocabularies,
)
from eagleray.platform.config import Config as Section
from eagleray.platform.cpu import set_up_torch
from eagleray.platform.data.examples import write_examples
from eagleray.platform.data.files import DataError, decode_utf8, open_data, sha256_of_file
from eagleray.platform.launch import TrainedRun, train
from eagleray.platform.runs import RunFolder
from eagleray.platform.sections import OptimSection, TrainingConfig, TrainSection
from eagleray.platform.task import Batch, Task

JOB = "nast.text"
logger = logging.getLogger(__name__)
_TEST_BATCH = 64


class ParallelText(Section):
    """Two files whose lines correspond."""

    source: str = Field(min_length=1)
    """File of the source sentences; relative to `data.root`."""
    target: str = Field(min_length=1)
    """File of their translations."""

    def pairs(self, root: str) -> list[tuple[str, str]]:
        """Sentence pairs; those with an empty side are left out.

        Raises:
            DataError: A file is missing, damaged or not UTF-8, the numbers of lines differ, or nothing is left.
        """
        sides = [_lines(Path(root, name)) for name in (self.source, self.target)]
        if len(sides[0]) != len(sides[1]):
            detail = f"{self.source} has {len(sides[0])}, {self.target} has {len(sides[1])}"
            raise DataError(str(Path(root, self.target)), "the numbers of lines differ", detail)
        found = [(source, target) for source, target in zip(*sides, strict=True) if source and target]
        if not found:
            raise DataError(str(Path(root, self.source)), "no line has text on both sides")
        if len(found) < len(sides[0]):
            logger.warning("%s: %d pairs have an empty side.", self.source, len(sides[0]) - len(found))
        return found


class TextData(Section):
    """Sentences to learn from, to choose the model by, and to report."""

    root: str = "."
    """Folder that all paths are relative to."""
    train: ParallelText
    """Training pairs."""
    eval: ParallelText
    """Pairs to choose the model by."""
    test: ParallelText | None = None
    """Pairs that the finished model translates once."""

    @field_validator("root")
    @classmethod
    def _root_is_absolute(cls, root: str) -> str:
        # Ray's workers run in folders of their own.
        return str(Path(root).expanduser().absolute())


class TextModelSection(Section):
    """Sizes and switches of the textual encoder; what is not given is the paper's."""

    width: int | None = Field(default=None, ge=4)
    """Hidden size (512)."""
    heads: int | None = Field(default=None, ge=1)
    """Attention heads (8)."""
    inner_width: int | None = Field(default=None, ge=1)
    """Width inside feed-forward networks (2048)."""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Dropout everywhere (0.15)."""
    upsampling: int | None = Field(default=None, ge=1)
    """Positions for each source piece (3)."""
    textual_layers: int | None = Field(default=None, ge=1)
    """Layers (12)."""
    inner_target_layers: list[int] | None = None
    """Layers with a CTC of their own ([6, 9])."""
    target_prediction: AdapterKind | None = None
    """What these are told of their prediction (`inter_league`)."""
    cross_layer_source: int | None = Field(default=None, ge=0)
    """Layer that all higher ones attend to (3); 0: no cross-layer attention."""
    drop_net: float | None = Field(default=None, ge=0, le=1)
    """Chance of leaving out self-attention in layers with cross-layer attention (0.1)."""

    @model_validator(mode="after")
    def _fits_together(self) -> TextModelSection:
        self.config(vocab_size=8)
        return self

    def config(self, *, vocab_size: int) -> TextConfig:
        """The model's own config.

        Raises:
            ValueError: The sizes do not fit together.
        """
        given = {name: value for name, value in self.model_dump().items() if value is not None}
        if given.get("cross_layer_source") == 0:
            given["cross_layer_source"] = None
        try:
            return TextConfig(vocab_size=vocab_size, **given)
        except ValueError as error:
            raise ValueError(f"`model`: {error}") from None


class TextLossSection(Section):
    """Weights of the two terms."""

    inner_target: float = Field(default=1.0, ge=0)
    """Mean CTC of the inner layers, beside that of the top with weight 1."""
    curriculum: CurriculumSection = CurriculumSection()


class Config(TrainingConfig):
    """Config of `nast.text`."""

    job: Literal["nast.text"] = JOB
    data: TextData
    vocabulary: VocabularySection = VocabularySection()
    model: TextModelSection = TextModelSection()
    loss: TextLossSection = TextLossSection()
    optim: OptimSection = OptimSection(
        lr=1e-3, betas=(0.9, 0.98), schedule="inverse_sqrt", warmup_ratio=1 / 30, clip_norm=10.0
    )
    train: TrainSection = TrainSection(
        batch_size=256, micro_batch_size=256, micro_batch_length=8192, max_steps=100_000, average_best=10
    )

    @model_validator(mode="after")
    def _fits_the_job(self) -> Config:
        if not self.vocabulary.joint:
            raise ValueError("`vocabulary.joint` must be true: the embedding is the target head's weight")
        if self.lora is not None:
            raise ValueError("`lora` is for language models; leave it out")
        return self


class TextTask(Task):
    """Sentence pairs as pieces; evaluated by greedy decoding."""

    metric: ClassVar[str] = "bleu"
    mode: ClassVar[Literal["min", "max"]] = "max"

    def __init__(self, cfg: Config, data_dir: Path) -> None:
        super().__init__(cfg, data_dir)
        self.cfg = cfg
        self.vocabulary, _ = load_vocabularies(data_dir)
        self.mixing = cfg.loss.curriculum.mixing(default=0.8)

    def build_model(self) -> nn.Module:
        return TextModel(self.cfg.model.config(vocab_size=len(self.vocabulary)))

    def collate(self, rows: Sequence[dict[str, Any]]) -> Batch:
        tensors: dict[str, Tensor] = {}
        for side in ("source", "target"):
            tensors[side], tensors[f"{side}_lengths"] = pad([row[f"{side}_ids"] for row in rows])
        return Batch(
            tensors,
            weight=float(tensors["target_lengths"].sum() + len(rows)),
            ids=tuple(row["id"] for row in rows),
            tokens=int(tensors["source_lengths"].sum()),
        )

    def loss(self, model: nn.Module, tensors: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        names = ("source", "source_lengths", "target", "target_lengths")
        weights = replace(LossWeights(), inner_target=self.cfg.loss.inner_target)
        batch = [tensors[name] for name in names]
        return text_loss(model, *batch, weights=weights, mixing=self.mixing)  # type: ignore[arg-type]

    def evaluate_batch(self, model: nn.Module, tensors: dict[str, Tensor]) -> list[Any]:
        return decode(model, tensors["source"], tensors["source_lengths"])

    def summarise(self, records: list[Any]) -> dict[str, float]:
        texts = [self.vocabulary.decode(record) for record in records]
        targets = [self.eval[i]["target"] for i in range(len(records))]
        return {"bleu": bleu(texts, targets).score, "exact_match": exact_match(texts, targets)}

    def save_extras(self, path: Path) -> None:
        save_vocabularies(path, self.vocabulary, self.vocabulary)


def main(cfg: Config, **options: Any) -> TrainedRun:
    """Learn the vocabulary on the driver, train, and translate the test pairs."""
    run = train(TextTask, cfg, job=JOB, prepare=lambda run: _prepare(cfg, run), **options)
    if cfg.data.test is not None:
        pairs = cfg.data.test.pairs(cfg.data.root)
        texts = translate(run.path / "model", [source for source, _ in pairs])
        with (run.path / "test.jsonl").open("w", encoding="utf-8") as file:
            for (source, target), text in zip(pairs, texts, strict=True):
                row = {"source": source, "target": target, "text": text}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        report = figures(pairs, texts)
        (run.path / "test.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
        logger.info("test BLEU %.1f", report["bleu"]["value"])
    return run


def translate(folder: Path, sources: Sequence[str]) -> list[str]:
    """Greedy translations by the model of a folder."""
    set_up_torch()
    model = TextModel.from_pretrained(folder, use_safetensors=True).eval()
    vocabulary, _ = load_vocabularies(folder)
    texts: list[str] = []
    for start in range(0, len(sources), _TEST_BATCH):
        ids = [np.array(vocabulary.encode(source)) for source in sources[start : start + _TEST_BATCH]]
        texts += [vocabulary.decode(found) for found in decode(model, *pad(ids))]
    return texts


def figures(pairs: Sequence[tuple[str, str]], texts: Sequence[str]) -> dict[str, Any]:
    """BLEU of translations of sentence pairs, whole and by buckets, and exact match."""
    sources, targets = [source for source, _ in pairs], [target for _, target in pairs]
    value, estimate = bleu(texts, targets), bleu_estimate(texts, targets)

    def score(indices: list[int]) -> float:
        return bleu([texts[i] for i in indices], [targets[i] for i in indices]).score

    return {
        "sentences": len(pairs),
        "bleu": {"value": value.score, "low": estimate.low, "high": estimate.high},
        "signature": value.signature,
        "exact_match": exact_match(texts, targets),
        "by_length": by_bucket([len(target.split()) for target in targets], LENGTH_EDGES, score),
        "by_reordering": by_bucket(reordering(sources, targets), REORDERING_EDGES, score),
    }


@torch.inference_mode()
def decode(model: Any, source_BU: Tensor, lengths_B: Tensor) -> list[list[int]]:
    """Pieces of greedy translations."""
    output = model(source_BU, lengths_B)
    target = output.target
    return greedy(target.logits_BSV, target.lengths_B, blank_id=model.config.blank_token_id)


def pad(ids: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Pieces [B, U], padded on the right, and their numbers [B]."""
    rows = [torch.from_numpy(row.astype(np.int64)) for row in ids]
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD_ID)
    return padded, torch.tensor([len(row) for row in rows])


def _prepare(cfg: Config, run: RunFolder) -> None:
    data, section = cfg.data, cfg.vocabulary
    pairs = {"train": data.train.pairs(data.root), "eval": data.eval.pairs(data.root)}
    texts = [text for pair in pairs["train"] for text in pair]
    vocabulary = Vocabulary.train(texts, size=section.size, kind=section.kind, seed=cfg.train.seed)
    run.data.mkdir(parents=True, exist_ok=True)
    save_vocabularies(run.data, vocabulary, vocabulary)
    upsampling, summary = cfg.model.config(vocab_size=8).upsampling, {}
    for name, part in pairs.items():
        rows = list(_rows(part, vocabulary))
        short = sum(ctc_length(row["target_ids"]) > upsampling * row["length"] for row in rows)
        summary[name] = {"sentences": len(rows), "infeasible_targets": short}
        write_examples(run.data / f"{name}.arrow", rows)
    files = [Path(data.root, name) for part in (data.train, data.eval) for name in (part.source, part.target)]
    run.update_manifest(data_hashes={file.name: sha256_of_file(file) for file in files}, data=summary)


def _rows(pairs: Sequence[tuple[str, str]], vocabulary: Vocabulary) -> Iterator[dict[str, Any]]:
    for number, (source, target) in enumerate(pairs, start=1):
        source_ids, target_ids = vocabulary.encode(source), vocabulary.encode(target)
        yield {
            "id": str(number),
            "length": len(source_ids),
            "source_ids": source_ids,
            "target_ids": target_ids,
            "target": target,
        }


def _lines(path: Path) -> list[str]:
    with open_data(path) as stream:
        text = decode_utf8(stream.read(), path)
    # Not splitlines(): U+2028 and its like are characters of a text here, not ends of a sentence.
    return [line.strip() for line in text.removesuffix("\n").split("\n")]


if __name__ == "__main__":
    from eagleray.jobs.launch import run_job

    run_job(JOB)
