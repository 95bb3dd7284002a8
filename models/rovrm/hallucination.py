"""Figures of three hallucination benchmarks, from answers, annotations and what a judge found in the answers.

| benchmark | what is judged | figures |
| --- | --- | --- |
| MMHal-Bench | each answer gets a rating of 0 to 6 | mean rating, share below 3 (hallucination), by question type |
| Object HalBench | objects named in an answer against those of COCO | CHAIR by answer and by mention, recall |
| AMBER, generative | objects named against `truth` and `hallu` of the picture | CHAIR, Cover, Hal, Cog |
| AMBER, yes or no | the answer against the truth | accuracy; precision, recall and F1 of "no" |

Definitions are those of the benchmarks' public evaluation programs. Those find objects with a part-of-speech tagger and
compare words by vectors of a language library; here words are looked up in the benchmark's own lists, so figures are to
be compared with figures from here only. All rates are shares, not percentages.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

_WORD = re.compile(r"[a-z]+(?:-[a-z]+)*")
_IRREGULAR = {
    "men": "man",
    "women": "woman",
    "children": "child",
    "people": "person",
    "feet": "foot",
    "mice": "mouse",
}
MMHAL_TEMPLATE = """Rate an answer about a picture that you cannot see; what it shows is listed.

Shown: {image_content}
Question: {question}
Reference answer: {gt_answer}
Answer to rate: {model_answer}

A statement that the list and the reference neither contain nor imply is a hallucination. Explain briefly, then end with
a line "Rating: N". N is 6 for an answer with good reasoning, 5 for a very informative, 4 for a somewhat informative, 3
for an uninformative one, all without hallucination; with hallucination it is 2 if very informative, 1 if somewhat, 0
if not."""
OBJECTS_TEMPLATE = """Question about a picture: {question}
Answer: {answer}

Which visible objects does the answer say are there? Reply with a JSON list of their names, without colours, materials or
numbers, such as ["dog", "fire hydrant"]; [] if there is none."""


class Vocabulary:
    """Names of objects; every word or pair of words belongs to one object."""

    def __init__(self, names: Mapping[str, str]) -> None:
        """Take the names.

        Args:
            names: Lower-case word or two words -> its object.
        """
        self.names = dict(names)

    @classmethod
    def from_synonyms(cls, lines: Iterable[str]) -> Vocabulary:
        """From lines such as `person, girl, boy`: the first name is the object."""
        names: dict[str, str] = {}
        for line in lines:
            first, *others = [name.strip().lower() for name in line.split(",") if name.strip()] or [""]
            names |= {name: first for name in (first, *others) if name}
        return cls(names)

    def mentions(self, text: str) -> list[tuple[str, str]]:
        """Names in a text with their objects, in order, two words before one.

        >>> Vocabulary({"dog": "dog", "puppy": "dog", "hot dog": "hot dog"}).mentions("Puppies eat a hot dog.")
        [('puppy', 'dog'), ('hot dog', 'hot dog')]
        """
        words = _WORD.findall(text.lower())
        found: list[tuple[str, str]] = []
        i = 0
        while i < len(words):
            pair = self._known(" ".join(words[i : i + 2])) if i + 1 < len(words) else None
            name = pair or self._known(words[i])
            if name is not None:
                found.append((name, self.names[name]))
            i += 2 if pair else 1
        return found

    def _known(self, word: str) -> str | None:
        return next((form for form in _singulars(word) if form in self.names), None)


def parse_rating(reply: str) -> int | None:
    """The rating in a judge's reply; None where there is none or several different ones.

    >>> parse_rating("No false claims. Rating: 4, somewhat informative")
    4
    """
    found = {int(digit) for digit in re.findall(r"rating:\s*([0-6])\b", reply.lower())}
    return found.pop() if len(found) == 1 else None


def mmhal_figures(ratings: Sequence[int | None], types: Sequence[str]) -> dict[str, Any]:
    """Figures of MMHal-Bench; an answer without a readable rating counts as 0, as in the official program.

    Args:
        ratings: Of each answer, 0 to 6.
        types: Question type of each.
    """
    scores_N = np.array([rating or 0 for rating in ratings], dtype=np.float64)
    hallucinates_N = scores_N < 3
    return {
        "answers": len(ratings),
        "score": float(scores_N.mean()),
        "hallucination_rate": float(hallucinates_N.mean()),
        "informativeness": float(np.where(hallucinates_N, scores_N, scores_N - 3).mean() / 3),
        "unreadable": sum(rating is None for rating in ratings),
        "score_by_type": {
            name: float(scores_N[[t == name for t in types]].mean()) for name in sorted(set(types))
        },
    }


def chair_figures(mentions: Sequence[Sequence[str]], truths: Sequence[set[str]]) -> dict[str, Any]:
    """CHAIR of answers (Object HalBench).

    Args:
        mentions: Objects that each answer names, repetitions included.
        truths: Objects in the picture of each answer.

    Returns:
        `chair_s`: share of answers with a wrong object; `chair_s_refined`: of those answers that name an object at all;
        `chair_i`: share of mentions that are wrong; `recall`: objects of the pictures that are named. None where a
        share has nothing to be of.
    """
    wrong = [sum(name not in truth for name in named) for named, truth in zip(mentions, truths, strict=True)]
    named_any = sum(bool(named) for named in mentions)
    right = sum(len(set(named) & truth) for named, truth in zip(mentions, truths, strict=True))
    return {
        "answers": len(mentions),
        "answers_with_objects": named_any,
        "chair_s": _share(sum(map(bool, wrong)), len(mentions)),
        "chair_s_refined": _share(sum(map(bool, wrong)), named_any),
        "chair_i": _share(sum(wrong), sum(map(len, mentions))),
        "recall": _share(right, sum(map(len, truths))),
    }


def amber_generative_figures(
    answers: Mapping[int, str],
    annotations: Mapping[int, Mapping[str, Any]],
    association: Mapping[str, Sequence[str]],
    safe_words: Iterable[str] = (),
) -> dict[str, Any]:
    """CHAIR, Cover, Hal and Cog of AMBER's descriptions.

    Args:
        answers: Description by id.
        annotations: By id, with the objects in the picture (`truth`) and those that models like to add (`hallu`).
        association: Object -> other words for it or for parts of it (`relation.json`).
        safe_words: Words that are never wrong.
    """
    words = {word for key, others in association.items() for word in (key, *others)}
    vocabulary = Vocabulary({word.lower(): word.lower() for word in words})
    safe = {word.strip().lower() for word in safe_words}
    wrong = named = covered = truths = tempted = tempting = hallucinating = 0
    for identity, answer in answers.items():
        truth, hallu = annotations[identity]["truth"], annotations[identity]["hallu"]
        names = [name for name, _ in vocabulary.mentions(answer)]
        of_truth, of_hallu = ([_means(word, association) for word in part] for part in (truth, hallu))
        known = safe.union(*of_truth)
        false = [name for name in names if name not in known]
        wrong, named = wrong + len(false), named + len(names)
        hallucinating += bool(false)
        covered, truths = covered + _covered(names, of_truth), truths + len(truth)
        tempted, tempting = tempted + _covered(false, of_hallu), tempting + len(hallu)
    return {
        "answers": len(answers),
        "chair": _share(wrong, named),
        "cover": _share(covered, truths),
        "hal": _share(hallucinating, len(answers)),
        "cog": _share(tempted, tempting),
    }


def amber_discriminative_figures(
    answers: Mapping[int, str], annotations: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any]:
    """AMBER's yes-or-no questions, overall and by dimension; precision, recall and F1 are those of "no"."""
    rows = [
        (
            _DIMENSIONS.get(str(annotations[i]["type"]), "relation"),
            str(annotations[i]["truth"]).lower(),
            _verdict(text),
        )
        for i, text in answers.items()
    ]
    parts = {"all": rows} | {name: [r for r in rows if r[0] == name] for name in sorted({r[0] for r in rows})}
    return {name: _yes_no([row[1:] for row in part]) for name, part in parts.items()}


