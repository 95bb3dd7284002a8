"""What sharing costs in quality: perplexity of a small model, of LiSA and of direct sharing, on real text.

    python -m benchmarks.lisa_quality --texts 'data/lm_text/pg*.txt' --out runs/lisa_quality [--part main] [--seeds 0,1,2]

One process, CPU. With `--teacher FOLDER` a trained Llama is taken instead of a small one made here. The parts are `teacher` (trains a Llama of 13 layers, 4 heads of 24 numbers, on the texts), `main` (53 % and 84 % of the layers, a run for each seed), `ranks` (0 to the whole head, at 53 %),
`layers` (how many share) and `map` (which layers attend alike); each leaves a JSON file in the folder, and those that
are there are not made again. Training reads the first 95 % of each file, every figure is of the last 5 %. The
rank is the even number nearest to a sixth of a head. Phase A is layer-local, phase B end to end (docs/lisa.md).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Effort:
    """How much text is read."""

    block_length: int
    """Tokens of a block."""
    blocks: int
    """Of training text for phases A and B."""
    epochs: int
    """Passes of phase A; phase B takes one."""
    calibration: int
    """Blocks of it for the start of the alignment and the choice of layers."""
    held_out: int
    """Blocks of held-out text that perplexity is measured on."""
    batch: int
    """Blocks of one step."""


_SIZES = {
    "block_length": (128, "tokens of a block"),
    "blocks": (600, "blocks of training text"),
    "epochs": (2, "passes of phase A over them"),
    "calibration": (32, "blocks of them for the start and the choice of layers"),
    "held_out": (128, "blocks that perplexity is measured on"),
    "batch": (8, "blocks of a step"),
}
_QUICK = {"blocks": 8, "epochs": 1, "calibration": 2, "held_out": 8, "teacher_steps": 4, "seeds": "0"}


def main() -> None:
    """Make the parts that are asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", nargs="+", required=True, help="text files or patterns")
    parser.add_argument("--out", type=Path, required=True, help="folder for the teacher and the results")
    parser.add_argument("--teacher", type=Path, help="a trained Llama with its tokenizer")
    parser.add_argument("--part", nargs="+", default=["main", "ranks", "layers", "map"])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument(
        "--select", choices=["probe", "divergence"], default="probe", help="how layers are chosen"
    )
    for name, (default, what) in _SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=what)
    parser.add_argument("--phases", choices=["a", "ab"], default="ab", help="of the part `main`")
    parser.add_argument("--teacher-steps", type=int, default=300, help="of 4,096 tokens")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="shows that it runs; its numbers mean nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.quick:
        vars(options).update(_QUICK)
    effort = Effort(**{name: getattr(options, name) for name in _SIZES})
    options.out.mkdir(parents=True, exist_ok=True)
    teacher_path = options.teacher or options.out / "teacher"
    if not (teacher_path / "config.json").exists():
        train_teacher(options.texts, teacher_path, options.teacher_steps)
    study = Study(teacher_path, options.texts, effort, options.select, both=options.phases == "ab")
    seeds = [int(seed) for seed in options.seeds.split(",")]
    for part in options.part:
        if part != "teacher":
            getattr(study, part)(options.out, seeds)
    print(
        json.dumps({path.stem: json.loads(path.read_text()) for path in sorted(options.out.glob("*.json"))})
    )


def train_teacher(texts: Sequence[str], path: Path, steps: int) -> None:
    """A byte-level tokenizer of 4,096 tokens and a Llama of 1.8 million weights, AdamW with a cosine."""
    from eagleray.models.backbone.model import build_llama, llama_config
    from eagleray.models.backbone.tokenizer import train_tokenizer
    from eagleray.platform.data.text import TextData, iter_texts

    tokenizer = train_tokenizer(iter_texts(TextData(paths=list(texts)), "train"), vocab_size=4096)
    ids = _blocks(tokenizer, texts, "train", 128)
    sizes = {"width": 96, "layers": 13, "heads": 4, "max_length": 1024}
    model = build_llama(
        llama_config(vocab_size=len(tokenizer), eos_id=tokenizer.eos_token_id, **sizes), seed=0
    )
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    batches = [ids[order[(32 * i + torch.arange(32)) % len(ids)]] for i in range(steps)]
    started = time.time()

    def loss(step: int) -> Tensor:
        if step % 20 == 0:
            print(f"teacher: step {step} of {steps}, {time.time() - started:.0f} s", flush=True)
        return model(input_ids=batches[step], labels=batches[step], use_cache=False).loss

    _optimise(model, loss, steps, lr=4e-3)
    for part in (model, tokenizer):
        part.save_pretrained(path)


