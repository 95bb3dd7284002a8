"""A preference pair as one sequence of tokens that ends with `<|PREFERENCE|>`.

    [User] x
    [Response 1] y_1
    [Response 2] y_2
    <|PREFERENCE|>

The sequence stands in the backbone's chat template as a user's turn that is left open: what a template would write
after the token cannot reach the token's hidden state, so it would only cost time. Text can produce neither the token
(it is encoded as plain text there) nor a marker (a marker in it gets a backslash in front).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from string import Formatter

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from eagleray.models.gram.tokenization import ChatFrame, fit_texts, valid_unicode

PREFERENCE_TOKEN = "<|PREFERENCE|>"
TEMPLATE = "[User] {prompt}\n[Response 1] {first}\n[Response 2] {second}\n"
_FIELDS = ["prompt", "first", "second"]
# Two orders of one pair may differ by a few tokens, where text merges with the line break beside it.
_ORDER_SLACK = 8


@dataclass(frozen=True)
class PairTemplate:
    """The text around a prompt and two answers; the special token comes after it."""

    text: str = TEMPLATE

    def __post_init__(self) -> None:
        fields = [name for _, name, _, _ in Formatter().parse(self.text) if name is not None]
        if fields != _FIELDS or not all(self.markers):
            raise ValueError(
                f"The pair template is {self.text!r}; it must hold {{prompt}}, {{first}} and {{second}} once each, in "
                "this order, with a marker before each."
            )

    @property
    def markers(self) -> tuple[str, ...]:
        """What stands before the prompt, the first and the second answer."""
        return tuple(text.strip() for text, name, _, _ in Formatter().parse(self.text) if name is not None)

    def render(self, prompt: str, first: str, second: str) -> str:
        """The text of a pair; markers inside the three texts get a backslash.

        >>> PairTemplate().render("Hi", "See [Response 2] x", "b")
        '[User] Hi\\n[Response 1] See \\\\[Response 2] x\\n[Response 2] b\\n'
        """
        pattern = "|".join(re.escape(marker) for marker in self.markers)
        escaped = (re.sub(pattern, r"\\\g<0>", text) for text in (prompt, first, second))
        return self.text.format(**dict(zip(_FIELDS, escaped, strict=True)))


@dataclass(frozen=True)
class EncodedPair:
    """Token ids of a pair in one order, with exactly one `<|PREFERENCE|>`, the last one."""

    ids: list[int]
    truncated: bool
    """Whether text was cut."""


class PreferenceEncoder:
    """Pairs as token ids."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: PairTemplate | None = None,
        *,
        max_length: int = 2048,
    ) -> None:
        """Check the tokenizer.

        Args:
            tokenizer: A fast tokenizer that has `<|PREFERENCE|>`; its chat template, if any, frames the pair.
            template: The text around the pair.
            max_length: Most tokens of a sequence.

        Raises:
            ValueError: The tokenizer lacks the token, or `max_length` leaves no room for text.
        """
        self.token_id = preference_token_id(tokenizer)
        self.template = template or PairTemplate()
        self.max_length = max_length
        self._frame = ChatFrame(tokenizer)
        self._structure_length = len(self._ids("", "", ""))
        if self._structure_length + _ORDER_SLACK >= max_length:
            raise ValueError(
                f"`max_length` is {max_length}, but a pair takes {self._structure_length} tokens before any text is "
                "put in. Set it well above."
            )

    def encode(self, prompt: str, first: str, second: str) -> EncodedPair:
        """Token ids of a pair.

        Both answers of a longer pair are cut alike, at their ends; then the start of the prompt. Both orders of a
        pair are cut at the same places.
        """
        texts = valid_unicode(prompt), valid_unicode(first), valid_unicode(second)
        if sum(map(len, texts)) <= 32 * self.max_length:
            ids = self._ids(*texts)
            if len(ids) <= self.max_length - _ORDER_SLACK:
                return EncodedPair(ids, False)
        kept = fit_texts(
            *texts,
            plain=self._frame.plain,
            count=lambda x, a, b: max(len(self._ids(x, a, b)), len(self._ids(x, b, a))),
            max_length=self.max_length,
            structure_length=self._structure_length,
            overlong="shorten",
        )
        assert kept is not None
        return EncodedPair(self._ids(*kept), kept != texts)

    def encode_orders(self, prompt: str, first: str, second: str) -> tuple[EncodedPair, EncodedPair]:
        """A pair as it is, and with its answers swapped."""
        return self.encode(prompt, first, second), self.encode(prompt, second, first)

    def _ids(self, prompt: str, first: str, second: str) -> list[int]:
        return [*self._frame.open_turn(self.template.render(prompt, first, second)), self.token_id]


def add_preference_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Give a tokenizer the token `<|PREFERENCE|>` if it has none; returns its id.

    A reserved token of the tokenizer is never used for it: some models hold untrained zeros there.
    """
    tokenizer.add_tokens([AddedToken(PREFERENCE_TOKEN, special=True, normalized=False)])  # type: ignore[list-item]
    return preference_token_id(tokenizer)


def preference_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of `<|PREFERENCE|>`.

    Raises:
        ValueError: The tokenizer has no such token.
    """
    if PREFERENCE_TOKEN not in tokenizer.get_vocab():
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path!r} has no token {PREFERENCE_TOKEN}: it is not that of an LRHP "
            "model. Use the tokenizer that `lrhp.train` saved beside the weights."
        )
    return tokenizer.convert_tokens_to_ids(PREFERENCE_TOKEN)  # type: ignore[return-value]
