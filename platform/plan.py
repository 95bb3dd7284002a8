"""Will it fit, and how long will it take: arithmetic on a model's shape, without loading anything.

Memory of one GPU, by part, with b bytes a number (fp32: 4, bf16 and fp16: 2), P weights of which Q are trained,
N GPUs, L blocks of width D, MLP width F, and t tokens in a micro-batch:

- weights: bP; ZeRO-3 keeps 1/N of it and gathers up to 10⁹ weights at a time (`stage3_max_live_parameters`).
- gradients: bQ, from ZeRO-2 on 1/N of it.
- optimiser: two fp32 moments, 8Q; and an fp32 copy of the trained weights, 4Q, unless training is plain fp32 with
  ZeRO-0; ZeRO shards both. Offloaded, it lies in the node's memory.
- activations: what autograd keeps of a block for each token (counted below), L times; with checkpointing a block's
  input D, L times, and one block.
- logits: three tensors of the target positions in fp32 over the vocabulary (logits, log-probabilities, gradient).
- buffers: the reduction bucket of ZeRO, up to 5·10⁸ numbers.

The peak is not their sum: activations go as gradients come, so that without accumulation only the larger of both
counts. On a GPU some 1.5 GiB come on top (context, kernels' workspaces), and 8 % are left to fragmentation.

FLOPs: 2 a weight of the matrices and token forward, 2 backward for the inputs, 2 for trained weights, 2 more if
activations are recomputed; attention at its causal half. Time is these over the GPU's peak times `utilisation`,
plus what the network and the PCIe bus take, as if nothing overlapped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from eagleray.platform.sections import LoraSection, Precision

_BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2, "fp16": 2}
_LIVE_WEIGHTS, _BUCKET = 10**9, 5 * 10**8  # DeepSpeed's defaults
_RESERVED, _USABLE = 1.5 * 2**30, 0.92
_PCIE, _HOST_MEMORY = 25e9, 100e9  # bytes/s of one GPU's share


@dataclass(frozen=True)
class Gpu:
    """Vendor's figures: memory, dense bf16 FLOP/s, bytes/s to its neighbours in the node (one direction)."""

    memory: float
    flops: float
    link: float


GPUS = {
    "l4": Gpu(24e9, 121e12, 32e9),
    "l40s": Gpu(48e9, 362e12, 32e9),
    "a100-40": Gpu(40e9, 312e12, 300e9),
    "a100": Gpu(80e9, 312e12, 300e9),
    "h100": Gpu(80e9, 989e12, 450e9),
    "h200": Gpu(141e9, 989e12, 450e9),
}


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a Llama-style causal LM: gated MLP, RMS norms, rotary positions, no biases."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    vocab_size: int
    tied: bool

    @classmethod
    def from_config(cls, config: Any) -> ModelShape:
        """The shape that a transformers config describes (of a multimodal one, its language model's)."""
        config = config.get_text_config()
        heads = config.num_attention_heads
        return cls(
            width=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            mlp_width=config.intermediate_size,
            vocab_size=config.vocab_size,
            tied=config.tie_word_embeddings,
        )

    @property
    def block_matrices(self) -> int:
        """Weights of one block's linear layers."""
        attention = 2 * self.width * self.head_dim * (self.heads + self.kv_heads)
        return attention + 3 * self.width * self.mlp_width

    @property
    def parameters(self) -> int:
        """All weights."""
        embeddings = (1 if self.tied else 2) * self.vocab_size * self.width
        return embeddings + self.layers * (self.block_matrices + 2 * self.width) + self.width

    def lora_parameters(self, rank: int) -> int:
        """Weights of adapters on every linear layer of the blocks."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        ends = 2 * (self.width + query) + 2 * (self.width + key) + 3 * (self.width + self.mlp_width)
        return self.layers * rank * ends


@dataclass(frozen=True)
class Work:
    """One optimiser step of a run."""

    shape: ModelShape
    tokens: int
    """Tokens of one example (the longest)."""
    batch_size: int
    """Examples of the global batch."""
    logits: int
    """Target positions of one example: those whose logits over the vocabulary are made."""
    precision: Precision
    lora: LoraSection | None
    eager_attention: bool = False

    @property
    def trained(self) -> int:
        """Weights that get gradients."""
        return self.shape.lora_parameters(self.lora.rank) if self.lora else self.shape.parameters


@dataclass(frozen=True)
class Setting:
    """What can be chosen to make it fit."""

    zero_stage: Literal[0, 1, 2, 3] = 0
    offload_optimizer: bool = False
    offload_params: bool = False
    gradient_checkpointing: bool = False
    micro_batch: int = 1


@dataclass(frozen=True)
class Hardware:
    """The cluster."""

    nodes: int
    gpus_per_node: int
    gpu: Gpu
    network: float = 50e9
    """Bytes/s of one node's network (400 Gbit/s)."""
    storage: float = 2e9
    """Bytes/s of the shared storage."""
    utilisation: float = 0.4
    """Share of the peak FLOP/s that training reaches."""

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU, by part, and at the peak."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    buffers: float
    accumulates: bool
    host: float
    """Bytes of the node's memory for each GPU (offloaded parts)."""

    @property
    def peak(self) -> float:
        """What the tensors take at the worst moment of a step."""
        passing = self.activations + self.logits
        moving = passing + self.gradients if self.accumulates else max(passing, self.gradients)
        return self.weights + self.optimizer + self.buffers + moving

    def fits(self, gpu: Gpu) -> bool:
        """Whether a GPU holds it."""
        return self.peak + _RESERVED <= _USABLE * gpu.memory