class Study:
    """A teacher, text, and what becomes of it."""

    def __init__(
        self, teacher: Path, texts: Sequence[str], effort: Effort, select: str, *, both: bool
    ) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.teacher: Any = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(teacher)
        self.effort, self.select, self.both = effort, select, both
        self.layers_count = self.teacher.config.num_hidden_layers
        train, held_out = (_blocks(tokenizer, texts, part, effort.block_length) for part in ("train", "dev"))
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(1))
        self.train = train[order[: effort.blocks]]
        # Blocks at equal distances, so that every file counts.
        self.held_out = list(held_out[torch.linspace(0, len(held_out) - 1, effort.held_out).long()].split(4))
        self.calibration = list(self.train[: effort.calibration].split(4))
        self._inputs: Tensor | None = None

    def main(self, out: Path, seeds: Sequence[int]) -> None:
        """53 % and 84 % of the layers: baselines, then LiSA as converted, after phase A and after phase B."""
        from eagleray.models.lisa.baselines import direct_sharing, permuted_direct_sharing

        self._write(out / "teacher.json", lambda: {"perplexity": self.perplexity(self.teacher)})
        for fraction in (0.53, 0.84):
            shared = self.shared_layers(self.count(fraction))
            name = f"main_{round(100 * fraction)}"

            def baselines(shared: tuple[int, ...] = shared) -> dict[str, Any]:
                permuted = permuted_direct_sharing(self.teacher, shared, self.similarity())
                direct = direct_sharing(self.teacher, shared)
                return {
                    "shared_layers": list(shared),
                    "direct_sharing": self.perplexity(direct),
                    "permuted_direct_sharing": self.perplexity(permuted),
                }

            self._write(out / f"{name}_baselines.json", baselines)
        for seed in seeds:
            for fraction in (0.53, 0.84):
                shared = self.shared_layers(self.count(fraction))
                path = out / f"main_{round(100 * fraction)}_seed{seed}.json"
                self._write(
                    path,
                    lambda shared=shared, seed=seed: self.lisa(shared, self.rank(), seed, both=self.both),
                )

    def ranks(self, out: Path, seeds: Sequence[int]) -> None:
        """From alignment alone to heads as large as the teacher's; phase A."""
        size = self.teacher.config.head_dim
        shared = self.shared_layers(self.count(0.53))
        for rank in sorted({2 * round(size * part / 2) for part in (0, 1 / 12, 1 / 6, 1 / 3, 1 / 2, 1)}):
            self._write(out / f"rank_{rank:02d}.json", lambda rank=rank: self.lisa(shared, rank, seeds[0]))

    def layers(self, out: Path, seeds: Sequence[int]) -> None:
        """How many layers share, at the same rank; phase A, with direct sharing beside it."""
        from eagleray.models.lisa.baselines import direct_sharing

        for fraction in (0.23, 0.38, 0.53, 0.69, 0.84):
            shared = self.shared_layers(self.count(fraction))

            def row(shared: tuple[int, ...] = shared) -> dict[str, Any]:
                found = self.lisa(shared, self.rank(), seeds[0])
                return found | {"direct_sharing": self.perplexity(direct_sharing(self.teacher, shared))}

            self._write(out / f"layers_{len(shared):02d}.json", row)

    def map(self, out: Path, seeds: Sequence[int]) -> None:
        """Divergence between all pairs of layers, and the rise of the loss when one layer shares."""
        from eagleray.models.lisa.plots import plot_sensitivity, plot_similarity
        from eagleray.models.lisa.probe import probe_sharing
        from eagleray.models.lisa.similarity import layer_similarity

        rows = [row for batch in self.held_out[:1] for row in batch]
        plot_similarity(layer_similarity(self.teacher, rows), out / "similarity.png")
        plain = probe_sharing(self.teacher, self.calibration)
        plot_sensitivity({"shared": plain, "shared, heads permuted": self.rise()}, out / "sensitivity.png")

    def lisa(self, shared: tuple[int, ...], rank: int, seed: int, *, both: bool = False) -> dict[str, Any]:
        """Convert and train; perplexities of held-out text at each stage."""
        from eagleray.models.lisa.accounting import added_parameters
        from eagleray.models.lisa.convert import Start, convert
        from eagleray.models.lisa.spec import LisaSpec

        started = time.time()
        spec = LisaSpec(shared_layers=shared, rank=rank)
        start = Start(low_rank="pairs" if rank else "zero_k", seed=seed)
        student = convert(self.teacher, spec, self.calibration, start=start)
        added = added_parameters(student.config, student.model.lisa)
        found: dict[str, Any] = {
            "shared_layers": list(shared),
            "rank": rank,
            "trained_share": added / self.teacher.num_parameters(),
            "converted": self.perplexity(student),
        }
        self._phase_a(student, seed)
        found["phase_a"] = self.perplexity(student)
        if both:
            self._phase_b(student, seed)
            found["phase_b"] = self.perplexity(student)
        return found | {"seconds": round(time.time() - started)}

    def _phase_a(self, student: Any, seed: int) -> None:
        from eagleray.models.lisa.distill import LayerDistiller, record_inputs

        distiller = LayerDistiller(self.teacher, student)
        every = range(self.layers_count)
        if self._inputs is None:  # once for all students
            self._inputs = torch.cat(
                [record_inputs(self.teacher, ids, layers=every).half() for ids in self.train.split(4)]
            )
        batches = _order(len(self.train), self.effort.epochs, self.effort.batch, seed)

        def loss(step: int) -> Tensor:
            assert self._inputs is not None
            inputs = self._inputs[batches[step]][:, list(distiller.layers)].float()
            return torch.stack(list(distiller(inputs).values())).sum()

        _optimise(distiller, loss, len(batches), lr=2e-3)

    def _phase_b(self, student: Any, seed: int) -> None:
        from eagleray.models.lisa.attention_loss import recording_scores, teach
        from eagleray.models.lisa.distill import set_trained
        from eagleray.models.lisa.losses import logit_distillation, next_token_loss

        set_trained(student, "lisa")
        batches = _order(len(self.train), 1, self.effort.batch, seed)

        def loss(step: int) -> Tensor:
            ids = self.train[batches[step]]
            rows = torch.ones_like(ids, dtype=torch.bool)
            with recording_scores(student) as scores:
                logits = student(input_ids=ids, use_cache=False).logits
            target, attention = teach(self.teacher, ids, scores, rows)
            distance = torch.stack(list(attention.values())).sum()
            return (
                next_token_loss(logits, ids, rows) + logit_distillation(target, logits, rows) + 0.1 * distance
            )

        _optimise(student, loss, len(batches), lr=1e-3)

    @torch.no_grad()
    def perplexity(self, model: Any) -> float:
        """Of the held-out blocks."""
        from eagleray.models.lisa.probe import token_loss

        return math.exp(token_loss(model.eval(), self.held_out))

    def shared_layers(self, count: int) -> tuple[int, ...]:
        """Those whose sharing alone hurts least, heads in the best order, or those most like the layer below."""
        from eagleray.models.lisa.selection import greedy_layers

        if self.select == "probe":
            return greedy_layers(self.rise(), count)
        alike = self.similarity().reduce("one_to_one")
        return greedy_layers({i: float(alike[i - 1, i]) for i in range(1, self.layers_count)}, count)

    def rise(self) -> dict[int, float]:
        """Layer -> rise of the loss when it alone shares."""
        from eagleray.models.lisa.probe import probe_sharing

        if not hasattr(self, "_rise"):
            orders = {
                i: self.similarity().permutation(i - 1, i).tolist() for i in range(1, self.layers_count)
            }
            self._rise = probe_sharing(self.teacher, self.calibration, permutations=orders)
        return self._rise

    def similarity(self) -> Any:
        """Divergence of neighbouring layers."""
        from eagleray.models.lisa.similarity import layer_similarity

        if not hasattr(self, "_similarity"):
            rows = list(self.train[: min(8, self.effort.calibration)])
            self._similarity = layer_similarity(self.teacher, rows, adjacent_only=True)
        return self._similarity

    def count(self, fraction: float) -> int:
        """Layers nearest to a share of them."""
        return round(fraction * self.layers_count)

    def rank(self) -> int:
        """The even rank nearest to a sixth of a head."""
        return 2 * round(self.teacher.config.head_dim / 12)

    def _write(self, path: Path, make: Any) -> None:
        if path.exists():
            return
        found = make()
        path.write_text(json.dumps(found, indent=1))
        print(path.stem, json.dumps(found), flush=True)


def _optimise(model: Any, loss: Any, steps: int, *, lr: float) -> None:
    """AdamW with a warm-up of 3 % (at least 5 steps) and a half cosine to zero."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    warmup = max(5, round(0.03 * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda i: min(
            (i + 1) / warmup, 0.5 * (1 + math.cos(math.pi * max(0, i - warmup) / max(1, steps - warmup)))
        ),
    )
    model.train()
    for step in range(steps):
        optimiser.zero_grad()
        loss(step).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
    model.eval()


def _order(count: int, epochs: int, batch: int, seed: int) -> list[Tensor]:
    """Batches of blocks, shuffled anew in each epoch."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(epochs)])
    return list(order.split(batch))


def _blocks(tokenizer: Any, texts: Sequence[str], part: Literal["train", "dev"], length: int) -> Tensor:
    from eagleray.jobs.lisa.sections import BlocksSection

    blocks = BlocksSection(paths=list(texts), block_length=length).blocks(tokenizer, part)
    return torch.from_numpy(blocks.astype("int64"))


if __name__ == "__main__":
    main()
