"""The page of runs: whole HTML, nothing from outside, nothing from users that is not escaped."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

from eagleray.platform.history import list_runs
from eagleray.platform.runs_page import write_page

VOID = {"meta", "input"}


class Page(HTMLParser):
    """Checks that tags close in order; notes texts, attributes and curves."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def _run(folder: Path, name: str, note: str, losses: list[float | None]) -> None:
    run = folder / name
    run.mkdir()
    manifest = {"job": "toy", "status": "finished", "created": f"2026-01-0{len(losses)}T10:00", "note": note}
    (run / "manifest.json").write_text(json.dumps({**manifest, "wall_seconds": 65.0, "attempts": []}))
    (run / "config.yaml").write_text("job: toy\nlr: 0.5\n")
    (run / "report.json").write_text(json.dumps({"accuracy": 0.75}))
    records = [{"step": i, "kind": "eval", "time": 0, "loss": loss} for i, loss in enumerate(losses)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_page(tmp_path: Path) -> None:
    """Curves by hand: losses 3, 1, 2 over steps 0 to 2 fill the frame from corner to middle; a null is left out."""
    _run(tmp_path, "a", '<script>alert(1)</script> & "more"', [3.0, 1.0, 2.0])
    _run(tmp_path, "b", "", [None])
    out = tmp_path / "pages" / "runs.html"
    write_page(list_runs(tmp_path), tmp_path, out)
    text = out.read_text()
    page = Page(text)
    assert page.open == [] and [tag for tag, _ in page.tags].count("script") == 1
    assert '<script>alert(1)</script> & "more"' in page.text, "shown as text"
    [line] = [attributes["points"] for tag, attributes in page.tags if tag == "polyline"]
    assert line == "0.0,0.0 130.0,90.0 260.0,45.0 260.0,45.0"
    [label] = [a["aria-label"] for tag, a in page.tags if tag == "svg"]
    assert label == "eval loss: 3 at step 0, 2 at step 2"
    assert "accuracy 0.75" in page.text and "1 min 05 s" in page.text and "2 run(s)" in page.text
    assert not any({"src", "href"} & attributes.keys() for _, attributes in page.tags), "nothing from outside"
    assert "http:" not in text and "https:" not in text and "default-src 'none'" in text
    heads = [attributes for tag, attributes in page.tags if tag == "th"]
    assert heads and all(attributes["scope"] == "col" for attributes in heads)


def test_a_damaged_run_does_not_spoil_the_page(tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "manifest.json").write_text("{")
    write_page(list_runs(tmp_path), tmp_path, tmp_path / "runs.html")
    assert "unreadable" in Page((tmp_path / "runs.html").read_text()).text
