"""Generated pictures: real files, facts that hold, nothing to be learnt without the picture."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from eagleray.models.rovrm.images import ImageStore, decode_image
from eagleray.models.rovrm.records import read_row
from eagleray.models.rovrm.synthetic import COLOURS, make_text, make_visual, write_visual


def test_the_same_arguments_give_the_same_bytes() -> None:
    rows, files = make_visual(20, 3)
    assert (rows, files) == make_visual(20, 3)
    assert len(rows) == 20 and files.keys() == {row["image"] for row in rows}
    assert make_visual(20, 4)[0] != rows and make_text(9, 1) == make_text(9, 1)


def test_colour_facts_hold_in_the_pixels() -> None:
    rows, files = make_visual(60, 0)
    words = ("no", "one", "two", "three", "four")
    checked = 0
    for row in (row for row in rows if row["kind"] == "colour"):
        image = decode_image(files[row["image"]])
        for text, true in ((row["chosen"], True), (row["rejected"], False)):
            _, _, _, colour, *_, number = text.rstrip(".").split()
            cells = [image.getpixel((place * 24 + 12, 16)) == COLOURS[colour] for place in range(4)]
            assert (sum(cells) == words.index(number)) is true
            checked += 1
    assert checked > 40


def test_without_the_picture_or_the_list_it_is_a_coin() -> None:
    for rows in (make_visual(200, 1)[0], make_text(200, 1)):
        assert len(rows) == 200
        assert Counter(row["chosen"] for row in rows) == Counter(row["rejected"] for row in rows)


def test_the_caption_names_every_shape() -> None:
    rows, _ = make_visual(20, 2)
    for row in rows:
        counts = [
            ("no", "one", "two", "three", "four").index(part.split()[0])
            for part in row["caption"].split("; ")
        ]
        assert sum(counts) == 4


def test_written_files_are_read_back(tmp_path: Path) -> None:
    path = write_visual(tmp_path, 6, 0, split="dev")
    store = ImageStore(tmp_path / "images")
    for line in path.read_text().splitlines():
        [record] = read_row(json.loads(line))
        assert record.image is not None and decode_image(store.read(record.image)).size == (96, 24)


def test_texts_can_be_decided() -> None:
    for row in make_text(50, 0):
        things, thing = (
            row["prompt"].split("A list: ")[1].split(". ")[0].split(", "),
            row["prompt"].split()[-1][:-1],
        )
        number = ("no", "one", "two", "three", "four")[things.count(thing)]
        assert f" {number} times" in row["chosen"] and f" {number} times" not in row["rejected"]