@dataclass(frozen=True)
class Times:
    """Seconds and bytes of one step on each GPU, and of a checkpoint."""

    flops: float
    compute_s: float
    network_bytes: float
    network_s: float
    offload_s: float
    checkpoint_bytes: float
    checkpoint_s: float

    @property
    def step_s(self) -> float:
        """Seconds of a step if nothing overlaps."""
        return self.compute_s + self.network_s + self.offload_s


def estimate_memory(work: Work, setting: Setting, gpus: int) -> Memory:
    """Memory of one GPU as the module says."""
    shape, b, stage = work.shape, _BYTES[work.precision], setting.zero_stage
    parameters, trained = shape.parameters + (work.trained if work.lora else 0), work.trained
    shard = {k: gpus if stage >= k else 1 for k in (1, 2, 3)}
    gathered = min(parameters, _LIVE_WEIGHTS) * b if stage == 3 and gpus > 1 else 0
    weights = b * parameters / shard[3]
    masters = 0 if work.precision == "fp32" and stage == 0 else 4
    optimizer = (8 + masters) * trained / shard[1]
    tokens = work.tokens * setting.micro_batch
    block, layers = _block_bytes(work, b) * tokens, shape.layers
    if setting.gradient_checkpointing:
        # A frozen trunk's blocks are recomputed too; their inputs are the residual stream.
        activations = layers * b * shape.width * tokens + block
    else:
        activations = layers * block
    # The last norm and the embedded tokens, which every task has.
    activations += (4 + 2 * b) * shape.width * tokens
    # Buffers of the reduction exist even where there is nobody to reduce with.
    bucket = min(trained, _BUCKET) * b if stage in (1, 2) else 0
    on_host = (optimizer if setting.offload_optimizer else 0) + (weights if setting.offload_params else 0)
    return Memory(
        weights=(0 if setting.offload_params else weights) + gathered,
        gradients=b * trained / shard[2],
        optimizer=0 if setting.offload_optimizer else optimizer,
        activations=activations,
        logits=3 * 4 * work.logits * setting.micro_batch * shape.vocab_size,
        buffers=bucket,
        accumulates=work.batch_size > setting.micro_batch * gpus or stage > 0 or work.precision != "fp32",
        host=on_host,
    )


