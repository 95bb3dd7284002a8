"""Prompts of GRAM: the judge prompt of stage 2, the pair rendering of stage 1, and their encoders.

The strings around the answers are the official ones; the instruction is data (`templates/*.yaml`, or a user's
file). What is special here: text inside an answer can never pass for a marker. A marker typed by a user gets
a backslash in front, which `JudgeTemplate.parse` takes away again; so parsing inverts rendering, and an
answer cannot end its own block and speak for the other one.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import yaml
from transformers import PreTrainedTokenizerBase

from eagleray.models.gram.tokenization import ChatFrame, Overlong, fit_texts, valid_unicode

LABELS = ("A", "B")

QUESTION = "[User Question]"
_A_START, _A_END = "[The Start of Assistant A's Answer]", "[The End of Assistant A's Answer]"
_B_START, _B_END = "[The Start of Assistant B's Answer]", "[The End of Assistant B's Answer]"
_MARKER = re.compile("|".join(re.escape(m) for m in (QUESTION, _A_START, _A_END, _B_START, _B_END)))
_ESCAPED_MARKER = re.compile(rf"\\({_MARKER.pattern})")

ANSWERS_START = f"\n\n{_A_START}\n"
ANSWER_BORDER = f"\n{_A_END}\n\n{_B_START}\n"
ANSWERS_END = f"\n{_B_END}"

_TEMPLATES = Path(__file__).parent / "templates"
# Two orders of one pair may differ by a few tokens, where text merges with the line break beside it.
_ORDER_SLACK = 8


@dataclass(frozen=True)
class JudgeTemplate:
    """A judge prompt: instruction, the request, both answers between markers, and a last line."""

    name: str
    instruction: str
    tail: str = "#Preferred:"
    """Last line, directly before the label; empty leaves the line out."""

    def __post_init__(self) -> None:
        if not self.instruction or self.instruction != self.instruction.strip():
            raise ValueError(
                f"The instruction of template {self.name!r} must be text without white space at its ends; "
                f"it starts with {self.instruction[:20]!r} and ends with {self.instruction[-20:]!r}."
            )

    @classmethod
    def load(cls, name_or_path: str | Path) -> JudgeTemplate:
        """A built-in template by name, or one from a YAML file with `name`, `instruction` and `tail`."""
        path = Path(name_or_path)
        if path.suffix not in (".yaml", ".yml"):
            path = _TEMPLATES / f"{name_or_path}.yaml"
        if not path.is_file():
            names = ", ".join(sorted(p.stem for p in _TEMPLATES.glob("*.yaml")))
            raise ValueError(
                f"There is no judge template {str(name_or_path)!r}: give a .yaml file or one of: {names}."
            )
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: the judge template cannot be read as YAML: {error}") from None
        if not isinstance(values, dict) or not {"name", "instruction"} <= set(values) <= {
            "name",
            "instruction",
            "tail",
        }:
            keys = ", ".join(map(str, values)) if isinstance(values, dict) else type(values).__name__
            raise ValueError(
                f"{path}: a judge template has the keys `name`, `instruction` and, if it differs, `tail`; "
                f"found: {keys}."
            )
        if wrong := [key for key, value in values.items() if not isinstance(value, str)]:
            raise ValueError(f"{path}: `{wrong[0]}` must be text (put it in quotes).")
        return cls(**{**values, "instruction": values["instruction"].strip()})

    @property
    def sha256(self) -> str:
        """Hash of the prompt with empty texts: equal for templates that ask alike, whatever their name."""
        return hashlib.sha256(self.render("", "", "").encode()).hexdigest()

    def render(self, prompt: str, answer_a: str, answer_b: str) -> str:
        """The judge prompt as text."""
        prompt, answer_a, answer_b = map(escape_markers, (prompt, answer_a, answer_b))
        return f"{self._head}{prompt}{ANSWERS_START}{answer_a}{ANSWER_BORDER}{answer_b}{self._end}"

    def parse(self, text: str) -> tuple[str, str, str]:
        """The request and the two answers of a judge prompt with this template; inverse of `render`.

        Raises:
            ValueError: The text was not made with this template, or has several readings (which only happens
                for texts of other programs, which leave markers inside answers as they are).
        """
        if not (text.startswith(self._head) and text.endswith(self._end)):
            raise ValueError(f"The text does not start and end like judge template {self.name!r}.")
        body = text[len(self._head) : len(text) - len(self._end)]
        prompt, _, answers = body.partition(ANSWERS_START)
        starts, borders = body.count(ANSWERS_START), answers.count(ANSWER_BORDER)
        if starts != 1 or borders != 1:
            raise ValueError(
                f"The judge prompt has {starts} starts of answer A and {borders} borders between the answers "
                "after it; with exactly one of each it can be read."
            )
        answer_a, _, answer_b = answers.partition(ANSWER_BORDER)
        return unescape_markers(prompt), unescape_markers(answer_a), unescape_markers(answer_b)

    @property
    def _head(self) -> str:
        return f"{self.instruction}\n\n{QUESTION}\n"

    @property
    def _end(self) -> str:
        return f"{ANSWERS_END}\n\n{self.tail}" if self.tail else ANSWERS_END


def render_pair(prompt: str, answer_a: str, answer_b: str) -> tuple[str, str]:
    """Stage 1: the user's turn (the request) and the assistant's (both answers); no judge instruction."""
    prompt, answer_a, answer_b = map(escape_markers, (prompt, answer_a, answer_b))
    return f"{QUESTION}\n{prompt}\n\n", f"{_A_START}\n{answer_a}{ANSWER_BORDER}{answer_b}{ANSWERS_END}"


def escape_markers(text: str) -> str:
    """The text with a backslash before every marker in it.

    >>> escape_markers("See [User Question] above.")
    'See \\\\[User Question] above.'
    """
    return _MARKER.sub(r"\\\g<0>", text)


def unescape_markers(text: str) -> str:
    """Inverse of `escape_markers`."""
    return _ESCAPED_MARKER.sub(r"\1", text)


def shuffled_order(seed: int, example: str | int) -> bool:
    """Whether the preferred answer of an example is shown second: a fair coin that depends on nothing else.

    A hash and not a random stream: the same on any number of workers and in any order of reading.
    """
    return bool(
        hashlib.blake2b(f"{seed}:{example}".encode("utf-8", "surrogatepass"), digest_size=1).digest()[0] & 1
    )


class JudgeEncoder:
    """Judge prompts as token ids, ready for the label token to follow."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: JudgeTemplate,
        *,
        label_strings: tuple[str, str] = LABELS,
        max_length: int = 2048,
        overlong: Overlong = "shorten",
    ) -> None:
        """Check template and labels against the tokenizer.

        Args:
            tokenizer: A fast tokenizer; its chat template, if any, frames the prompt.
            template: The judge prompt.
            label_strings: The model's reply if the first, or the second, answer is better; one token each.
            max_length: Most tokens of an encoded prompt.
            overlong: Cut the texts of a longer pair (never the structure around them), or drop the pair.
        """
        self.template = template
        self.label_strings = label_strings
        self.label_ids = label_token_ids(tokenizer, label_strings)
        self.max_length = max_length
        self.overlong: Overlong = overlong
        self._frame = ChatFrame(tokenizer)
        self._structure_length = _checked_structure(len(self._ids("", "", "")), max_length, overlong)

    def encode(self, prompt: str, answer_a: str, answer_b: str) -> list[int] | None:
        """Token ids up to, not including, the label; None if the pair is too long and `overlong` is `drop`.

        Both orders of a pair are treated alike: they are cut at the same places, or both dropped.
        """
        prompt, answer_a, answer_b = map(valid_unicode, (prompt, answer_a, answer_b))
        if _surely_cheap(prompt, answer_a, answer_b, self.max_length):
            ids = self._ids(prompt, answer_a, answer_b)
            if len(ids) <= self.max_length - _ORDER_SLACK:
                return ids
        texts = fit_texts(
            prompt,
            answer_a,
            answer_b,
            plain=self._frame.plain,
            count=lambda x, a, b: max(len(self._ids(x, a, b)), len(self._ids(x, b, a))),
            max_length=self.max_length,
            structure_length=self._structure_length,
            overlong=self.overlong,
        )
        return None if texts is None else self._ids(*texts)

    def _ids(self, prompt: str, answer_a: str, answer_b: str) -> list[int]:
        return self._frame.user_turn(self.template.render(prompt, answer_a, answer_b))


