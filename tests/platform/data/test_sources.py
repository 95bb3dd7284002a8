import gzip
import hashlib
import json
import pickle
import random
import tracemalloc

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eagleray.platform.data import sources
from eagleray.platform.data.sources import (
    DataError,
    Row,
    SourceConfig,
    content_hash,
    file_hashes,
    read_rows,
    resolve_source,
)

ROWS = [{"a": 1, "text": "eins"}, {"a": 2, "text": "zwei \u00e4\u00f6"}, {"a": 3, "text": "a\nb"}]


def read(path, **options):
    return list(read_rows(SourceConfig(path=str(path), **options)))


def values(path, **options):
    return [row.values for row in read(path, **options)]


def write_jsonl(path, rows=ROWS, opener=open):
    with opener(path, "wt", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path


def write_parquet(path, rows=ROWS):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


# Formats


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "json", "json.gz", "parquet"])
def test_every_format_gives_the_same_rows_and_says_where_they_are(tmp_path, ending):
    path = tmp_path / f"rows.{ending}"
    opener = gzip.open if ending.endswith(".gz") else open
    if ending == "parquet":
        write_parquet(path)
    elif "jsonl" in ending:
        write_jsonl(path, opener=opener)
    else:
        with opener(path, "wt") as stream:
            stream.write("[" + ",\n".join(json.dumps(row) for row in ROWS) + "]")
    assert read(path) == [Row(row, f"{path}:{i}") for i, row in enumerate(ROWS, start=1)]


def test_gzip_is_told_by_content_and_a_format_can_be_forced(tmp_path):
    path = write_jsonl(tmp_path / "rows.txt", opener=gzip.open)
    assert values(path, format="jsonl") == ROWS


def test_json_file_with_one_object_a_line_is_read_as_lines(tmp_path):
    assert values(write_jsonl(tmp_path / "rows.json")) == ROWS


def test_jsonl_blank_lines_byte_order_mark_and_windows_line_ends(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": 2}')
    assert [(row.values["a"], row.where) for row in read(path)] == [(1, f"{path}:1"), (2, f"{path}:4")]


def test_nested_values_survive_parquet(tmp_path):
    rows = [{"chosen": [{"role": "user", "content": "x"}], "image": b"\x00\x01"}]
    assert values(write_parquet(tmp_path / "rows.parquet", rows)) == rows


# Which files a path means


def test_pattern_reads_its_matches_in_sorted_order_and_prefers_known_endings(tmp_path):
    for name in ("b", "a", "c"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"name": name}])
    (tmp_path / "a.md").write_text("about")
    assert [row["name"] for row in values(tmp_path / "*")] == ["a", "b", "c"]
    assert [row["name"] for row in values(tmp_path / "[ab].jsonl")] == ["a", "b"]


def test_folder_reads_files_below_it_but_nothing_hidden(tmp_path):
    (tmp_path / "sub").mkdir()
    write_jsonl(tmp_path / "sub" / "x.jsonl", [{"n": 1}])
    write_parquet(tmp_path / "y.parquet", [{"n": 2}])
    write_jsonl(tmp_path / ".hidden.jsonl", [{"n": 3}])
    (tmp_path / "README.md").write_text("about")
    assert [row["n"] for row in values(tmp_path)] == [1, 2]


def test_folder_never_mixes_splits(tmp_path):
    for name in ("train-0", "train-1", "dev", "test"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"name": name}])
    write_jsonl(tmp_path / "notes.jsonl", [{"name": "notes"}])
    assert [row["name"] for row in values(tmp_path)] == ["train-0", "train-1"]
    assert [row["name"] for row in values(tmp_path, split="validation")] == ["dev"]
    with pytest.raises(
        DataError, match=r"no file of the split 'holdout': its file names tell of test, train, vali"
    ):
        read(tmp_path, split="holdout")
    assert [row["name"] for row in values(tmp_path / "test.jsonl")] == ["test"]


def test_split_is_told_by_the_file_name_before_its_folders(tmp_path):
    folder = tmp_path / "test_suite"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", [{"n": 1}])
    assert values(tmp_path) == [{"n": 1}]


def test_limit_counts_over_all_files(tmp_path):
    for name in "ab":
        write_jsonl(tmp_path / f"{name}.jsonl")
    assert values(tmp_path / "*.jsonl", limit=4) == [*ROWS, ROWS[0]]


