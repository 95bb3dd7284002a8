"""Manifests in every layout, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from eagleray.models.nast.audio import Clip, write_wav
from eagleray.models.nast.errors import SpeechDataError
from eagleray.models.nast.layouts import read_layout
from eagleray.models.nast.manifest import (
    Utterance,
    check_utterance,
    clips_from_text,
    clips_to_text,
    unique_ids,
)

SEGMENTS = [
    {"wav": "b.wav", "offset": 2.0, "duration": 0.5, "speaker_id": "spk.1"},
    {"wav": "b.wav", "offset": 1.0, "duration": 0.5, "speaker_id": "spk.1"},
    {"wav": "a.wav", "offset": 0, "duration": 1, "speaker_id": "spk.2"},
]


def _mustc(folder: Path, *, split: str = "dev", source: str = "one\ntwo\nthree\n") -> Path:
    root = folder / "en-de" / "data" / split
    (root / "txt").mkdir(parents=True)
    (root / "txt" / f"{split}.yaml").write_text(yaml.safe_dump(SEGMENTS))
    (root / "txt" / f"{split}.en").write_text(source, encoding="utf-8")
    (root / "txt" / f"{split}.de").write_text("eins\nzwei\ndrei", encoding="utf-8")
    return folder / "en-de"


def _read(path: Path, **options: object) -> list[Utterance]:
    rows = list(read_layout(path, **options))  # type: ignore[arg-type]
    assert all(isinstance(row, Utterance) for row in rows), rows
    return rows  # type: ignore[return-value]


def _error(path: Path, **options: object) -> SpeechDataError:
    """The first fault, raised or in the stream."""
    try:
        rows = list(read_layout(path, **options))  # type: ignore[arg-type]
    except SpeechDataError as error:
        return error
    return next(row for row in rows if isinstance(row, SpeechDataError))


def test_mustc_segments_are_ordered_within_their_talk(tmp_path: Path) -> None:
    root = _mustc(tmp_path)
    rows = _read(root, split="dev")
    assert [row.id for row in rows] == ["dev_b_0", "dev_b_1", "dev_a_0"]
    assert [(row.source, row.target) for row in rows] == [("two", "zwei"), ("one", "eins"), ("three", "drei")]
    wav = root / "data" / "dev" / "wav"
    assert rows[0].clips == (Clip(str(wav / "b.wav"), 1.0, 0.5),) and rows[0].speaker == "spk.1"
    assert rows == _read(root / "data" / "dev", split="dev", layout="mustc")


def test_easy_layout_finds_the_files_of_its_stems(tmp_path: Path) -> None:
    (tmp_path / "txt").mkdir()
    for name, text in {"audio": "x\ny\n", "en": "one\ntwo\n", "de": "eins\nzwei\n"}.items():
        (tmp_path / "txt" / f"train.{name}").write_text(text)
    write_wav(tmp_path / "wav" / "x.flac", np.zeros(800, np.float32))
    rows = _read(tmp_path)
    assert [(row.id, Path(row.audio).name, row.target) for row in rows] == [
        ("train_x", "x.flac", "eins"),
        ("train_y", "y.wav", "zwei"),
    ]


def test_tables_with_the_names_that_people_use(tmp_path: Path) -> None:
    write_wav(tmp_path / "wav" / "x.wav", np.zeros(8000, np.float32))
    (tmp_path / "train.tsv").write_text(
        "id\taudio\tn_frames\tsrc_text\ttgt_text\tspeaker\n"
        'u1\twav/x.wav:1600:3200\t20\tan "odd" one\\\\\tein „Ding“ ☃ e\u0301\u200b\tann\n'
        "u2\twav/x.wav\t20\ta\u2028b\tc\tann\n",
        encoding="utf-8",
    )
    first, second = _read(tmp_path)
    assert first.clips == (Clip(str(tmp_path / "wav" / "x.wav"), 0.1, 0.2),)
    assert (first.source, first.target) == ('an "odd" one\\', "ein „Ding“ ☃ e\u0301\u200b")
    assert second.source == "a\u2028b" and second.where == f"{tmp_path / 'train.tsv'}:3"
    (tmp_path / "covost.csv").write_text('path,sentence,translation\nx.wav,"one, two","eins, zwei"\n')
    [row] = _read(tmp_path / "covost.csv", audio_dir=tmp_path / "wav")
    assert (row.id, row.audio, row.source) == ("covost_1", str(tmp_path / "wav" / "x.wav"), "one, two")


def test_several_recordings_are_one_utterance(tmp_path: Path) -> None:
    for name in "xy":
        write_wav(tmp_path / "wav" / f"{name}.wav", np.zeros(800, np.float32), sample_rate=8000)
    (tmp_path / "dev.tsv").write_text("id\twavs\tgaps\ttgt_text\nu\twav/x.wav wav/y.wav\t800,0\tzehn\n")
    [row] = _read(tmp_path, split="dev")
    assert [clip.pause for clip in row.clips] == [0.1, 0.0]
    assert check_utterance(row, max_seconds=30) == pytest.approx(0.3)
    assert clips_from_text(clips_to_text(row.clips)) == row.clips


def test_the_real_recordings_are_read() -> None:
    folder = Path(__file__).parents[3].parent / "shared" / "data" / "fsdd_numbers"
    if not folder.is_dir():
        pytest.skip("no real data in ../shared/data/fsdd_numbers")
    rows = _read(folder, split="dev")
    assert len(rows) == 350
    table = [line.split("\t") for line in (folder / "dev.tsv").read_text(encoding="utf-8").splitlines()]
    samples = [int(fields[table[0].index("n_samples")]) for fields in table[1:]]
    assert [check_utterance(row, max_seconds=30) * 8000 for row in rows] == pytest.approx(samples)


def test_rows_of_a_table_are_chosen_by_their_columns(tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav", np.zeros(800, np.float32))
    path = tmp_path / "t.tsv"
    path.write_text("id\taudio\tkind\n1\ta.wav\tseq\n2\tgone.wav:0:1\tn2\n3\ta.wav\tseq\n")
    rows = list(read_layout(path, where={"kind": "seq"}))
    assert [row.id for row in rows if isinstance(row, Utterance)] == ["1", "3"] and len(rows) == 2
    assert list(read_layout(path, where={"kind": "seq", "id": "3"})) == rows[1:]
    with pytest.raises(
        SpeechDataError, match=r"t\.tsv:1: the table has no column 'sort': it has id, audio, kind"
    ):
        read_layout(path, where={"sort": "seq"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id\ttgt_text\nu\tx\n", r"t\.tsv:1: the table has no column of audio: it has id, tgt_text"),
        ("", "no column of audio: it has nothing"),
        ("audio\ttgt_text\n\tx\n", r"t\.tsv:2: the audio column is empty"),
        ("audio\ttgt_text\na.wav\n", r"t\.tsv:2: the row has another number of fields"),
        ("audio\ttgt_text\na.wav\tx\ty\n", r"t\.tsv:2: the row has another number of fields"),
        ("audio\toffset\na.wav\tsoon\n", r"t\.tsv:2: `offset` is not a time or a count: 'soon'"),
        ("audio\tduration\na.wav\t-1\n", "`duration` is not a time"),
        ("audio\tgaps\na.wav b.wav\t800\n", "recordings and gaps differ in number: 2 recordings, 1 gaps"),
        ("audio\na.wav:0:100\n", r"t\.tsv:2: there is no such audio file: .*a\.wav"),
        (b"audio\ttgt_text\na.wav\t\xff\n", r"t\.tsv:2: not UTF-8 text"),
    ],
)
def test_faults_of_tables(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = tmp_path / "t.tsv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SpeechDataError, match=message):
        raise _error(path)


def test_faults_of_folders(tmp_path: Path) -> None:
    root = _mustc(tmp_path)
    with pytest.raises(
        SpeechDataError, match=r"no text in the language 'fr': there is de, en; set `source_language`"
    ):
        raise _error(root, split="dev", target_language="fr")
    with pytest.raises(
        SpeechDataError, match=r"no table of the split 'train', and no MuST-C folders: there is data"
    ):
        raise _error(root, split="train")
    with pytest.raises(SpeechDataError, match="there is no such file or folder"):
        raise _error(tmp_path / "nowhere")
    txt = root / "data" / "dev" / "txt"
    (txt / "dev.en").write_text("one\ntwo\n")
    with pytest.raises(SpeechDataError, match=r"dev\.en: the text has another number of lines .*: 2, 3 in"):
        raise _error(root, split="dev")
    (txt / "dev.en").write_text("one\ntwo\nthree\n")
    for value, message in (
        ("{a: 1}", "not a list of segments"),
        ("[}", "not readable YAML"),
        (
            yaml.safe_dump([*SEGMENTS[:2], {"wav": "a.wav", "offset": "x", "duration": 1}]),
            "segment 3: `offset` is not",
        ),
        (yaml.safe_dump([*SEGMENTS[:2], "a.wav"]), "segment 3: the segment needs `wav`"),
    ):
        (txt / "dev.yaml").write_text(value)
        with pytest.raises(SpeechDataError, match=message):
            raise _error(root, split="dev")


@pytest.mark.parametrize(
    ("seconds", "target", "message"),
    [
        (0.025, "x", "t:1: the audio is too short: 0.025 s, at least 0.065 s"),  # one frame
        (0.5, " ", "t:1: the target text is empty"),
        (2.0, "x", "t:1: the audio is too long: 2.0 s, at most 1 s"),
        (None, "x", "t:1: there is no such audio file: .*x.wav"),
    ],
)
def test_utterances_that_cannot_be_used(
    tmp_path: Path, seconds: float | None, target: str, message: str
) -> None:
    if seconds is not None:
        write_wav(tmp_path / "x.wav", np.zeros(int(seconds * 16000), np.float32))
    row = Utterance("u", (Clip(str(tmp_path / "x.wav")),), "source", target, where="t:1")
    with pytest.raises(SpeechDataError, match=message):
        check_utterance(row, max_seconds=1)


def test_ids_are_made_unique() -> None:
    rows = [Utterance(name, (Clip("x"),)) for name in ("a", "b", "a", "a")]
    assert [row.id for row in unique_ids(rows)] == ["a", "b", "a#2", "a#3"]
    assert json.loads(clips_to_text(rows[0].clips)) == [
        {"path": "x", "offset": 0.0, "duration": None, "pause": 0.0}
    ]
