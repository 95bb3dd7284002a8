"""Selecting from a large store of representations by cosine: seconds and gigabytes.

    python -m benchmarks.cosine_select [--quick] [--threads N]

A Parquet store of 1,000,000 vectors of width 512 in float32 on disk and 500 target vectors; half of the pool lies
around the targets' directions. The time is that of the whole way: reading and checking the store, scores by `mean`,
the order of all rows, and the ids of the best 50,000. Writing the store is not measured.

- `seconds`: median of three runs.
- `gigabytes`: peak of the process less what Python and torch take.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.harness import Ratio, Side, finish, in_fresh_process, start

_ROWS_AT_A_TIME = 50_000


@dataclass(frozen=True)
class Size:
    """Store and selection."""

    rows: int = 1_000_000
    targets: int = 500
    width: int = 512
    count: int = 50_000
    rounds: int = 3


QUICK = Size(rows=2000, targets=20, width=16, count=100, rounds=2)


def write_stores(*, folder: Path, size: Size) -> None:
    """Write pool and target, as `lrhp.encode` would."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    centres = rng.standard_normal((2, size.width), dtype=np.float32)
    for name, rows, kinds in (("pool", size.rows, 2), ("target", size.targets, 1)):
        writer = None
        for first in range(0, rows, _ROWS_AT_A_TIME):
            count = min(_ROWS_AT_A_TIME, rows - first)
            vectors = rng.standard_normal((count, size.width), dtype=np.float32)
            vectors += centres[rng.integers(0, kinds, count)]
            offsets = pa.array(np.arange(count + 1, dtype=np.int32) * size.width)
            columns = {
                "id": pa.array([f"{name}-{first + i:07d}" for i in range(count)]),
                "source": pa.array(["made"] * count),
                "h": pa.ListArray.from_arrays(offsets, pa.array(vectors.reshape(-1))),
                "model_hash": pa.array(["none"] * count),
            }
            table = pa.table(columns)
            writer = writer or pq.ParquetWriter(folder / f"{name}.parquet", table.schema, compression="none")
            writer.write_table(table)
        assert writer is not None
        writer.close()


def build(*, folder: Path, size: Size) -> Callable[[], tuple[float, float]]:
    """One selection: seconds, and the mean score of what was selected over that of the rest."""
    from eagleray.models.selection.choice import best_first
    from eagleray.models.selection.cosine import cosine_scores
    from eagleray.models.selection.rows import check_rows
    from eagleray.platform.data.vectors import read_vectors

    def work() -> tuple[float, float]:
        started = time.perf_counter()
        pool, target = (read_vectors(str(folder / f"{name}.parquet")) for name in ("pool", "target"))
        for table in (pool, target):
            check_rows(table.vectors_ND, table.ids, "store")
        scores = cosine_scores(pool.vectors_ND, target.vectors_ND)
        order = best_first(scores, pool.ids, highest=True)
        selected = [pool.ids[row] for row in order[: size.count]]
        assert len(selected) == size.count
        seconds = time.perf_counter() - started
        return seconds, float(scores[order[: size.count]].mean() - scores[order[size.count :]].mean())

    return work


def main() -> None:
    """Measure and print."""
    options, machine = start(__doc__ or "", use_gpu=False)
    size = QUICK if options.quick else Size()
    with tempfile.TemporaryDirectory(prefix="eagleray-benchmark-") as name:
        folder = Path(name)
        in_fresh_process(write_stores, threads=options.threads, folder=folder, size=size)
        with Side(build, threads=options.threads, folder=folder, size=size) as side:
            found = [side() for _ in range(size.rounds)]
            peak = side.peak_memory() / 1e9
    label = f"{size.count} of {size.rows} rows, width {size.width}"
    ratios = [
        Ratio("seconds", label, median(seconds for seconds, _ in found), 60, "low"),
        Ratio("gigabytes", "peak memory (GB)", peak, 4, "low"),
    ]
    margin = round(found[0][1], 4)
    finish("cosine_select", ratios, machine=machine, quick=options.quick, score_margin=margin)


if __name__ == "__main__":
    main()
