"""What sharing is compared with: direct sharing, direct sharing with permuted heads, and shared attention weights.

Direct sharing reuses scores as they are; it is reported to be lossless in training from scratch and not inside a
trained model. Shared attention weights (Shared Attention, arXiv 2407.12866) reuse them after the softmax, which is
the same function as long as nothing is aligned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eagleray.models.lisa.convert import Start, convert
from eagleray.models.lisa.similarity import Similarity
from eagleray.models.lisa.spec import AlignSpec, LisaSpec, Source

_AS_IT_IS = AlignSpec(kind="identity")


def direct_sharing(teacher: Any, layers: Sequence[int], *, source: Source = "prev") -> Any:
    """Layers use the scores of their source unchanged."""
    spec = LisaSpec(shared_layers=tuple(layers), source=source, rank=0, align=_AS_IT_IS)
    return convert(teacher, spec, start=Start(align="identity"))


def permuted_direct_sharing(teacher: Any, layers: Sequence[int], similarity: Similarity) -> Any:
    """Layers use the scores of the layer below with heads in the order of the best one-to-one assignment."""
    spec = LisaSpec(shared_layers=tuple(layers), rank=0, align=AlignSpec(kind="linear"))
    orders = {i: similarity.permutation(i - 1, i).tolist() for i in layers}
    return convert(teacher, spec, permutations=orders)


def shared_weights(teacher: Any, layers: Sequence[int], *, source: Source = "anchor") -> Any:
    """Layers use the attention weights of their source."""
    spec = LisaSpec(shared_layers=tuple(layers), source=source, stage="weights", rank=0, align=_AS_IT_IS)
    return convert(teacher, spec, start=Start(align="identity"))
