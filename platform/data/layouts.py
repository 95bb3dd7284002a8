"""How people write a prompt with two answers: plain text, message lists, hh-rlhf transcripts.

Pure functions from the values of a row to (prompt messages, first answer, second answer). They do not know
which answer is the better one, so labelled and unlabelled pairs share them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Message = dict[str, str]
"""One turn of a conversation: `role` (user, assistant, system, ...) and `content`."""

_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_ANSWER_TURN = "\n\nAssistant:"
_ROLES = {"Human": "user", "Assistant": "assistant"}


class RowProblem(ValueError):
    """A row that cannot be used; `reason` is the same for all rows with this fault, `detail` is not."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class ParsedPair(NamedTuple):
    """A prompt as messages, and two answers to it."""

    prompt: list[Message]
    first: str
    second: str


def parse_pair(
    values: Mapping[str, Any],
    *,
    prompt: str | Sequence[str],
    first: str,
    second: str,
    transcripts: bool | None = None,
) -> ParsedPair:
    """Read a prompt and two answers from the named columns of a row.

    Args:
        values: The row.
        prompt: Column of the prompt; several are joined by a newline, blank ones left out. The column may be
            absent where both answers are conversations or transcripts, which then hold the prompt.
        first: Column of the first answer: text, or a list of messages that ends with the assistant's.
        second: Column of the second answer, in the same form.
        transcripts: Whether text is in hh-rlhf turns; `None` tells by the marks themselves.

    Raises:
        RowProblem: The row does not fit.
    """
    given = _prompt_value(values, [prompt] if isinstance(prompt, str) else prompt)
    name = prompt if isinstance(prompt, str) else "+".join(prompt)
    answers = (_present(values, first), _present(values, second))
    if isinstance(answers[0], list) or isinstance(answers[1], list):
        return _from_conversations(given, name, answers, (first, second))
    texts = (_text(answers[0], first), _text(answers[1], second))
    if transcripts is None:
        transcripts = _is_transcript(texts[0] if given is None else given)
    if transcripts:
        return _from_transcripts(given, name, texts, (first, second))
    return ParsedPair(_messages(_needed(given, name, values), name), *texts)


def readable(prompt: Sequence[Message]) -> str:
    """A prompt as one text: the content of a single user message, else a transcript with role names.

    >>> readable([{"role": "user", "content": "Hi"}])
    'Hi'
    >>> readable([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    'System: Be brief.\\n\\nUser: Hi'
    """
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in prompt)


def kind_of(value: Any) -> str:
    """What a value is, in the words of the person who wrote the file."""
    kinds = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "an object",
    }
    return "null" if value is None else kinds.get(type(value), f"a {type(value).__name__}")


def _prompt_value(values: Mapping[str, Any], columns: Sequence[str]) -> Any:
    """The prompt as written, `None` if it is absent; several columns are joined."""
    present = {column: values[column] for column in columns if values.get(column) is not None}
    if len(columns) == 1 or not present:
        return next(iter(present.values()), None)
    return "\n".join(text for column, value in present.items() if (text := _text(value, column)).strip())


def _present(values: Mapping[str, Any], column: str) -> Any:
    if column not in values:
        raise RowProblem(f"`{column}` is missing", _known(values))
    return values[column]


def _needed(prompt: Any, name: str, values: Mapping[str, Any]) -> Any:
    if prompt is None:
        hint = (
            "it may be left out only where both answers are message lists or transcripts that begin with it"
        )
        raise RowProblem(f"`{name}` is missing", f"{_known(values)}; {hint}")
    return prompt


def _known(values: Mapping[str, Any]) -> str:
    names = ", ".join(values) if values else "no fields"
    return f"the row has {names}; set `columns` if it goes by another name"


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RowProblem(f"`{name}` is {kind_of(value)}, not text")
    return value


def _messages(value: Any, name: str) -> list[Message]:
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise RowProblem(f"`{name}` is {kind_of(value)}, not text or a list of messages")
    if not value:
        raise RowProblem(f"`{name}` is empty")
    messages = []
    for message in value:
        if not isinstance(message, dict):
            raise RowProblem(
                f"`{name}` holds {kind_of(message)} in place of a message", "expected role and content"
            )
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            detail = f"`role` is {kind_of(role)}, `content` is {kind_of(content)}"
            raise RowProblem(f"`{name}` holds a message without a text `role` and `content`", detail)
        messages.append({"role": role, "content": content})
    return messages


def _from_conversations(
    prompt: Any, name: str, answers: tuple[Any, Any], names: tuple[str, str]
) -> ParsedPair:
    if not (isinstance(answers[0], list) and isinstance(answers[1], list)):
        kinds = [kind_of(answer) for answer in answers]
        raise RowProblem("one answer is a list of messages and the other is not", " and ".join(kinds))
    heads, texts = [], []
    for answer, column in zip(answers, names, strict=True):
        *head, last = _messages(answer, column)
        if last["role"] != "assistant":
            raise RowProblem(
                f"the last message of `{column}` is not the assistant's", f"its role is {last['role']!r}"
            )
        heads.append(head)
        texts.append(last["content"])
    if heads[0] != heads[1]:
        raise RowProblem("the conversations differ before the last message")
    before = heads[0]
    if prompt is None:
        if not before:
            raise RowProblem(
                f"`{name}` is missing", "the answers are single messages that do not begin with it"
            )
        return ParsedPair(before, *texts)
    asked = _messages(prompt, name)
    if before and before[-len(asked) :] != asked:
        raise RowProblem(f"the messages before the answer do not agree with `{name}`")
    return ParsedPair(before or asked, *texts)


def _from_transcripts(prompt: Any, name: str, texts: tuple[str, str], names: tuple[str, str]) -> ParsedPair:
    """hh-rlhf: two dialogues that part in the last Assistant turn, or that turn alone beside a `prompt`."""
    if prompt is None:
        shared = _common_prefix(*texts)
        cut = shared.rfind(_ANSWER_TURN)
        if cut < 0:
            raise RowProblem(f"`{names[0]}` and `{names[1]}` do not begin with the same hh-rlhf turns")
        cut += len(_ANSWER_TURN)
        asked, answers = shared[:cut], [text[cut:] for text in texts]
        if any(_TURN.search(answer.lstrip()) for answer in answers):
            raise RowProblem("the dialogues differ before the last turn")
    else:
        asked = _text(prompt, name)
        repeated = all(text.startswith(asked) for text in texts)
        answers = [text.removeprefix(asked) if repeated else text for text in texts]
        answers = [answer.removeprefix(_ANSWER_TURN) for answer in answers]
    return ParsedPair(_turns(asked, name), answers[0].strip(), answers[1].strip())


def _common_prefix(first: str, second: str) -> str:
    pairs = enumerate(zip(first, second, strict=False))
    return first[: next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))]


def _is_transcript(text: Any) -> bool:
    return isinstance(text, str) and text.lstrip().startswith("Human:") and _ANSWER_TURN in text


def _turns(transcript: str, name: str) -> list[Message]:
    before, *pieces = _TURN.split(transcript)
    if not pieces or before.strip():
        raise RowProblem(f"`{name}` is not in hh-rlhf turns", r"expected \n\nHuman: ... \n\nAssistant: ...")
    roles, contents = pieces[::2], [content.strip() for content in pieces[1::2]]
    messages = [{"role": _ROLES[role], "content": text} for role, text in zip(roles, contents, strict=True)]
    if messages[-1] == {"role": "assistant", "content": ""}:  # the turn that the answers fill
        messages.pop()
    return messages
