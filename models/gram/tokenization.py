"""Text to tokens: the chat frame around a user's text, and cutting over-long texts at token borders.

What is special here:

- The chat template is applied once, to a placeholder; a user's text never passes through it. Control tokens
  (special tokens, and added tokens that the chat template itself writes) come from the frame only:
  `<|im_end|>` typed into an answer is ordinary text.
- All text between two control tokens is tokenised as one piece, as the tokenizer itself would do, so that
  token merges across the border between template and content are those the backbone knows.
- A text of a million characters is tokenised only as far as it can be kept.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Overlong = Literal["shorten", "drop"]

_USER, _ASSISTANT = "eagleray-user-text", "eagleray-assistant-text"
_FIRST_CHARS_PER_TOKEN = 8
_BORDER_TOKENS = 16


class PlainTokenizer:
    """A tokenizer's own pipeline without its control tokens: no text can produce one."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, control_tokens: set[str], *, inside_text: bool
    ) -> None:
        spec = json.loads(_backend(tokenizer).to_str())
        # Marked special and then not matched, rather than removed: the ids of the others depend on them.
        for token in spec["added_tokens"]:
            token["special"] = token["content"] in control_tokens
        spec.update(post_processor=None, truncation=None, padding=None)
        if inside_text:
            _without_leading_space(spec["pre_tokenizer"])
        self._backend = Tokenizer.from_str(json.dumps(spec))
        self._backend.encode_special_tokens = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._backend.encode_special_tokens = True  # a pickled Tokenizer forgets it

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def head(self, text: str, limit: int) -> TokenCuts:
        """The first `limit` tokens of a text."""
        return self._cuts(text, limit, from_end=False)

    def tail(self, text: str, limit: int) -> TokenCuts:
        """The last `limit` tokens of a text."""
        return self._cuts(text, limit, from_end=True)

    def _cuts(self, text: str, limit: int, *, from_end: bool) -> TokenCuts:
        size = _FIRST_CHARS_PER_TOKEN * (limit + _BORDER_TOKENS)
        while True:
            start = max(0, len(text) - size) if from_end else 0
            spans = self._backend.encode(text[start : start + size], add_special_tokens=False).offsets
            # The slice itself may have cut a word: tokens next to that cut are not those of the whole text.
            if size >= len(text) or len(spans) >= limit + _BORDER_TOKENS:
                break
            size *= 2
        complete = size >= len(text) and len(spans) <= limit
        kept = spans[max(0, len(spans) - limit) :] if from_end else spans[:limit]
        return TokenCuts(text, [(start + a, start + b) for a, b in kept], complete)


@dataclass(frozen=True)
class TokenCuts:
    """A text with the character spans of its first (or last) tokens: it can be cut at a token border."""

    text: str
    spans: list[tuple[int, int]]
    complete: bool
    """Whether `spans` covers the whole text."""

    def first(self, n: int) -> str:
        """The text up to the end of its n-th token."""
        if self.complete and n >= len(self.spans):
            return self.text
        return self.text[: self.spans[n - 1][1]] if n else ""

    def last(self, n: int) -> str:
        """The text from the start of its n-th token from the end."""
        if self.complete and n >= len(self.spans):
            return self.text
        return self.text[self.spans[-n][0] :] if n else ""


class ChatFrame:
    """The fixed tokens around a user's text: `prefix | text | suffix`, then the assistant's turn and its end.

    With a chat template the frame is what the template writes (thinking switched off); without one it is the
    beginning-of-text token, if the tokenizer has one, and the end-of-text token after the assistant's turn.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        control = _control_tokens(tokenizer)
        before = after = turn_end = ""
        if tokenizer.chat_template is not None:
            before, after = _render(tokenizer, answered=False).split(_USER)
            turn_end = _render(tokenizer, answered=True).split(_ASSISTANT)[1]
        pattern = _control_pattern(tokenizer, control)
        prefix, self._lead = _split_after_last(pattern, before)
        self._trail, suffix = _split_before_first(pattern, after)
        self._turn_trail = ""
        self.end_ids: list[int] = []
        if end := pattern.search(turn_end):
            self._turn_trail, closing = turn_end[: end.start()], end.group()
            self.end_ids = self._natural(tokenizer, closing)
        elif tokenizer.eos_token_id is not None:
            self.end_ids = [tokenizer.eos_token_id]  # type: ignore[list-item]
        self.prefix_ids: list[int] = self._natural(tokenizer, prefix)
        self.suffix_ids = self._natural(tokenizer, suffix)
        if tokenizer.chat_template is None and tokenizer.bos_token_id is not None:
            self.prefix_ids = [tokenizer.bos_token_id]  # type: ignore[list-item]
        inside_text = tokenizer.chat_template is not None and bool(self.prefix_ids)
        self.plain = PlainTokenizer(tokenizer, control, inside_text=inside_text)
        self._warn_if_unnatural(tokenizer, before, after)

    def user_turn(self, text: str) -> list[int]:
        """Everything up to the first token of the assistant's answer."""
        return [*self.prefix_ids, *self.plain.encode(self._lead + text + self._trail), *self.suffix_ids]

    def open_turn(self, text: str) -> list[int]:
        """The user's turn without its end: what a token may follow that must see all of the text and nothing else."""
        return [*self.prefix_ids, *self.plain.encode(self._lead + text)]

    def assistant_turn(self, text: str) -> list[int]:
        """The assistant's answer and its end-of-turn token."""
        return [*self.plain.encode(text + self._turn_trail), *self.end_ids]

    @staticmethod
    def _natural(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
        if not text:
            return []
        ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False)
        return ids  # type: ignore[return-value]

    def _warn_if_unnatural(self, tokenizer: PreTrainedTokenizerBase, before: str, after: str) -> None:
        sample = "Which is better?\n\nThe first one."
        if tokenizer.chat_template is None:
            return
        if self.user_turn(sample) != self._natural(tokenizer, before + sample + after):
            logger.warning(
                "The tokenizer of %s splits a text differently inside its chat template than on its own. "
                "Scores are consistent, but may differ slightly from those of a program that tokenises the "
                "rendered chat as one.",
                tokenizer.name_or_path or type(tokenizer).__name__,
            )


