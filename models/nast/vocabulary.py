"""SentencePiece vocabulary of transcripts and translations; the CTC blank is `<s>`, id 0, as in the release.

Joint (one model for both languages, as the paper's recipe has it) or separate: a `Vocabulary` is one model, and
who wants two trains two. It is saved as SentencePiece's own file, a protocol buffer: nothing is unpickled.
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal

import sentencepiece

logger = logging.getLogger(__name__)

BLANK_ID, PAD_ID, EOS_ID, UNK_ID = 0, 1, 2, 3
BOS_ID = BLANK_ID
"""`<s>` doubles as the blank: a CTC target never holds it."""

TARGET_FILE, SOURCE_FILE = "vocabulary.model", "source_vocabulary.model"
"""Names in a data or model folder; there is no `SOURCE_FILE` where the vocabulary is joint."""

Kind = Literal["unigram", "bpe", "word"]

_LIMIT = re.compile(r"value <= (\d+)")
_TOO_SMALL = re.compile(r"smaller than required_chars\. \d+ vs (\d+)")
_LINE_BREAKS = re.compile(r"[\r\n\u2028\u2029\x00]+")


class Vocabulary:
    """Text to piece ids and back."""

    def __init__(self, model: bytes) -> None:
        """Args: model: The serialised SentencePiece model.

        Raises:
            ValueError: It is no SentencePiece model, or one with other ids for the special symbols.
        """
        self._model = model
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"The vocabulary is not a SentencePiece model: {error}") from None
        found = tuple(getattr(self._pieces, f"{name}_id")() for name in ("bos", "pad", "eos", "unk"))
        if found != (BLANK_ID, PAD_ID, EOS_ID, UNK_ID):
            raise ValueError(
                f"The vocabulary has ids {found} for <s>, <pad>, </s>, <unk>; they must be "
                f"{(BLANK_ID, PAD_ID, EOS_ID, UNK_ID)}. Train it with `Vocabulary.train`."
            )

    def __len__(self) -> int:
        return self._pieces.get_piece_size()

    def encode(self, text: str) -> list[int]:
        """Piece ids without special symbols; what has no piece becomes `<unk>`."""
        return self._pieces.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of piece ids; special symbols are left out, `<unk>` is written as ⁇."""
        return self._pieces.decode([i for i in ids if i not in (BLANK_ID, PAD_ID, EOS_ID)]).strip()

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The pieces themselves, for people."""
        return [self._pieces.id_to_piece(i) for i in ids]

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        *,
        size: int = 10_000,
        kind: Kind = "unigram",
        sentences: int = 10_000_000,
        seed: int = 0,
    ) -> Vocabulary:
        """Learn pieces from texts; a `size` that the texts cannot fill is lowered to what they can, with a warning.

        Args:
            texts: Training texts, in any order.
            size: Pieces, the four special symbols included.
            kind: `unigram` (the paper's), `bpe`, or `word` for a closed set of words.
            sentences: Most texts used; of more, a sample.
            seed: Seed of that sample.

        Raises:
            ValueError: There is no text, or `size` is below the number of characters in it.
        """
        lines = [line for text in texts if (line := _LINE_BREAKS.sub(" ", text).strip())]
        if not lines:
            raise ValueError(
                "There is no text to learn a vocabulary from: all transcripts and targets are empty."
            )
        sentencepiece.set_random_generator_seed(seed)
        try:
            return cls(_train(lines, size, kind, sentences))
        except RuntimeError as error:
            needed, limit = _TOO_SMALL.search(str(error)), _LIMIT.search(str(error))
            if needed:
                raise ValueError(
                    f"The vocabulary has {size} pieces, and the characters of the text and the special symbols alone "
                    f"need {needed[1]}. Raise `vocabulary.size`."
                ) from None
            if limit is None:
                raise ValueError(f"The vocabulary cannot be learnt: {error}") from None
        logger.warning(
            "The text allows a vocabulary of %s pieces, not %d; taken are %s.", limit[1], size, limit[1]
        )
        return cls(_train(lines, int(limit[1]), kind, sentences))

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        """Read what `save` wrote.

        Raises:
            ValueError: There is no such file, or it is not a vocabulary of ours.
        """
        if not path.is_file():
            raise ValueError(f"{path}: there is no such vocabulary file.")
        return cls(path.read_bytes())

    def save(self, path: Path) -> None:
        """Write the SentencePiece model."""
        path.write_bytes(self._model)


def save_vocabularies(folder: Path, target: Vocabulary, source: Vocabulary) -> None:
    """Write the target's and, unless it is the same object, the source's vocabulary."""
    target.save(folder / TARGET_FILE)
    if source is not target:
        source.save(folder / SOURCE_FILE)


def load_vocabularies(folder: Path) -> tuple[Vocabulary, Vocabulary]:
    """Target and source vocabulary of a data or model folder; the same object where they are joint.

    Raises:
        ValueError: The folder has none.
    """
    target = Vocabulary.load(folder / TARGET_FILE)
    separate = folder / SOURCE_FILE
    return target, Vocabulary.load(separate) if separate.exists() else target


def ctc_length(ids: Sequence[int]) -> int:
    """Fewest frames that can spell the pieces: one each, and a blank between equal neighbours.

    >>> ctc_length([5, 5, 6])
    4
    """
    return len(ids) + sum(a == b for a, b in pairwise(ids))


def _train(lines: list[str], size: int, kind: Kind, sentences: int) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type=kind,
        vocab_size=size,
        character_coverage=1.0,
        input_sentence_size=sentences if sentences < len(lines) else 0,
        shuffle_input_sentence=True,
        bos_id=BOS_ID,
        pad_id=PAD_ID,
        eos_id=EOS_ID,
        unk_id=UNK_ID,
        num_threads=1,  # more threads add up in another order
        minloglevel=2,
    )
    return model.getvalue()
