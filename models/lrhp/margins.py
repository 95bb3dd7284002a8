"""Margins of preference pairs, predicted from representations (spec 6): ridge in closed form, and a small MLP.

Shapes: N pairs, D features, F folds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

ALPHAS = tuple(10.0**k for k in range(-3, 5))
PREDICTOR_FILE, WEIGHTS_FILE = "margin.json", "margin.safetensors"
Kind = Literal["ridge", "mlp"]
_SHOWN = 5


def margin_labels(
    ids: Sequence[str], margins_N: np.ndarray, *, max_gap: float
) -> tuple[np.ndarray, np.ndarray]:
    """Margins as shares of the largest attainable gap, and which pairs keep theirs.

    A negative margin says that label and rating disagree, and is dropped; zero stays.

    Returns:
        Labels in [0, 1] of the pairs that are kept, and their rows.

    Raises:
        ValueError: A margin is not finite or larger than `max_gap`.
    """
    wrong = [i for i, m in enumerate(margins_N) if not np.isfinite(m) or m > max_gap * (1 + 1e-9)]
    if wrong:
        shown = ", ".join(f"{ids[i]} ({margins_N[i]:g})" for i in wrong[:_SHOWN])
        raise ValueError(
            f"{len(wrong)} margins are not numbers up to `max_gap` = {max_gap:g}: {shown}. `max_gap` is the largest "
            "difference that two ratings can have, e.g. 9 on a scale from 1 to 10."
        )
    rows = np.flatnonzero(margins_N >= 0)
    return np.minimum(margins_N[rows] / max_gap, 1.0), rows


def ridge(x_ND: np.ndarray, y_N: np.ndarray, alpha: float) -> tuple[np.ndarray, float]:
    """Weights [D] and unpenalised intercept of min ‖y − Xw − b‖² + α‖w‖², in float64.

    With α = 0 and more features than rows, the solution of least norm.
    """
    return _RidgePath(x_ND, y_N).at(alpha)


class _RidgePath:
    """One decomposition of centred data, from which every α is cheap."""

    def __init__(self, x_ND: np.ndarray, y_N: np.ndarray) -> None:
        x_ND = x_ND.astype(np.float64)
        self.mean_D, self.mean = x_ND.mean(0), float(y_N.mean())
        u_NK, self.s_K, self.vt_KD = np.linalg.svd(x_ND - self.mean_D, full_matrices=False)
        self.uy_K = u_NK.T @ (y_N - self.mean)
        # Directions that the data does not have: rounding must not be divided by rounding.
        self.real_K = self.s_K > self.s_K.max(initial=0.0) * max(x_ND.shape) * np.finfo(float).eps

    def at(self, alpha: float) -> tuple[np.ndarray, float]:
        gain_K = np.zeros_like(self.s_K)
        s_K = self.s_K[self.real_K]
        gain_K[self.real_K] = s_K / (s_K**2 + alpha)
        w_D = self.vt_KD.T @ (gain_K * self.uy_K)
        return w_D, self.mean - float(self.mean_D @ w_D)


def choose_alpha(
    x_ND: np.ndarray, y_N: np.ndarray, *, alphas: Sequence[float] = ALPHAS, folds: int = 5, seed: int = 0
) -> float:
    """The α of least squared error over the folds of a seeded cross-validation; the larger one of equals."""
    folds = min(folds, len(y_N))
    if folds < 2:
        raise ValueError(f"There are {len(y_N)} labelled pairs; cross-validation needs at least 2.")
    fold_N = np.random.default_rng(seed).permutation(len(y_N)) % folds
    errors = np.zeros(len(alphas))
    for fold in range(folds):
        inside = fold_N != fold
        path = _RidgePath(x_ND[inside], y_N[inside])
        for k, alpha in enumerate(alphas):
            w_D, b = path.at(alpha)
            errors[k] += np.square(x_ND[~inside] @ w_D + b - y_N[~inside]).sum()
    return max(alpha for alpha, error in zip(alphas, errors, strict=True) if error <= errors.min())


@dataclass(frozen=True)
class MarginPredictor:
    """Features, standardised, through a linear map or an MLP; saved as `margin.json` and `margin.safetensors`."""

    kind: Kind
    mean_D: np.ndarray
    scale_D: np.ndarray
    weights: dict[str, Tensor]
    """ridge: `w` [D] and `b` []; mlp: the state of its layers."""
    about: dict[str, Any]
    """What it was fitted on: `model_hash` and `order` of the representations, `max_gap`, number of pairs."""

    def predict(self, x_ND: np.ndarray) -> np.ndarray:
        """Predicted margins [N], float64; a line may leave [0, 1]."""
        x_ND = (x_ND.astype(np.float64) - self.mean_D) / self.scale_D
        if self.kind == "ridge":
            return x_ND @ self.weights["w"].numpy() + self.weights["b"].item()
        network = _network(x_ND.shape[1], self.weights["0.weight"].shape[0], dropout=0.0)
        network.load_state_dict(self.weights)
        with torch.inference_mode():
            return network(torch.from_numpy(x_ND).float())[:, 0].double().numpy()

    def save(self, folder: str | Path) -> None:
        """Write into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"mean": torch.from_numpy(self.mean_D), "scale": torch.from_numpy(self.scale_D)}
        save_file(
            tensors | {f"weights.{k}": v.contiguous() for k, v in self.weights.items()}, folder / WEIGHTS_FILE
        )
        text = json.dumps({"version": 1, "kind": self.kind, **self.about}, indent=2)
        (folder / PREDICTOR_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> MarginPredictor:
        """Read what `save` wrote.

        Raises:
            ValueError: There is no predictor in the folder.
        """
        file = Path(folder) / PREDICTOR_FILE
        if not file.is_file():
            raise ValueError(
                f"{folder}: no {PREDICTOR_FILE}; give the `predictor` folder of a `lrhp.margin` run."
            )
        about = json.loads(file.read_text(encoding="utf-8"))
        if about.pop("version") != 1:
            raise ValueError(f"{file}: a version of predictors that this program does not know.")
        tensors = load_file(Path(folder) / WEIGHTS_FILE)
        weights = {k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")}
        return cls(about.pop("kind"), tensors["mean"].numpy(), tensors["scale"].numpy(), weights, about)


def fit_ridge(
    x_ND: np.ndarray,
    y_N: np.ndarray,
    *,
    alphas: Sequence[float] = ALPHAS,
    folds: int = 5,
    seed: int = 0,
    about: dict[str, Any] | None = None,
) -> MarginPredictor:
    """Ridge on standardised features, with α by cross-validation."""
    mean_D, scale_D = _standard(x_ND)
    x_ND = (x_ND.astype(np.float64) - mean_D) / scale_D
    alpha = choose_alpha(x_ND, y_N, alphas=alphas, folds=folds, seed=seed)
    w_D, b = ridge(x_ND, y_N, alpha)
    weights = {"w": torch.from_numpy(w_D), "b": torch.tensor(b, dtype=torch.float64)}
    return MarginPredictor("ridge", mean_D, scale_D, weights, {"alpha": alpha, **(about or {})})


def fit_mlp(
    x_ND: np.ndarray,
    y_N: np.ndarray,
    *,
    hidden: int = 256,
    dropout: float = 0.1,
    epochs: int = 200,
    lr: float = 1e-3,
    batch_size: int = 128,
    seed: int = 0,
    about: dict[str, Any] | None = None,
) -> MarginPredictor:
    """D → hidden → 1 with ReLU, dropout and softplus at the end, squared error, Adam; depends on `seed` alone."""
    mean_D, scale_D = _standard(x_ND)
    x = torch.from_numpy((x_ND - mean_D) / scale_D).float()
    y = torch.from_numpy(y_N).float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _network(x.shape[1], hidden, dropout=dropout).train()
        optimizer = torch.optim.Adam(network.parameters(), lr=lr)
        for _ in range(epochs):
            for batch in torch.randperm(len(y)).split(batch_size):
                optimizer.zero_grad()
                (network(x[batch])[:, 0] - y[batch]).square().mean().backward()
                optimizer.step()
    weights = {name: value.detach() for name, value in network.state_dict().items()}
    return MarginPredictor("mlp", mean_D, scale_D, weights, about or {})


def _network(width: int, hidden: int, *, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, 1), nn.Softplus()
    )


def _standard(x_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of each feature; one that never changes keeps its scale."""
    scale_D = x_ND.std(0, dtype=np.float64)
    return x_ND.mean(0, dtype=np.float64), np.where(scale_D > 1e-12, scale_D, 1.0)