_DIMENSIONS = {
    "discriminative-hallucination": "existence",
    "discriminative-attribute-state": "attribute",
    "discriminative-attribute-number": "attribute",
    "discriminative-attribute-action": "attribute",
}


def _yes_no(rows: Sequence[tuple[str, str | None]]) -> dict[str, Any]:
    said_no = sum(said == "no" for _, said in rows)
    is_no = sum(truth == "no" for truth, _ in rows)
    both = sum(truth == said == "no" for truth, said in rows)
    precision, recall = _share(both, said_no), _share(both, is_no)
    total = (precision or 0.0) + (recall or 0.0)
    return {
        "questions": len(rows),
        "accuracy": _share(sum(truth == said for truth, said in rows), len(rows)),
        "precision": precision,
        "recall": recall,
        "f1": 2 * (precision or 0.0) * (recall or 0.0) / total if total else 0.0,
        "unreadable": sum(said is None for _, said in rows),
    }


def _verdict(text: str) -> str | None:
    first = _WORD.findall(text.lower())[:1]
    return first[0] if first and first[0] in ("yes", "no") else None


def _means(word: str, association: Mapping[str, Sequence[str]]) -> set[str]:
    return {word.lower(), *(other.lower() for other in association.get(word, ()))}


def _covered(names: Sequence[str], objects: Sequence[set[str]]) -> int:
    """How many of the objects are named; a word counts for the first object that it can mean."""
    firsts = (next((i for i, means in enumerate(objects) if name in means), None) for name in names)
    return len({i for i in firsts if i is not None})


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _singulars(word: str) -> list[str]:
    """The word, then what it may be the plural of."""
    head, _, last = word.rpartition(" ")
    forms = [last, _IRREGULAR.get(last, last)]
    if last.endswith("ies"):
        forms.append(last[:-3] + "y")
    if last.endswith("ves"):
        forms += [last[:-3] + "f", last[:-3] + "fe"]
    if last.endswith("es"):
        forms.append(last[:-2])
    if last.endswith("s") and not last.endswith("ss"):
        forms.append(last[:-1])
    return [f"{head} {form}".strip() for form in forms]