def estimate_times(work: Work, setting: Setting, hardware: Hardware) -> Times:
    """Times and volumes of one step as the module says."""
    shape, b, gpus = work.shape, _BYTES[work.precision], hardware.gpus
    examples = work.batch_size / gpus
    tokens = work.tokens * examples
    passes = 3 if work.lora is None else 2  # forward, inputs' gradients, weights' gradients
    again = 1 if setting.gradient_checkpointing else 0
    matrices = shape.layers * shape.block_matrices
    # Causal: on average half of the tokens are seen, by two products; their backward is two for each.
    attention = shape.layers * 2 * shape.heads * shape.head_dim * work.tokens * (3 + again)
    flops = tokens * (2 * matrices * (passes + again) + attention)
    flops += 6 * examples * work.logits * shape.vocab_size * shape.width
    if work.lora:
        flops += 6 * tokens * work.trained
    others = (gpus - 1) / gpus
    accumulation = math.ceil(examples / setting.micro_batch)
    if setting.zero_stage == 3:
        parts = (2 * shape.parameters + work.trained) * b * accumulation
    else:  # an all-reduce, or a reduce-scatter and an all-gather; ZeRO-2 reduces after every micro-batch
        parts = (1 + (accumulation if setting.zero_stage == 2 else 1)) * b * work.trained
    network = parts * others
    # In a ring, what one GPU sends crosses each node's network once.
    speed = hardware.gpu.link if hardware.nodes == 1 else min(hardware.gpu.link, hardware.network)
    offload = 0.0
    if setting.offload_optimizer:
        offload += (2 * b / _PCIE + 28 / _HOST_MEMORY) * work.trained / gpus
    if setting.offload_params:
        offload += 2 * accumulation * b * shape.parameters / gpus / _PCIE
    weights = b * shape.parameters + (12 if b == 2 or setting.zero_stage else 8) * work.trained
    return Times(
        flops=flops * gpus,
        compute_s=flops / (hardware.gpu.flops * hardware.utilisation * (1 if b == 2 else 0.5)),
        network_bytes=network,
        network_s=network / speed,
        offload_s=offload,
        checkpoint_bytes=weights,
        checkpoint_s=weights / hardware.storage,
    )


def cheapest_setting(work: Work, hardware: Hardware) -> Setting | None:
    """The setting with the shortest step among those that fit, the plainest of equals; `None` if none fits."""
    fitting = [
        s for s in _settings(work, hardware) if estimate_memory(work, s, hardware.gpus).fits(hardware.gpu)
    ]
    if not fitting:
        return None

    def cost(setting: Setting) -> tuple[float, ...]:
        step_s = estimate_times(work, setting, hardware).step_s
        return (round(step_s, 6), setting.zero_stage, setting.offload_optimizer, -setting.micro_batch)

    return min(fitting, key=cost)


def _settings(work: Work, hardware: Hardware) -> Iterator[Setting]:
    share = work.batch_size // hardware.gpus
    sizes = [size for size in range(1, share + 1) if share % size == 0 and size <= 64]
    offloads = {
        0: [(False, False)],
        1: [(False, False), (True, False)],
        3: [(False, False), (True, False), (True, True)],
    }
    offloads[2] = offloads[1]
    for stage in (0, 1, 2, 3):
        for optimizer, params in offloads[stage]:
            for again in (False, True):
                for size in sizes:
                    yield Setting(stage, optimizer, params, again, size)


def _block_bytes(work: Work, b: int) -> float:
    """What autograd keeps of one block for one token.

    Two norms: their input in fp32, the normalised values if the norm's weight is trained, their output (which the
    matrices keep). Attention: queries, keys, values, the output, and a log-sum a head. MLP: gate, its SiLU, the other
    branch, and their product.
    """
    shape = work.shape
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    norms = 2 * shape.width * (4 + b + (0 if work.lora else b))
    attention = b * (2 * query + 2 * key) + 4 * shape.heads
    if work.eager_attention:
        attention += (4 + b) * shape.heads * work.tokens
    adapters = b * 7 * work.lora.rank if work.lora else 0
    return norms + attention + b * 4 * shape.mlp_width + adapters