def test_resolved_source_reads_the_same_from_another_folder(tmp_path, monkeypatch):
    base = tmp_path / "project [1]"  # brackets in the folder's own name are no pattern
    (base / "data").mkdir(parents=True)
    write_jsonl(base / "data" / "x.jsonl")
    resolved = [
        resolve_source(SourceConfig(path=path), base) for path in ("data/x.jsonl", "data/*.jsonl", "data")
    ]
    monkeypatch.chdir(tmp_path)
    for source in resolved:
        assert [row.values for row in read_rows(source)] == ROWS


def test_memory_stays_bounded(tmp_path):
    rows = [{"text": "x" * 4000, "n": n} for n in range(3000)]  # 12 MB
    array = tmp_path / "rows.json"
    array.write_text(json.dumps(rows))
    for path in (array, write_jsonl(tmp_path / "rows.jsonl.gz", rows, gzip.open)):
        tracemalloc.start()
        assert sum(1 for _ in read_rows(SourceConfig(path=str(path)))) == 3000
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 6e6, path


# The array scanner


def random_value(rng, depth=0):
    kind = rng.randrange(7 if depth < 3 else 5)
    if kind == 0:
        return rng.choice([None, True, False, 0, -17, 2.5e-7, 123456789012345])
    if kind in (1, 2, 3, 4):
        return "".join(rng.choice('ab"\\\n\u00e4\u65e5\U0001f600{}[],: ') for _ in range(rng.randrange(12)))
    if kind == 5:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {str(i): random_value(rng, depth + 1) for i in range(rng.randrange(4))}


def test_array_scanner_agrees_with_json_at_any_chunk_size(tmp_path, monkeypatch):
    rng = random.Random(0)
    path = tmp_path / "rows.json"
    for trial in range(150):
        rows = [{"v": random_value(rng)} for _ in range(rng.randrange(1, 6))]
        text = json.dumps(rows, indent=rng.choice([None, 1]), ensure_ascii=rng.random() < 0.5)
        path.write_text(text + rng.choice(["", "\n"]), encoding="utf-8")
        monkeypatch.setattr(sources, "_CHUNK", rng.randrange(1, 40))
        found = read(path)
        assert [row.values for row in found] == rows, trial
        lines = text.split("\n")
        assert all("{" in lines[int(row.where.rsplit(":", 1)[1]) - 1] for row in found)


def test_array_cut_off_anywhere_is_an_error_after_its_whole_elements(tmp_path, monkeypatch):
    rows = [{"a": "x\u00e4", "b": [1, 22]}, {"c": {"d": True}}]
    data = json.dumps(rows, ensure_ascii=False).encode()
    path = tmp_path / "rows.json"
    for chunk in (1, 7, 1000):
        monkeypatch.setattr(sources, "_CHUNK", chunk)
        for length in range(1, len(data)):
            path.write_bytes(data[:length])
            found = []
            with pytest.raises(DataError, match=r"broken JSON|not UTF-8"):
                for row in read_rows(SourceConfig(path=str(path))):
                    found.append(row.values)
            assert found == rows[: len(found)]


# Faults of one row: handed on, with file, line and reason


