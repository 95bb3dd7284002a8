"""Text while its tokens arrive: never half a character, never a part of a stop text."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_HALF = "\ufffd"


class TextStream:
    """Turns a growing list of tokens into pieces of text that can be shown at once.

    Example:
        stream = TextStream(tokenizer, stop=["\\n\\n"])
        piece = stream.feed(tokens)        # what is new and certain
        rest = stream.close(tokens)        # what was held back, when no token follows
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, stop: Sequence[str] = ()) -> None:
        """Begin a text.

        Args:
            tokenizer: Decodes; special tokens are left out of the text.
            stop: Texts that end it; they and what follows are not shown.
        """
        self._tokenizer, self._stop = tokenizer, [text for text in stop if text]
        self._context = self._read = 0
        self._held = ""
        self.stopped = False
        """Whether a stop text was met."""

    def feed(self, tokens: Sequence[int]) -> str:
        """New text, given all tokens so far; empty while a character or a stop text may be incomplete."""
        return self._emit(self._decode(tokens, last=False), last=False)

    def close(self, tokens: Sequence[int]) -> str:
        """The rest of the text."""
        return self._emit(self._decode(tokens, last=True), last=True)

    def _decode(self, tokens: Sequence[int], *, last: bool) -> str:
        # Decoded together with the tokens before them: some tokenizers write a space only between tokens.
        before = self._text(tokens[self._context : self._read])
        now = self._text(tokens[self._context :])
        if len(now) <= len(before) or (now.endswith(_HALF) and not last):
            return ""
        self._context, self._read = self._read, len(tokens)
        return now[len(before) :]

    def _text(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)  # type: ignore[return-value]

    def _emit(self, new: str, *, last: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = 0 if last else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` without being all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
