"""The error for speech data that cannot be used: an audio file, or a row of a manifest."""

from __future__ import annotations


class SpeechDataError(ValueError):
    """`<where>: <reason>: <detail>`; `where` is a file, or a file and a line.

    `reason` is the same text for every row with the same fault, so that faults can be counted by it; what differs
    from row to row is in `detail`.
    """

    def __init__(self, where: str, reason: str, detail: str = "") -> None:
        super().__init__(where, reason, detail)  # all arguments, so that the error survives pickling
        self.where, self.reason, self.detail = where, reason, detail

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}" + (f": {self.detail}" if self.detail else "")
