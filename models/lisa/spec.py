"""What a shared layer is made of: every choice that the paper's text leaves open is one field of `LisaSpec`.

The specification travels inside the model config (key `lisa_attention`, a JSON object), so a checkpoint says how
it was made. Defaults are ours, not the paper's (docs/lisa.md has the list).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, Self, get_args

AlignKind = Literal["none", "identity", "linear", "ffn", "ffn_res", "linear+ffn", "glu"]
Activation = Literal["silu", "relu", "gelu"]
Source = Literal["prev", "anchor"]
Stage = Literal["scores", "weights"]
Rope = Literal["pairs", "scaled", "none"]
Role = Literal["plain", "producer", "relay", "terminal"]
ScoreDtype = Literal["auto", "float32", "model"]
RowCenter = Literal["none", "max", "mean"]

NO_HIDDEN_LAYER = ("none", "identity", "linear")
"""Kinds of alignment without a hidden layer."""


@dataclass(frozen=True)
class AlignSpec:
    """The head-alignment network f (section 5.1 of the paper: a feed-forward network over the head axis)."""

    kind: AlignKind = "linear+ffn"
    """`none`: f = 0, the low-rank branch stands alone. `identity`: direct sharing. The rest: see `alignment`."""
    width: int | None = None
    """Hidden units; default: the number of heads, half of it for `linear+ffn` (equal arithmetic)."""
    act: Activation = "silu"
    """Non-linearity of the hidden layer."""
    bias: bool = True
    """Whether the feed-forward part has biases."""

    def __post_init__(self) -> None:
        if self.width is not None and (self.width < 1 or self.kind in NO_HIDDEN_LAYER):
            raise ValueError(
                f"`align.width` is {self.width} with `align.kind` {self.kind!r}; a width is at least 1 "
                "and only kinds with a hidden layer (ffn, ffn_res, linear+ffn, glu) have one."
            )


@dataclass(frozen=True)
class LisaSpec:
    """Which layers share, and how."""

    shared_layers: tuple[int, ...] = ()
    """Layers that take their scores from below; layer 0 has nothing below it."""
    source: Source = "prev"
    """`prev`: the preceding layer, itself shared or not (a chain). `anchor`: the nearest full layer below."""
    stage: Stage = "scores"
    """Hand on scores before the softmax, or attention weights after it (a baseline; needs rank 0)."""
    rank: int | tuple[int, ...] = 20
    """Size of a low-rank query or key head, for all shared layers or one each; 0: no low-rank branch."""
    key_heads: int | None = None
    """Low-rank key heads; default: the KV heads of the model."""
    align: AlignSpec = field(default_factory=AlignSpec)
    rope: Rope = "pairs"
    """Rotary code of the low-rank heads: chosen pairs of the model's, one of their own size, or none."""
    rope_pairs: tuple[tuple[tuple[int, ...], ...], ...] | None = None
    """Rotary pairs of every shared layer and key head (`pairs`); default: spread evenly over the frequencies."""
    scale: float | None = None
    """Factor of the low-rank scores; default: 1/sqrt(head size) for `pairs`, else 1/sqrt(rank)."""
    score_dtype: ScoreDtype = "auto"
    """Precision in which scores travel; `auto`: at least float32 for one query, else the model's."""
    row_center: RowCenter = "none"
    """Statistic over the visible keys that f does not get to see."""
    score_budget: int = 64
    """Mebibytes of one layer's scores; a longer prompt with a cache is taken in pieces (0: never)."""
    base_checksum: str | None = None
    """Of the weights that conversion left alone; `delta` checks it."""

    def __post_init__(self) -> None:
        _check_choices(
            self, source=Source, stage=Stage, rope=Rope, score_dtype=ScoreDtype, row_center=RowCenter
        )
        _check_choices(self.align, kind=AlignKind, act=Activation)
        if self.score_budget < 0:
            raise ValueError(
                f"`score_budget` is {self.score_budget}; it is a size in MiB, or 0 for no limit."
            )
        layers = self.shared_layers
        if list(layers) != sorted(set(layers)):
            raise ValueError(f"`shared_layers` is {list(layers)}; list each layer once, in ascending order.")
        if layers and layers[0] < 1:
            raise ValueError(
                f"`shared_layers` holds layer {layers[0]}; layers start at 0, and layer 0 has no layer below it "
                "whose scores it could share. Begin at 1 or higher."
            )
        if isinstance(self.rank, tuple) and len(self.rank) != len(layers):
            raise ValueError(
                f"`rank` lists {len(self.rank)} values for {len(layers)} shared layers; give one each."
            )
        for rank in self.ranks:
            self._check_rank(rank)

    def _check_rank(self, rank: int) -> None:
        if rank < 0:
            raise ValueError(f"`rank` is {rank}; it must be 0 or more.")
        if rank % 2 and self.rope != "none":
            raise ValueError(
                f"`rank` is {rank}, an odd number, and `rope` is {self.rope!r}; rotary codes turn pairs of "
                "numbers. Use an even rank or `rope: none`."
            )
        if rank and self.stage == "weights":
            raise ValueError(
                f"`rank` is {rank} with `stage: weights`; a difference of scores can't be added to attention "
                "weights. Set `rank: 0`, or `stage: scores`."
            )

    @property
    def ranks(self) -> tuple[int, ...]:
        """Rank of each shared layer."""
        return self.rank if isinstance(self.rank, tuple) else (self.rank,) * len(self.shared_layers)

    def rank_of(self, layer: int) -> int:
        """Rank of one shared layer."""
        return self.ranks[self.shared_layers.index(layer)]

    def width(self, heads: int) -> int:
        """Hidden units of f; 0 if it has no hidden layer."""
        kind, width = self.align.kind, self.align.width
        if kind in NO_HIDDEN_LAYER:
            return 0
        return width if width is not None else max(1, heads // 2) if kind == "linear+ffn" else heads

    def roles(self, layers: int) -> tuple[Role, ...]:
        """What each layer of the model does with scores.

        >>> LisaSpec(shared_layers=(2, 3)).roles(5)
        ('plain', 'producer', 'relay', 'terminal', 'plain')
        """
        shared = set(self.shared_layers)
        full: dict[bool, Role] = {True: "producer", False: "plain"}
        sharing: dict[bool, Role] = {True: "relay", False: "terminal"}
        return tuple((sharing if i in shared else full)[i + 1 in shared] for i in range(layers))

    def chains(self, layers: int) -> tuple[tuple[int, int], ...]:
        """Runs of layers [first, last] that scores connect; a plain layer is a run of one.

        >>> LisaSpec(shared_layers=(2, 3)).chains(5)
        ((0, 0), (1, 3), (4, 4))
        """
        shared = set(self.shared_layers)
        starts = [i for i in range(layers) if i not in shared]
        return tuple((a, b - 1) for a, b in zip(starts, [*starts[1:], layers], strict=True))

    def to_dict(self) -> dict[str, Any]:
        """A JSON object; `from_dict` reads it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`; lists may stand for tuples.

        Raises:
            ValueError: An unknown key, or values that do not fit together.
        """
        unknown = set(values) - {f.name for f in fields(cls)}
        align = dict(values.get("align") or {})
        unknown |= {f"align.{key}" for key in set(align) - {f.name for f in fields(AlignSpec)}}
        if unknown:
            raise ValueError(
                f"`lisa_attention` has unknown keys {sorted(unknown)}; the keys are "
                f"{', '.join(f.name for f in fields(cls))}, and below `align` "
                f"{', '.join(f.name for f in fields(AlignSpec))}."
            )
        plain: dict[str, Any] = {key: _tuples(value) for key, value in values.items() if key != "align"}
        return cls(**plain, align=AlignSpec(**align))

    def resolved(self, *, layers: int, heads: int, kv_heads: int, head_dim: int) -> Self:
        """The same with every default that depends on the model filled in, checked against its sizes.

        Raises:
            ValueError: The specification does not fit the model.
        """
        key_heads = kv_heads if self.key_heads is None else self.key_heads
        if self.shared_layers and self.shared_layers[-1] >= layers:
            raise ValueError(
                f"`shared_layers` holds layer {self.shared_layers[-1]}; the model has layers 0 to {layers - 1}."
            )
        if key_heads < 1 or heads % key_heads:
            raise ValueError(
                f"`key_heads` is {key_heads}; it must divide the {heads} query heads of the model."
            )
        if self.rope == "pairs" and max(self.ranks, default=0) > head_dim:
            raise ValueError(
                f"`rank` is {max(self.ranks)} with `rope: pairs`; a head of the model has {head_dim} numbers, so the "
                f"rank is at most {head_dim}."
            )
        pairs = None
        if self.rope == "pairs":
            pairs = self.rope_pairs or tuple(
                (_spread(rank // 2, head_dim // 2),) * key_heads for rank in self.ranks
            )
            self._check_pairs(pairs, key_heads, head_dim // 2)
        return replace(self, key_heads=key_heads, rope_pairs=pairs)

    def _check_pairs(self, pairs: Sequence[Sequence[Sequence[int]]], key_heads: int, available: int) -> None:
        expected = [[rank // 2] * key_heads for rank in self.ranks]
        if [[len(head) for head in layer] for layer in pairs] != expected:
            raise ValueError(
                "`rope_pairs` does not fit: it needs one list for each shared layer, in it one for each of the "
                f"{key_heads} key heads, in it rank / 2 pairs."
            )
        if any(
            len(set(head)) < len(head) or not set(head) <= set(range(available))
            for layer in pairs
            for head in layer
        ):
            raise ValueError(
                f"`rope_pairs` must hold different numbers from 0 to {available - 1} for every key head."
            )

    def scale_of(self, layer: int, head_dim: int) -> float:
        """Factor of the low-rank scores of a shared layer."""
        if self.scale is not None:
            return self.scale
        return (head_dim if self.rope == "pairs" else max(1, self.rank_of(layer))) ** -0.5


def _spread(count: int, available: int) -> tuple[int, ...]:
    """`count` of `available` numbers at equal distances: high and low frequencies alike."""
    return tuple((2 * i + 1) * available // (2 * count) for i in range(count))


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value


def _check_choices(owner: Any, **choices: Any) -> None:
    for name, literal in choices.items():
        if getattr(owner, name) not in get_args(literal):
            raise ValueError(
                f"`{name}` is {getattr(owner, name)!r}; it must be one of {', '.join(get_args(literal))}."
            )