def test_faulty_lines_are_handed_on_and_reading_goes_on(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": \n[1, 2]\n{"a": "\xff"}\n' + b"[" * 100_000 + b'\n{"a": 2}\n')
    first, broken, array, encoding, nested, last = read(path)
    assert (first.values, last.values) == ({"a": 1}, {"a": 2})
    assert str(broken) == f"{path}:2: broken JSON: Expecting value at column 6"
    assert str(array) == f"{path}:3: not a JSON object: found list, expected {{...}}"
    assert str(encoding) == f"{path}:4: not UTF-8 text: byte 0xff; convert the file to UTF-8"
    assert str(nested).startswith(f"{path}:5: broken JSON: ")
    assert (broken.reason, broken.where) == ("broken JSON", f"{path}:2")


@pytest.mark.parametrize("content", ["", "\n \n"])
@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_empty_file(tmp_path, ending, content):
    path = tmp_path / f"rows.{ending}"
    path.write_text(content)
    (error,) = read(path)
    assert str(error) == f"{path}:1: the file is empty"


def test_empty_array_and_parquet_without_rows(tmp_path):
    (tmp_path / "a.json").write_text("\n[ ]")
    assert (
        str(read(tmp_path / "a.json")[0])
        == f"{tmp_path}/a.json:2: the file is empty: its array has no elements"
    )
    write_parquet(tmp_path / "b.parquet", [])
    assert (
        str(read(tmp_path / "b.parquet")[0]) == f"{tmp_path}/b.parquet:1: the file is empty: it has no rows"
    )


def test_array_element_that_is_no_object_is_handed_on(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[{"a": 1},\n 12,\n {"a": 2}]')
    first, error, last = read(path)
    assert (first.values["a"], last.values["a"]) == (1, 2)
    assert str(error) == f"{path}:2: not a JSON object: found int, expected {{...}}"


def test_number_that_runs_over_a_chunk_is_one_element(tmp_path, monkeypatch):
    path = tmp_path / "rows.json"
    path.write_text('[123456789, {"a": 1}]')
    for chunk in range(1, 12):
        monkeypatch.setattr(sources, "_CHUNK", chunk)
        error, row = read(path)
        assert (error.reason, row.values) == ("not a JSON object", {"a": 1})


def test_data_error_survives_pickling():
    error = DataError("f:1", "broken JSON", "why")
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == "f:1: broken JSON: why"
    assert (copy.where, copy.reason, copy.detail) == ("f:1", "broken JSON", "why")


# Faults of a file: raised, since rows would be lost unseen


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1},\n{"a" 2}]', r":2: broken JSON: Expecting ':' delimiter"),
        ('[{"a": 1}\n{"a": 2}]', r":2: broken JSON: expected ',' or '\]' after an element"),
        ('[{"a": 1},\n', r":2: broken JSON: Expecting value"),
        ('[{"a": 1}\n', r":2: broken JSON: the array is cut off"),
        ('[{"a": 1}]\n[]', r":2: broken JSON: text after the end of the array"),
        ('"text"', r":1: broken JSON: starts with '\"', expected an array"),
        ("[" * 100_000, r":1: broken JSON"),
    ],
)
def test_broken_array(tmp_path, text, message):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read(path)


def test_array_in_another_encoding_names_the_line(tmp_path):
    path = tmp_path / "rows.json"
    path.write_bytes('[{"a": 1},\n{"a": "ä"}]'.encode("latin-1"))
    with pytest.raises(DataError, match=r"rows\.json:2: not UTF-8 text: byte 0xe4"):
        read(path)


def test_damaged_archive(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl.gz", ROWS * 1000, gzip.open)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz: the file cannot be read: Compressed file ended"):
        read(path)


def test_damaged_parquet(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match=r"rows\.parquet: not a readable Parquet file"):
        read(path)


def test_unknown_ending(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("a,b")
    with pytest.raises(
        DataError, match=r"rows\.csv: the format is not clear from the ending: known are \.jsonl"
    ):
        read(path)


def test_folder_without_data(tmp_path):
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(DataError, match=r"the folder holds no \.jsonl or .* file: it holds notes\.md"):
        read(tmp_path)


# Local paths are never looked up on the hub


@pytest.fixture
def no_hub(monkeypatch):
    def refuse(*args, **kwargs):
        pytest.fail(f"the hub was asked for {args}")

    monkeypatch.setattr(datasets, "load_dataset", refuse)


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize(
    "path",
    [
        "prefs.jsonl",
        "./prefs",
        "/nowhere/prefs",
        "~/nowhere/prefs",
        "data/prefs",
        "data/deep/prefs",
        "a b",
        "x.csv",
    ],
)
def test_missing_path_is_an_error_not_a_hub_name(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match="no such file or folder"):
        read(path)
    with pytest.raises(DataError, match="no such file or folder"):
        resolve_source(SourceConfig(path=path), tmp_path)


@pytest.mark.usefixtures("no_hub")
def test_missing_file_lists_near_names(tmp_path):
    for name in ("train.jsonl", "trial.jsonl", "other.parquet"):
        (tmp_path / name).write_text("x")
    with pytest.raises(DataError, match=r"no such file or folder: \S+ holds trial\.jsonl, train\.jsonl$"):
        read(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match=r"the pattern matches no file: \S+ holds trial\.jsonl, train"):
        read(tmp_path / "*.json")


@pytest.mark.usefixtures("no_hub")
def test_path_that_could_be_a_hub_name_says_how_to_ask_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match="if a data set of the hub is meant, set `format: hub`"):
        read("data/prefs")


