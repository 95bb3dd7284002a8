"""All runs on one page, for people who would rather look than read: static, sortable, without any outside resource.

Curves are drawn as SVG from `metrics.jsonl` in the colour of the text, so that the page follows the reader's light or dark
setting and stays small. What a run holds is text from users' files and is escaped wherever it stands.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from eagleray.platform import storage
from eagleray.platform.config import flatten
from eagleray.platform.history import RunRecord
from eagleray.platform.progress import format_seconds
from eagleray.platform.tracking import METRICS_FILE, RECORD_KEYS, read_metrics

_CURVES, _POINTS = 12, 200
_WIDTH, _HEIGHT = 260, 90

_STYLE = """
:root { color-scheme: light dark; --line: #8886; --dim: #666; }
@media (prefers-color-scheme: dark) { :root { --dim: #aaa; } }
body { font: 15px/1.45 system-ui, sans-serif; margin: 1.5rem; }
table { border-collapse: collapse; width: 100%; }
caption { text-align: left; padding: .4rem 0; color: var(--dim); }
th, td { text-align: left; vertical-align: top; padding: .35rem .7rem .35rem 0; border-bottom: 1px solid var(--line); }
th button { font: inherit; font-weight: 600; background: none; border: 0; padding: 0; cursor: pointer; color: inherit; }
th[aria-sort=ascending] button::after { content: " \\2191"; } th[aria-sort=descending] button::after { content: " \\2193"; }
td.number { font-variant-numeric: tabular-nums; }
input { font: inherit; padding: .3rem .5rem; width: 20rem; max-width: 100%; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; } dd { margin: 0; overflow-wrap: anywhere; }
figure { display: inline-block; margin: .4rem 1rem .4rem 0; } figcaption { font-size: 13px; color: var(--dim); }
svg { display: block; border: 1px solid var(--line); } polyline { fill: none; stroke: currentColor; stroke-width: 1.5; }
"""

_SCRIPT = """
const body = document.querySelector("tbody");
for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => {
  const head = button.closest("th"), place = head.cellIndex, up = head.getAttribute("aria-sort") !== "ascending";
  for (const other of document.querySelectorAll("th")) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const key = row => row.cells[place].dataset.value, number = value => value !== "" && !isNaN(value);
  const order = (a, b) => number(a) && number(b) ? a - b : a.localeCompare(b);
  const rows = [...body.rows].sort((a, b) => (up ? 1 : -1) * order(key(a), key(b)));
  body.append(...rows);
});
document.querySelector("input").addEventListener("input", event => {
  const words = event.target.value.toLowerCase().split(/\\s+/);
  for (const row of body.rows) row.hidden = !words.every(word => row.textContent.toLowerCase().includes(word));
});
"""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_COLUMNS = ("Run", "Job", "Status", "Created (UTC)", "Time", "Note", "Results")


def write_page(runs: Sequence[RunRecord], root: Path, out: Path) -> None:
    """Write the page.

    Args:
        runs: What it shows, in this order.
        root: Names of runs are relative to it.
        out: The file to write, as a whole.
    """
    heads = "".join(f'<th scope="col"><button type="button">{name}</button></th>' for name in _COLUMNS)
    rows = "\n".join(_row(run, root) for run in runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    storage.write_text(
        out,
        f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>Runs in {escape(str(root))}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>Runs</h1>
<p><label>Show runs with <input type="search" placeholder="words of a name, job, note or config"></label></p>
<table>
<caption>{len(runs)} run(s) in {escape(str(root))}. A click on a heading sorts; a click on results opens them.</caption>
<thead><tr>{heads}</tr></thead>
<tbody>
{rows}
</tbody>
</table>
<script>{_SCRIPT}</script>
</body>
</html>
""",
    )


def _row(run: RunRecord, root: Path) -> str:
    values = run.manifest
    seconds = float(values.get("wall_seconds") or 0)
    cells = [
        (os.path.relpath(run.path, root), None),
        (str(values.get("job", "")), None),
        (run.status, None),
        (str(values.get("created", ""))[:16].replace("T", " "), None),
        (format_seconds(seconds) if seconds else "", f"{seconds}"),
        (str(values.get("note", "")), None),
    ]
    shown = "".join(
        f'<td data-value="{escape(text if value is None else value)}">{escape(text)}</td>'
        for text, value in cells
    )
    return f'<tr>{shown}<td data-value="">{_details(run)}</td></tr>'


def _details(run: RunRecord) -> str:
    metrics = run.final_metrics()
    first = next((f"{k} {v:.4g}" for k, v in metrics.items() if _is_number(v)), "open")
    config = flatten({key: value for key, value in run.config.items() if key != "run"})
    error = next((a["error"] for a in reversed(run.manifest.get("attempts", [])) if a.get("error")), None)
    parts = [f"<p>{escape(str(error))}</p>"] if error and run.status != "finished" else []
    parts += list(_figures(run))
    parts += [_list("Results", metrics), _list("Config", config)]
    return f"<details><summary>{escape(first)}</summary>{''.join(parts)}</details>"


def _list(title: str, values: dict[str, Any]) -> str:
    if not values:
        return ""
    lines = "".join(f"<dt>{escape(str(k))}</dt><dd>{escape(_text(v))}</dd>" for k, v in values.items())
    return f"<h2>{title}</h2><dl>{lines}</dl>"


def _figures(run: RunRecord) -> Iterator[str]:
    curves: dict[str, list[tuple[float, float]]] = {}
    for record in read_metrics(run.path / METRICS_FILE):
        for key, value in record.items():
            if key not in RECORD_KEYS and _is_number(value):
                curves.setdefault(f"{record['kind']} {key}", []).append((record["step"], value))
    wanted = [name for name in curves if name.startswith("eval") or name == "train loss"]
    for name in sorted(wanted, key=lambda name: name != "train loss")[:_CURVES]:
        yield _figure(name, curves[name])


def _figure(name: str, points: list[tuple[float, float]]) -> str:
    points = points[:: max(1, len(points) // _POINTS)] + points[-1:]
    steps, values = zip(*points, strict=True)
    about = f"{name}: {values[0]:.4g} at step {steps[0]}, {values[-1]:.4g} at step {steps[-1]}"
    line = " ".join(
        f"{_scaled(x, steps, _WIDTH):.1f},{_HEIGHT - _scaled(y, values, _HEIGHT):.1f}" for x, y in points
    )
    return (
        f'<figure><svg role="img" aria-label="{escape(about)}" width="{_WIDTH}" height="{_HEIGHT}" '
        f'viewBox="-4 -4 {_WIDTH + 8} {_HEIGHT + 8}"><polyline points="{line}"/></svg>'
        f"<figcaption>{escape(about)}</figcaption></figure>"
    )


def _scaled(value: float, values: Sequence[float], size: int) -> float:
    low, high = min(values), max(values)
    return size / 2 if high == low else size * (value - low) / (high - low)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
