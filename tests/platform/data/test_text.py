import gzip

import numpy as np
import pytest

from eagleray.platform.config import ConfigError, validate_config
from eagleray.platform.data.files import DataError
from eagleray.platform.data.text import TextData, iter_texts, pack_tokens, split_text, text_hashes

PARAGRAPHS = [f"Paragraph {i} has\ntwo lines." for i in range(100)]


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(PARAGRAPHS) + "\n")
    with gzip.open(tmp_path / "b.txt.gz", "wt", newline="") as stream:
        stream.write("first\r\n \r\nsecond\r\n \r\nthird")
    (tmp_path / "notes.md").write_text("not read")
    return tmp_path


def texts(part, *paths, **options):
    return list(iter_texts(TextData(paths=[str(path) for path in paths], **options), part))


def test_paragraphs_are_split_into_first_95_and_last_5_percent(corpus):
    train = texts("train", corpus / "a.txt", unit="paragraph")
    dev = texts("dev", corpus / "a.txt", unit="paragraph")
    assert [text.rstrip() for text in train] == PARAGRAPHS[:95]
    assert [text.rstrip() for text in dev] == PARAGRAPHS[95:]


def test_documents_are_whole_files_and_their_parts_make_up_the_file(corpus):
    (train,) = texts("train", corpus / "a.txt")
    (dev,) = texts("dev", corpus / "a.txt")
    assert train + dev == (corpus / "a.txt").read_text()
    assert texts("dev", corpus / "a.txt", dev_fraction=0) == []
    assert texts("train", corpus / "a.txt", dev_fraction=0) == [train + dev]


def test_folder_patterns_gzip_and_windows_line_ends(corpus):
    options = {"unit": "paragraph", "dev_fraction": 0}
    assert texts("train", corpus / "*.gz", **options) == ["first", "second", "third"]
    assert len(texts("train", corpus, **options)) == 103
    assert len(texts("train", corpus, corpus / "*.txt", **options)) == 103  # no file is read twice
    data = TextData(paths=[str(corpus)])
    assert list(text_hashes(data)) == [str(corpus / "a.txt"), str(corpus / "b.txt.gz")]
    assert list(iter_texts(TextData(paths=["a.txt"]).resolved(corpus), "dev")) == texts(
        "dev", corpus / "a.txt"
    )


@pytest.mark.parametrize(
    ("text", "fraction", "dev"),
    [
        ("a" * 40 + "\n\n" + "b" * 58, 0.5, "b" * 58),  # a paragraph ends near
        ("a" * 10 + "\n\n" + "b" * 40 + "\n" + "c" * 48, 0.5, "c" * 48),  # only a line does
        ("a" * 50 + " " + "b" * 49, 0.5, "b" * 49),  # only a word does
        ("a" * 100, 0.25, "a" * 25),
        ("a" * 80 + "\n" * 20, 0.25, "a" * 5 + "\n" * 20),  # the development part is never blank
    ],
)
def test_cut_falls_between_paragraphs_lines_or_words(text, fraction, dev):
    train, held_out = split_text(text, dev_fraction=fraction)
    assert held_out == dev
    assert train + held_out == text


def test_bad_files(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"fine\nna\xefve\n")
    with pytest.raises(DataError, match=r"empty\.txt:1: the file is empty"):
        texts("train", tmp_path / "empty.txt")
    with pytest.raises(DataError, match=r"latin\.txt:2: not UTF-8 text: byte 0xef"):
        texts("train", tmp_path / "latin.txt")
    with pytest.raises(DataError, match=r"no such file or folder: .* holds empty\.txt"):
        TextData(paths=["emty.txt"]).resolved(tmp_path)
    with pytest.raises(ConfigError, match="`paths`"):
        validate_config(TextData, {"paths": []}, "test")


def test_packing_by_hand():
    blocks = pack_tokens([[1, 2, 3], [], [4], [5, 6, 7, 8]], block_length=4, eos_id=0)
    assert blocks.tolist() == [[1, 2, 3, 0], [4, 0, 5, 6]]  # 7, 8, 0 fill no block
    assert blocks.dtype == np.int32


def test_packing_keeps_order_and_loses_less_than_a_block():
    rng = np.random.default_rng(0)
    for _ in range(50):
        documents = [rng.integers(1, 99, rng.integers(0, 30)).tolist() for _ in range(10)]
        length = int(rng.integers(2, 9))
        stream = [token for document in documents if document for token in [*document, 0]]
        blocks = pack_tokens(iter(documents), block_length=length, eos_id=0)
        assert blocks.ravel().tolist() == stream[: len(stream) // length * length]


def test_packing_refuses_too_little_text_and_senseless_blocks():
    with pytest.raises(ValueError, match="The text has 3 tokens, less than one block of `block_length` 8"):
        pack_tokens([[1, 2]], block_length=8, eos_id=0)
    with pytest.raises(ValueError, match="`block_length` is 1; it must be at least 2"):
        pack_tokens([[1, 2]], block_length=1, eos_id=0)
