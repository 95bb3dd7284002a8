"""Representations of preference pairs into a store: a streaming Ray Data job that can be stopped and run again.

    python -m eagleray.jobs.lrhp.encode --config configs/lrhp/encode_tiny.yaml model.path=... store=...

What the store holds already, by id, order and model, is not computed again; rows of another model are refused. The
store is a folder of Parquet shards sorted by id (`models/lrhp/store.py`).
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from eagleray.jobs.encoding import Item, encode
from eagleray.jobs.lrhp.data import PairSet, named_pairs, tags_of
from eagleray.models.lrhp.representer import Representer
from eagleray.models.lrhp.store import RepresentationStore
from eagleray.models.selection.store import model_hash, text_hash
from eagleray.platform.config import Config as Section
from eagleray.platform.data.preferences import Preference
from eagleray.platform.runs import RunFolder
from eagleray.platform.scoring import Row, Score
from eagleray.platform.sections import JobConfig, ModelSection

JOB = "lrhp.encode"
logger = logging.getLogger(__name__)
_DTYPES = {"saved": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class EncoderSection(Section):
    """The model and its limits."""

    path: str
    """Model folder of a `lrhp.train` run, or a hub name."""
    untrained: bool = False
    """Take a plain language model as it is, with a head of zeros: the baseline of an untrained backbone."""
    dtype: Literal["saved", "fp32", "bf16", "fp16"] = "saved"
    """Arithmetic of the backbone; part of the model's hash."""
    max_batch_tokens: int = Field(default=16384, ge=1)
    """Tokens of one forward pass, padding included."""

    @property
    def arguments(self) -> dict[str, Any]:
        """For `build_representer`."""
        path = ModelSection(path=self.path).path  # absolute where it is a folder: workers run elsewhere
        return {**self.model_dump(), "path": path}

    @property
    def hash(self) -> str:
        """Hash of everything that decides a representation, its order aside."""
        if not Path(self.path).expanduser().is_dir():
            logger.warning("%s is a hub name; its weights are not part of the hash.", self.path)
        return model_hash(Path(self.path).expanduser(), self.dtype, str(self.untrained))


class Config(JobConfig):
    """Config of `lrhp.encode`."""

    job: Literal["lrhp.encode"] = JOB
    model: EncoderSection
    data: dict[str, PairSet] = Field(min_length=1)
    """Sets of pairs by name; the name is the source of rows without a column `source`. Ids must differ."""
    order: Literal["canonical", "both", "diff"] = "canonical"
    """`canonical`: the chosen answer first; `both`: the mean over the two orders; `diff`: their difference."""
    store: str | None = None
    """Folder of the store; one that exists is added to. Default: `representations` in the run folder."""
    shard_rows: int = Field(default=8192, ge=1)
    """Rows of a shard, which is also what an interruption costs at most."""


def main(cfg: Config) -> dict[str, Any]:
    """Encode what is missing.

    Returns:
        The report: counts, the model's hash and where the store is.
    """
    with RunFolder.create(JOB, cfg).recording() as run:
        sets = {name: section.load(keep_ties=True) for name, section in cfg.data.items()}
        pairs = named_pairs(sets)
        run.update_manifest(data_hashes={k: v for loaded in sets.values() for k, v in loaded.hashes.items()})
        folder = Path(cfg.store).expanduser() if cfg.store else run.path / "representations"
        store = RepresentationStore(folder, model_hash=cfg.model.hash)
        done = encode(
            store,
            [_item(source, pair, cfg.order) for source, pair in pairs],
            build_representer,
            {**cfg.model.arguments, "order": cfg.order},
            cfg.ray,
            shard_rows=cfg.shard_rows,
        )
        report = {
            "store": str(folder.absolute()),
            "model_hash": store.model_hash,
            "order": cfg.order,
            "pairs": len(pairs),
            "encoded": done.computed,
            "shards": len(store.files),
        }
        run.write_report(report)
    return report


def build_representer(
    path: str, untrained: bool, dtype: str, max_batch_tokens: int, order: str | None
) -> Score:
    """For the workers: rows with prompt, chosen and rejected to `h`, `u` and `truncated`.

    Without an order, h is canonical and `u` has the logits of both orders, [2].
    """
    representer = Representer.from_pretrained(
        path, untrained=untrained, dtype=_DTYPES[dtype], max_batch_tokens=max_batch_tokens
    )

    def score(rows: list[Row]) -> list[Row]:
        triples = [(row["prompt"], row["chosen"], row["rejected"]) for row in rows]
        if order is None:
            h_N2D, u_N2, cut = representer.both_orders(triples)
            return [{"h": h_N2D[i, 0], "u": u_N2[i], "truncated": cut[i]} for i in range(len(rows))]
        found = representer.represent(triples, order=order)  # type: ignore[arg-type]
        return [{"h": r.h_D, "u": r.u, "truncated": r.truncated} for r in found]

    return score


def text_row(pair: Preference) -> dict[str, str]:
    """A row for `build_representer`."""
    return {"prompt": pair.prompt_text, "chosen": pair.chosen, "rejected": pair.rejected}


def _item(source: str, pair: Preference, order: str) -> Item:
    row = text_row(pair)
    columns = {
        "id": pair.id,
        "source": source,
        "tags": tags_of(pair),
        "order": order,
        "prompt_hash": text_hash(pair.prompt_text),
        "pair_hash": text_hash(pair.prompt_text, pair.chosen, pair.rejected),
    }
    return Item(columns, row, length=sum(map(len, row.values())))


if __name__ == "__main__":
    from eagleray.jobs.launch import run_job

    run_job(JOB)
