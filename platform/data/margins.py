"""Margins by id: how much better the chosen answer of a pair is, in a file beside the pairs."""

from __future__ import annotations

from eagleray.platform.data.sources import DataError, SourceConfig, read_rows


def read_margins(source: SourceConfig) -> dict[str, float]:
    """Id -> margin of rows with these two columns.

    Raises:
        DataError: A row lacks one, an id comes twice, or rows are on different scales.
    """
    found: dict[str, float] = {}
    scales: set[str] = set()
    for row in read_rows(source):
        if isinstance(row, DataError):
            raise row
        name, margin = row.values.get("id"), row.values.get("margin")
        if not isinstance(name, str) or isinstance(margin, bool) or not isinstance(margin, int | float):
            raise DataError(
                row.where, "no label of a margin", "needed are `id` (text) and `margin` (a number)"
            )
        if name in found:
            raise DataError(row.where, "an id comes twice", name)
        found[name] = float(margin)
        scales.add(str(row.values.get("scale")))
    if len(scales) > 1:
        raise DataError(source.path, "margins are on different scales", ", ".join(sorted(scales)))
    return found
