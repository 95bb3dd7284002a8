"""Rules that say how good an answer is without a model: gold scores for best-of-n and for watching a policy."""

from __future__ import annotations

import re
from decimal import Decimal

from eagleray.models.gram.synthetic import order_score

# A minus belongs to the number unless something to subtract from stands before it.
_NUMBER = re.compile(r"(?:(?<![\w.)])-)?\d[\d,]*(?:\.\d+)?")


def last_number(text: str) -> Decimal | None:
    """The last number of a text; commas between digits do not count.

    >>> last_number("She has 5-2=3 left, so $1,234.50."), last_number("none")
    (Decimal('1234.50'), None)
    """
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def same_last_number(answer: str, reference: str) -> float:
    """1 if an answer ends with the number that the reference ends with, else 0: the usual check of GSM8K.

    Raises:
        ValueError: The reference holds no number.

    >>> same_last_number("that makes 70.", "35 + 35 = 70 #### 70.0"), same_last_number("70 or 71", "#### 70")
    (1.0, 0.0)
    """
    wanted = last_number(reference)
    if wanted is None:
        raise ValueError(f"The reference {reference[:60]!r} holds no number to compare answers with.")
    return float(last_number(answer) == wanted)


CHECKS = {
    "steps_in_order": lambda answer, _: order_score(answer),
    "last_number": same_last_number,
}
"""Name -> an answer and its prompt's reference to a score in [0, 1]."""
