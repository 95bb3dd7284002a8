"""Which layers share: a list of one's own, the least harmful by the probe, or every layer but each k-th.

The paper's layer sets are not known to us; it names the share of layers (53 % to 84 %) and says that shallow layers
are fragile, so layers 0 and 1 stay full unless a list of one's own says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

PREFIX = 2
"""Layers at the bottom that stay full."""


def greedy_layers(
    rise: Mapping[int, float],
    count: int,
    *,
    kinds: Sequence[str] | None = None,
    max_chain: int | None = None,
    prefix: int = PREFIX,
) -> tuple[int, ...]:
    """The `count` layers whose sharing hurts least.

    Args:
        rise: Layer -> rise of the loss, from `probe.probe_sharing`.
        count: How many layers share.
        kinds: Mask of each layer (`config.layer_kinds`); a layer shares only with one of the same kind.
        max_chain: Longest run of sharing layers; default: no limit.
        prefix: Layers at the bottom that stay full.

    Raises:
        ValueError: There are not that many layers that can share.
    """
    chosen: set[int] = set()
    for i in sorted(rise, key=lambda layer: (rise[layer], -layer)):
        compatible = i >= max(1, prefix) and (kinds is None or kinds[i] == kinds[i - 1])
        if len(chosen) < count and compatible and _run(chosen | {i}, i) <= (max_chain or len(rise) + 1):
            chosen.add(i)
    if len(chosen) < count or count < 1:
        raise ValueError(
            f"`count` is {count}; {len(chosen)} layers were found that can share with the layer below"
            f"{'' if max_chain is None else f', in runs of at most {max_chain}'}. Choose 1 to {max(1, len(chosen))}."
        )
    return tuple(sorted(chosen))


def periodic_layers(layers: int, *, every: int, prefix: int = PREFIX) -> tuple[int, ...]:
    """All layers but a full prefix and, from its end on, every `every`-th.

    >>> periodic_layers(8, every=3)
    (3, 4, 6, 7)
    """
    if every < 2 or prefix < 1:
        raise ValueError(f"`every` is {every} and `prefix` {prefix}; they must be at least 2 and 1.")
    return tuple(i for i in range(prefix, layers) if (i - prefix) % every)


def layer_count(layers: int, share: float) -> int:
    """Number of layers nearest to a share of them; 0.53 and 0.84 are the ends of the paper's range.

    >>> layer_count(32, 0.53), layer_count(32, 0.84)
    (17, 27)
    """
    if not 0 < share < 1:
        raise ValueError(f"`share` is {share}; it must lie between 0 and 1.")
    return max(1, round(layers * share))


def _run(chosen: set[int], layer: int) -> int:
    """Length of the run of chosen layers around one of them."""
    low = high = layer
    while low - 1 in chosen:
        low -= 1
    while high + 1 in chosen:
        high += 1
    return high - low + 1
