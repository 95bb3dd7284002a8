"""Several objectives at once: the points that no other beats in everything, as a list, and drawn.

Works on any rows of numbers, of a sweep or not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from eagleray.platform.space import Objective


def pareto_front(rows: Sequence[Mapping[str, Any]], objectives: Sequence[Objective]) -> list[int]:
    """Positions of the rows that are not dominated, best in the first objective first.

    A row dominates another if it is nowhere worse and somewhere better; equal rows do not dominate each other. Rows
    that lack a value are left out.

    >>> rows = [{"accuracy": 0.9, "cost": 5}, {"accuracy": 0.8, "cost": 1}, {"accuracy": 0.7, "cost": 2}]
    >>> pareto_front(rows, [Objective("accuracy", "max"), Objective("cost", "min")])
    [0, 1]
    """
    losses = {
        i: tuple(o.sign * row[o.metric] for o in objectives)
        for i, row in enumerate(rows)
        if all(row.get(o.metric) is not None for o in objectives)
    }
    front = [i for i, mine in losses.items() if not any(_dominates(other, mine) for other in losses.values())]
    return sorted(front, key=lambda i: losses[i])


def plot_pareto(
    rows: Sequence[Mapping[str, Any]], objectives: Sequence[Objective], out: Path, *, names: Sequence[str]
) -> Path:
    """One panel a pair of objectives: all rows, those on the front of all objectives named.

    Of two objectives the front is joined by steps, below which nothing was reached.

    Args:
        rows: What was measured.
        objectives: Two or more.
        out: Picture to write.
        names: Of the rows.
    """
    front = pareto_front(rows, objectives)
    pairs = list(combinations(objectives, 2))
    figure = Figure(figsize=(5.2 * len(pairs), 4.4), layout="constrained")
    for axes, (x, y) in zip(figure.subplots(1, len(pairs), squeeze=False).flat, pairs, strict=True):
        have = [
            i for i, row in enumerate(rows) if row.get(x.metric) is not None and row.get(y.metric) is not None
        ]
        others = [i for i in have if i not in front]
        axes.plot(
            [rows[i][x.metric] for i in others],
            [rows[i][y.metric] for i in others],
            "o",
            color="0.7",
            label="beaten",
        )
        axes.plot(
            [rows[i][x.metric] for i in front],
            [rows[i][y.metric] for i in front],
            marker="o",
            linestyle="-" if len(objectives) == 2 else "",
            drawstyle="steps-post" if x.mode == "min" else "steps-pre",
            label="front",
        )
        for i in front:
            axes.annotate(
                names[i],
                (rows[i][x.metric], rows[i][y.metric]),
                fontsize="small",
                xytext=(4, 4),
                textcoords="offset points",
            )
        axes.set_xlabel(f"{x.metric} ({x.mode})")
        axes.set_ylabel(f"{y.metric} ({y.mode})")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(out, dpi=120)
    return out


def _dominates(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))