def fit_texts(
    prompt: str,
    answer_a: str,
    answer_b: str,
    *,
    plain: PlainTokenizer,
    count: Callable[[str, str, str], int],
    max_length: int,
    structure_length: int,
    overlong: Overlong,
) -> tuple[str, str, str] | None:
    """The three texts, cut so that `count` of them is at most `max_length`; None if they must not be cut.

    Both answers are cut to the same number of tokens and keep their heads; the prompt keeps its tail. A
    prompt gives way only when the answers would get less than half of the room: a pair without answers cannot
    be judged.

    Args:
        prompt: The request.
        answer_a: One answer.
        answer_b: The other.
        plain: Tokenizer of the texts.
        count: Tokens of the whole rendered input.
        max_length: Largest allowed value of `count`.
        structure_length: `count` of three empty texts.
        overlong: `drop` returns None instead of cutting.
    """
    room = max_length - structure_length
    x, a, b = plain.tail(prompt, room), plain.head(answer_a, room), plain.head(answer_b, room)
    if overlong == "drop":
        fits = x.complete and a.complete and b.complete and count(prompt, answer_a, answer_b) <= max_length
        return (prompt, answer_a, answer_b) if fits else None
    while True:
        prompt_cap, answer_cap = share_room(room, len(x.spans), len(a.spans), len(b.spans))
        texts = x.last(prompt_cap), a.first(answer_cap), b.first(answer_cap)
        # Tokens merge differently across the new borders, so the sum of the parts is only an estimate.
        excess = count(*texts) - max_length
        if excess <= 0:
            return texts
        room = max(0, room - excess)


def share_room(room: int, prompt: int, answer_a: int, answer_b: int) -> tuple[int, int]:
    """Token limits of the prompt and of each answer, so that together they fit into `room`.

    The answers' limit is the largest that fits beside the whole prompt, or one cut to half the room.

    >>> share_room(100, 20, 500, 30)
    (20, 50)
    >>> share_room(100, 900, 500, 500)
    (50, 25)
    """
    for_answers = max(room - prompt, room // 2)
    shorter = min(answer_a, answer_b)
    answer_cap = for_answers // 2 if 2 * shorter >= for_answers else for_answers - shorter
    return min(prompt, room - min(answer_a, answer_cap) - min(answer_b, answer_cap)), answer_cap


def valid_unicode(text: str) -> str:
    """The text with lone surrogates (which JSON can carry and no tokenizer accepts) replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _render(tokenizer: PreTrainedTokenizerBase, *, answered: bool) -> str:
    messages = [{"role": "user", "content": _USER}]
    if answered:
        messages.append({"role": "assistant", "content": _ASSISTANT})
    # Qwen3 writes an empty think block on the prompt side when thinking is off; Llama 3.2 would otherwise
    # write today's date into the system turn, and the same pair would score differently tomorrow.
    rendered = tokenizer.apply_chat_template(
        messages,
        tokenize=False,
        add_generation_prompt=not answered,
        enable_thinking=False,
        date_string="26 Jul 2024",
    )
    marks = [_USER, _ASSISTANT] if answered else [_USER]
    if not isinstance(rendered, str) or any(rendered.count(mark) != 1 for mark in marks):
        raise ValueError(
            "The tokenizer's chat template does not write each message exactly once and unchanged, so the "
            "judge prompt cannot be placed in it. Set `tokenizer.chat_template` to one that does, or to None."
        )
    return rendered


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    # White space that happens to be an added token (Gemma's newlines) is text, wherever it stands.
    template = "" if tokenizer.chat_template is None else tokenizer.get_chat_template()
    added = tokenizer.added_tokens_decoder.values()
    return {t.content for t in added if t.special or (t.content in template and not t.content.isspace())}


def _control_pattern(tokenizer: PreTrainedTokenizerBase, control: set[str]) -> re.Pattern[str]:
    added = [t for t in tokenizer.added_tokens_decoder.values() if t.content in control]
    added.sort(key=lambda token: len(token.content), reverse=True)
    space = r"\s*"
    parts = [space * token.lstrip + re.escape(token.content) + space * token.rstrip for token in added]
    return re.compile("|".join(parts) or r"(?!)")


def _split_after_last(pattern: re.Pattern[str], text: str) -> tuple[str, str]:
    ends = [match.end() for match in pattern.finditer(text)]
    return (text[: ends[-1]], text[ends[-1] :]) if ends else ("", text)


def _split_before_first(pattern: re.Pattern[str], text: str) -> tuple[str, str]:
    match = pattern.search(text)
    return (text[: match.start()], text[match.start() :]) if match else (text, "")


def _without_leading_space(pre_tokenizer: dict[str, Any] | None) -> None:
    """Sentencepiece-like tokenizers put a space before the first word of a text, not inside a chat."""
    if pre_tokenizer is None:
        return
    for part in (pre_tokenizer, *pre_tokenizer.get("pretokenizers", [])):
        if part.get("prepend_scheme") == "first":
            part["prepend_scheme"] = "never"


def _backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    try:
        return tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    except AttributeError:
        raise ValueError(
            f"The tokenizer is a {type(tokenizer).__name__}, which gives no character offsets; a fast "
            "tokenizer (one with a tokenizer.json) is needed. Load it with `AutoTokenizer` of transformers."
        ) from None