class PairEncoder:
    """Stage-1 examples as token ids: the request, then both answers as the target."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, max_length: int = 2048, overlong: Overlong = "shorten"
    ) -> None:
        self.max_length = max_length
        self.overlong: Overlong = overlong
        self._frame = ChatFrame(tokenizer)
        self._structure_length = _checked_structure(self._count("", "", ""), max_length, overlong)

    def encode(self, prompt: str, answer_a: str, answer_b: str) -> tuple[list[int], int] | None:
        """Token ids and the index of the first target; None if too long and `overlong` is `drop`.

        Every token from that index on is a target: markers, answers and the end-of-turn token.
        """
        prompt, answer_a, answer_b = map(valid_unicode, (prompt, answer_a, answer_b))
        if _surely_cheap(prompt, answer_a, answer_b, self.max_length):
            context, target = self._turns(prompt, answer_a, answer_b)
            if len(context) + len(target) <= self.max_length:
                return [*context, *target], len(context)
        texts = fit_texts(
            prompt,
            answer_a,
            answer_b,
            plain=self._frame.plain,
            count=self._count,
            max_length=self.max_length,
            structure_length=self._structure_length,
            overlong=self.overlong,
        )
        if texts is None:
            return None
        context, target = self._turns(*texts)
        return [*context, *target], len(context)

    def _count(self, prompt: str, answer_a: str, answer_b: str) -> int:
        return sum(map(len, self._turns(prompt, answer_a, answer_b)))

    def _turns(self, prompt: str, answer_a: str, answer_b: str) -> tuple[list[int], list[int]]:
        user, assistant = render_pair(prompt, answer_a, answer_b)
        return self._frame.user_turn(user), self._frame.assistant_turn(assistant)


def label_token_ids(tokenizer: PreTrainedTokenizerBase, label_strings: tuple[str, str]) -> tuple[int, int]:
    """Token ids of the two labels.

    Raises:
        ValueError: A label is not exactly one known token, or both are the same.
    """
    ids = []
    for label in label_strings:
        tokens = tokenizer.encode(label, add_special_tokens=False)
        if len(tokens) != 1 or tokens[0] == tokenizer.unk_token_id:
            raise ValueError(
                f"Label string {label!r} is {len(tokens)} token(s) {tokenizer.convert_ids_to_tokens(tokens)} "
                "for this tokenizer; it must be exactly one known token. Set `label_strings` to strings that "
                f"are, for example {label.strip()!r} with or without a leading space."
            )
        ids.append(tokens[0])
    if len(ids) != 2 or ids[0] == ids[1]:
        raise ValueError(
            f"`label_strings` is {label_strings!r}; it must be two strings with different token ids."
        )
    return ids[0], ids[1]


def _surely_cheap(prompt: str, answer_a: str, answer_b: str, max_length: int) -> bool:
    return len(prompt) + len(answer_a) + len(answer_b) <= 32 * max_length


def _checked_structure(structure_length: int, max_length: int, overlong: Overlong) -> int:
    if overlong not in ("shorten", "drop"):
        raise ValueError(f"`overlong` is {overlong!r}; it must be 'shorten' or 'drop'.")
    if structure_length >= max_length:
        raise ValueError(
            f"`max_length` is {max_length}, but the prompt takes {structure_length} tokens before any text "
            f"is put in. Set it well above {structure_length}, or use a shorter template."
        )
    return structure_length