@pytest.mark.parametrize("option", [{"name": "x"}, {"revision": "main"}, {"streaming": True}])
def test_hub_options_on_a_local_file_are_refused(tmp_path, option):
    path = write_jsonl(tmp_path / "rows.jsonl")
    with pytest.raises(
        DataError, match=f"`{next(iter(option))}` is set, which only data sets of the hub have"
    ):
        read(path, **option)


# Data sets of the hub, without the network: the hub's answer is a local Parquet file read by `datasets`


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one data set, `owner/prefs`; records how it was asked."""
    file = write_parquet(tmp_path / "hub.parquet")
    load, builder = datasets.load_dataset, datasets.load_dataset_builder
    asked = []

    def from_file(path, name=None, *, split, revision=None, streaming=False):
        asked.append(
            {"path": path, "name": name, "split": split, "revision": revision, "streaming": streaming}
        )
        if path != "owner/prefs":
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{path}' doesn't exist on the Hub")
        return load(
            "parquet", data_files={"train": str(file)}, split=split, streaming=streaming, cache_dir=tmp_path
        )

    monkeypatch.setattr(datasets, "load_dataset", from_file)
    monkeypatch.setattr(
        datasets,
        "load_dataset_builder",
        lambda path, name=None, *, revision=None: builder(
            "parquet", data_files=str(file), cache_dir=tmp_path
        ),
    )
    return asked


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_data_set(hub, streaming):
    found = read("owner/prefs", name="small", revision="v1", streaming=streaming, limit=2)
    assert found == [Row(row, f"owner/prefs[train]:{i}") for i, row in enumerate(ROWS[:2], start=1)]
    assert hub == [
        {"path": "owner/prefs", "name": "small", "split": "train", "revision": "v1", "streaming": streaming}
    ]


def test_hub_errors_name_the_data_set(hub):
    with pytest.raises(
        DataError, match=r"owner/other\[train\]: the data set cannot be read: Dataset 'owner/other'"
    ):
        read("owner/other")
    with pytest.raises(DataError, match="no local file or folder has this name either"):
        read("owner/other")
    with pytest.raises(
        DataError, match=r"owner/prefs\[best\]: the data set cannot be read: Unknown split \"best\""
    ):
        read("owner/prefs", split="best")


@pytest.mark.usefixtures("hub")
def test_hub_name_stays_one_and_a_local_twin_is_refused(tmp_path, monkeypatch):
    resolved = resolve_source(SourceConfig(path="owner/prefs"), tmp_path)
    assert (resolved.path, resolved.format) == ("owner/prefs", "hub")
    (tmp_path / "owner" / "prefs").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="the hub name is not clear: it is also a local path"):
        list(read_rows(resolved))


@pytest.mark.usefixtures("hub")
def test_hub_hash_depends_on_what_is_read():
    first = content_hash(SourceConfig(path="owner/prefs"))
    assert first == content_hash(SourceConfig(path="owner/prefs", limit=1))
    assert len(first) == 64
    assert first != content_hash(SourceConfig(path="owner/prefs", split="test"))


def test_folder_of_save_to_disk(tmp_path):
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(str(tmp_path / "both"))
    assert values(tmp_path / "one") == ROWS
    assert values(tmp_path / "both", split="test") == ROWS[:1]
    assert values(tmp_path / "both") == ROWS
    with pytest.raises(DataError, match="no split 'dev': there are train, test"):
        read(tmp_path / "both", split="dev")
    assert file_hashes(SourceConfig(path=str(tmp_path / "one")))
    assert resolve_source(SourceConfig(path="one"), tmp_path).path == str(tmp_path / "one")


# Hashes


def test_content_hash_is_that_of_the_file_and_of_all_files_together(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl")
    source, both = SourceConfig(path=str(path)), SourceConfig(path=str(tmp_path / "*.jsonl"))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert content_hash(source) == digest == content_hash(both)
    write_jsonl(tmp_path / "b.jsonl", ROWS[:1])
    together = content_hash(both)
    assert together != digest
    assert list(file_hashes(both)) == [str(path), str(tmp_path / "b.jsonl")]
    (tmp_path / "b.jsonl").write_text("{}\n")
    assert content_hash(both) != together
