"""Samples of a phase: files and archives, mixtures, splits without leaks, and errors with file, line and reason."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from rovrm_cases import png

from eagleray.jobs.rovrm.data import VisualData, load_parts, load_sources
from eagleray.models.rovrm.synthetic import write_visual
from eagleray.platform.data.sources import DataError

REAL = Path(__file__).parents[4] / "shared" / "data"


def _source(path: Path, **values: Any) -> dict[str, Any]:
    return {"path": str(path), **values}


def _load(*sources: dict[str, Any]) -> Any:
    data = VisualData(train=sources)  # type: ignore[arg-type]
    return load_sources(data.train, data.images)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_visual(tmp_path, 40, 0)


def test_a_folder_and_an_archive_give_the_same(rows: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for file in sorted((tmp_path / "images").iterdir()):
            archive.write(file, file.name)
    from_folder = _load(_source(rows, images=str(tmp_path / "images")))
    from_archive = _load(_source(rows, images=str(tmp_path / "images.zip")))
    assert from_folder.samples == from_archive.samples and len(from_folder.samples) == 40
    assert from_folder.counts["train.jsonl"]["kept"] == 40


def test_forms_and_labels(rows: Path, tmp_path: Path) -> None:
    captions = _load(_source(rows, form="caption", label="captions")).samples
    assert all(s.image is None and s.record.prompt.startswith("Image description: ") for s in captions)
    assert {s.source for s in captions} == {"captions"}
    blind = _load(_source(rows, form="question")).samples
    assert all(s.image is None and s.record.prompt == "State one fact about the picture." for s in blind)


def test_a_mixture_with_transcripts(rows: Path, tmp_path: Path) -> None:
    said = "\n\nHuman: Hello?\n\nAssistant: "
    (tmp_path / "hh.jsonl").write_text(json.dumps({"chosen": said + "Hi.", "rejected": said + "No."}) + "\n")
    pictures = _source(rows, images=str(tmp_path / "images"))
    samples = _load(pictures, _source(tmp_path / "hh.jsonl", layout="text")).samples
    assert (samples[-1].record.prompt, samples[-1].record.responses) == ("Hello?", ("Hi.", "No."))
    assert samples[0].image is not None and samples[-1].image is None


def test_the_official_json_list(tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "<image>\nIs there a cat?"},
        {"from": "gpt", "value": ["Yes.", "No."]},
    ]
    (tmp_path / "a.json").write_text(json.dumps([{"id": "1", "image": "x.png", "conversations": turns}]))
    (tmp_path / "x.png").write_bytes(png((9, 9)))
    [sample] = _load(_source(tmp_path / "a.json", images=str(tmp_path))).samples
    assert sample.record.prompt == "Is there a cat?" and sample.image == png((9, 9))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": "gone.png"}, r"rows\.jsonl:2: the picture is missing: row 'b': gone\.png"),
        ({"image": "broken.png"}, r"rows\.jsonl:2: not a picture: row 'b': broken\.png"),
        ({"image": "dot.png"}, r"rows\.jsonl:2: the picture is too small: row 'b': dot\.png: 1 x 1"),
        ({"image": "wide.png"}, r"rows\.jsonl:2: the picture is too long and narrow: row 'b': wide\.png"),
        ({"image": ["a.png", "a.png"]}, r"rows\.jsonl:2: more than one image: row 'b'"),
        (
            {"image": None, "prompt": "<image>\nWhat?"},
            r"rows\.jsonl:2: an image marker without an image: row 'b'",
        ),
        ({"id": "a"}, r"rows\.jsonl:2: the id occurs twice: row 'a'"),
    ],
)
def test_faults_name_file_line_and_row(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    for name, content in (
        ("a.png", png((9, 9))),
        ("broken.png", b"text in a file of the wrong name"),
        ("dot.png", png((1, 1))),
        ("wide.png", png((900, 9))),
    ):
        (tmp_path / name).write_bytes(content)
    good = {"id": "a", "image": "a.png", "prompt": "What?", "chosen": "Red.", "rejected": "Blue."}
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps(row) + "\n" for row in (good, good | {"id": "b"} | change, good | {"id": "c"}))
    )
    source = _source(rows, images=str(tmp_path))
    with pytest.raises(DataError, match=message):
        _load(source)
    loaded = _load(source | {"on_error": "skip"})
    assert [s.record.id for s in loaded.samples] == ["a", "c"]
    assert sum(loaded.counts["rows.jsonl"]["skipped"].values()) == 1


def test_a_picture_with_a_wrong_extension_is_what_its_content_says(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png((9, 9), kind="JPEG"))
    row = {"id": "a", "image": "a.png", "prompt": "What?", "chosen": "Red.", "rejected": "Blue."}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    assert len(_load(_source(tmp_path / "rows.jsonl", images=str(tmp_path))).samples) == 1


def test_pictures_need_a_place(rows: Path) -> None:
    with pytest.raises(DataError, match="the row has an image and its source no `images`"):
        _load(_source(rows))
    with pytest.raises(DataError, match="no folder and no zip archive"):
        _load(_source(rows, images="nowhere"))


def test_no_picture_lies_on_both_sides(rows: Path, tmp_path: Path) -> None:
    images = str(tmp_path / "images")
    pictures = _source(rows, images=images)
    parts = load_parts(VisualData.model_validate({"train": [pictures], "eval_fraction": 0.3}), seed=0)
    assert len(parts.train) + len(parts.eval) == 40
    assert not {s.picture for s in parts.train} & {s.picture for s in parts.eval}
    again = load_parts(VisualData.model_validate({"train": [pictures], "eval_fraction": 0.3}), seed=0)
    assert parts.train == again.train

    # The captions of pictures that are evaluated are left out too, and so is a copy under another name.
    held = [json.loads(line) for line in rows.read_text().splitlines()[:10]]
    for place, row in enumerate(held):
        (tmp_path / "images" / f"copy{place}.png").write_bytes(
            (tmp_path / "images" / row["image"]).read_bytes()
        )
        if place >= 5:
            row["image"] = f"copy{place}.png"
    (tmp_path / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held))
    evaluation = [_source(tmp_path / "dev.jsonl", images=images)]
    parts = load_parts(VisualData.model_validate({"train": [pictures], "eval": evaluation}), seed=0)
    assert parts.counts["in_evaluation"] >= 10 and len(parts.train) == 40 - parts.counts["in_evaluation"]
    captions = [_source(rows, form="caption")]
    parts = load_parts(VisualData.model_validate({"train": captions, "eval": evaluation}), seed=0)
    assert parts.counts["in_evaluation"] == 5
    benchmark = {"train": [pictures], "held_out": evaluation, "eval_fraction": 0.3}
    kept = load_parts(VisualData.model_validate(benchmark), seed=0).train
    shown = {s.picture for s in _load(_source(rows, images=images)).samples[:10]}
    assert kept and not shown & {s.picture for s in kept}


def test_a_limit_draws_by_the_seed(rows: Path, tmp_path: Path) -> None:
    train = [_source(rows, images=str(tmp_path / "images"))]
    few = load_parts(
        VisualData.model_validate({"train": train, "limit": 5, "eval_fraction": 0.3}), seed=0
    ).train
    more = load_parts(
        VisualData.model_validate({"train": train, "limit": 10, "eval_fraction": 0.3}), seed=0
    ).train
    assert len(few) == 5 and more[:5] == few
    assert (
        load_parts(
            VisualData.model_validate({"train": train, "limit": 5, "eval_fraction": 0.3}), seed=1
        ).train
        != few
    )


@pytest.mark.skipif(
    not (REAL / "nlvr").is_dir(), reason="needs the real data beside the checkout (shared/data)"
)
def test_real_files_have_the_counts_of_their_readmes() -> None:
    nlvr, science = REAL / "nlvr", REAL / "scienceqa_images"
    facts = _load(_source(nlvr / "facts_dev.jsonl", images=str(nlvr / "images_dev.zip"), limit=100)).samples
    assert len(facts) == 100 and all(s.image for s in facts)
    assert len(_load(_source(nlvr / "facts_train.jsonl.gz", form="caption")).samples) == 5924
    assert len(_load(_source(nlvr / "dev.jsonl", form="question")).samples) == 431
    for split, choices, verdicts in (("dev", 107, 11), ("test", 117, 13)):
        rows = science / f"{split}.jsonl"
        assert len(_load(_source(rows, images=str(science))).samples) == choices
        assert len(_load(_source(rows, images=str(science), layout="verdicts")).samples) == verdicts
