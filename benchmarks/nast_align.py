"""Best CTC paths of a batch: our label-wise Viterbi against a plain loop and against torchaudio's C++ aligner.

    python -m benchmarks.nast_align [--quick] [--threads N]

Input: random log-probabilities of 10,000 tokens at 40 ms a frame, 6 s of speech (150 frames) and 25 target pieces a clip.
All sides get the same tensors; paths must be equal and scores agree to 1e-3.

- `over_loop`: clips a second, ours over the textbook recursion written as a Python loop over frames and states, batch 16.
- `over_torchaudio_b1`: time of ours over that of `torchaudio.functional.forced_align`, one clip. That function takes one
  clip at a time and runs on one thread.
- `over_torchaudio_b16`: clips a second, ours over torchaudio called once a clip, batch 16.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median

import torch
import torchaudio

from benchmarks.harness import Ratio, Side, finish, interleave, median_ratio, start
from eagleray.models.nast.alignment import align


@dataclass(frozen=True)
class Size:
    """One batch."""

    frames: int = 150
    labels: int = 25
    vocab_size: int = 10_000
    batch: int = 16


QUICK = Size(frames=20, labels=4, vocab_size=50, batch=3)


def build_aligner(
    *, kind: str, size: Size, clips: int, repeats: int
) -> Callable[[], tuple[float, list[list[int]], list[float]]]:
    """A round of one side: seconds of one call, labels and scores."""
    generator = torch.Generator().manual_seed(0)
    log_probs = torch.randn(clips, size.frames, size.vocab_size, generator=generator).log_softmax(-1)
    targets = torch.randint(1, size.vocab_size, (clips, size.labels), generator=generator)
    lengths, counts = torch.full((clips,), size.frames), torch.full((clips,), size.labels)
    narrow = targets.int()

    def ours() -> tuple[list[list[int]], list[float]]:
        found = align(log_probs, lengths, targets, counts)
        return found.labels_BS.tolist(), found.score_B.tolist()

    def loop() -> tuple[list[list[int]], list[float]]:
        found = [
            loop_align(rows.tolist(), row.tolist()) for rows, row in zip(log_probs, targets, strict=True)
        ]
        return [path for path, _ in found], [score for _, score in found]

    def library() -> tuple[list[list[int]], list[float]]:
        paths, scores = [], []
        for clip in range(clips):
            path, log_p = torchaudio.functional.forced_align(
                log_probs[clip : clip + 1], narrow[clip : clip + 1], blank=0
            )
            paths.append(path[0].tolist())
            scores.append(log_p.double().sum().item())
        return paths, scores

    function = {"ours": ours, "loop": loop, "torchaudio": library}[kind]

    def step() -> tuple[float, list[list[int]], list[float]]:
        paths, scores = function()
        started = time.perf_counter()
        for _ in range(repeats):
            function()
        return (time.perf_counter() - started) / repeats, paths, scores

    return step


def loop_align(log_probs: list[list[float]], target: list[int]) -> tuple[list[int], float]:
    """Textbook Viterbi over 2U + 1 states, one cell after another."""
    size = 2 * len(target) + 1
    extended = [target[s // 2] if s % 2 else 0 for s in range(size)]
    impossible = float("-inf")
    alpha = [log_probs[0][extended[s]] if s < 2 else impossible for s in range(size)]
    back: list[list[int]] = []
    for frame in log_probs[1:]:
        origins, new = [], []
        for s in range(size):
            origin, best = s, alpha[s]
            if s >= 1 and alpha[s - 1] > best:
                origin, best = s - 1, alpha[s - 1]
            if s % 2 and s >= 3 and extended[s] != extended[s - 2] and alpha[s - 2] > best:
                origin, best = s - 2, alpha[s - 2]
            origins.append(origin)
            new.append(best + frame[extended[s]])
        alpha = new
        back.append(origins)
    state = size - 2 if alpha[size - 2] >= alpha[size - 1] else size - 1
    score, path = alpha[state], [extended[state]]
    for origins in reversed(back):
        state = origins[state]
        path.append(extended[state])
    return path[::-1], score


def main() -> None:
    """Measure and print."""
    options, machine = start(__doc__ or "", use_gpu=False)
    size, rounds, repeats = (QUICK, 2, 1) if options.quick else (Size(), 15, 10)

    def side(kind: str, clips: int, calls: int) -> Side:
        return Side(build_aligner, threads=options.threads, kind=kind, size=size, clips=clips, repeats=calls)

    with (
        side("ours", 1, 4 * repeats) as ours_1,
        side("torchaudio", 1, 4 * repeats) as library_1,
        side("ours", size.batch, repeats) as ours_16,
        side("torchaudio", size.batch, repeats) as library_16,
        side("loop", size.batch, 1) as loop,
    ):
        sides = {
            "ours_b1": ours_1,
            "torchaudio_b1": library_1,
            "ours_b16": ours_16,
            "torchaudio_b16": library_16,
            "loop_b16": loop,
        }
        first = {name: readings[0] for name, readings in interleave(sides, rounds=1).items()}
        for name, other in (
            ("ours_b1", "torchaudio_b1"),
            ("ours_b16", "torchaudio_b16"),
            ("ours_b16", "loop_b16"),
        ):
            _check_equal(first[name], first[other], f"{name} and {other}")
        results = interleave(sides, rounds=rounds, seconds=150)
    seconds = {name: [reading[0] for reading in readings] for name, readings in results.items()}
    parts = {name: f"{median(values) * 1e3:.3g} ms" for name, values in seconds.items()}
    finish(
        "nast_align",
        [
            Ratio(
                "over_loop",
                "clips/s, ours over a Python loop, batch of clips",
                median_ratio(seconds["loop_b16"], seconds["ours_b16"]),
                20,
                "high",
                f"{parts['ours_b16']}, {parts['loop_b16']}",
            ),
            Ratio(
                "over_torchaudio_b1",
                "time, ours over torchaudio, one clip",
                median_ratio(seconds["ours_b1"], seconds["torchaudio_b1"]),
                3,
                "low",
                f"{parts['ours_b1']}, {parts['torchaudio_b1']}",
            ),
            Ratio(
                "over_torchaudio_b16",
                "clips/s, ours over torchaudio, batch of clips",
                median_ratio(seconds["torchaudio_b16"], seconds["ours_b16"]),
                1,
                "high",
                f"{parts['ours_b16']}, {parts['torchaudio_b16']}",
            ),
        ],
        machine=machine,
        quick=options.quick,
        size=asdict(size),
        rounds=len(seconds["ours_b1"]),
        seconds=seconds,
    )


def _check_equal(
    one: tuple[float, list[list[int]], list[float]],
    other: tuple[float, list[list[int]], list[float]],
    who: str,
) -> None:
    gap = max(abs(a - b) for a, b in zip(one[2], other[2], strict=True))
    if one[1] != other[1] or gap > 1e-3:
        raise AssertionError(f"{who} find different paths, or scores that differ by {gap}")


if __name__ == "__main__":
    main()
