"""Which layers of a model attend alike, and which bear sharing (sections 3 and 4 of the paper).

    python -m eagleray.jobs.lisa.analyze --config configs/lisa/analyze_tiny.yaml model.path=...

`report.json` holds the divergence of each layer from the one below, read in four ways, and the rise of the loss when
it shares; `lisa.convert` and `lisa.train` take it as `share.analysis`. Plots are beside it.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import Field
from transformers import AutoModelForCausalLM

from eagleray.jobs.lisa.sections import BlocksSection, as_texts
from eagleray.models.lisa.plots import plot_neighbours, plot_sensitivity, plot_similarity
from eagleray.models.lisa.probe import probe_noise, probe_sharing
from eagleray.models.lisa.similarity import Reduction, layer_similarity
from eagleray.platform.cpu import set_up_torch
from eagleray.platform.pretrained import load_pretrained, load_tokenizer
from eagleray.platform.runs import RunFolder
from eagleray.platform.sections import JobConfig, ModelSection

JOB = "lisa.analyze"


class Config(JobConfig):
    """Config of `lisa.analyze`."""

    job: Literal["lisa.analyze"] = JOB
    model: ModelSection
    data: BlocksSection
    similarity_blocks: int = Field(default=8, ge=1)
    """Blocks of development text for the divergence of layers."""
    probe_blocks: int = Field(default=64, ge=1)
    """Blocks of development text for the probes."""
    all_pairs: bool = False
    """Compare all pairs of layers, not only neighbours; the time grows with the square of the layers."""
    drop_first_key: bool = False
    """Leave the first key out, which may draw most of the attention."""
    noise: list[float] = Field(default=[0.1])
    """Noise on the scores of one layer, in their standard deviations; empty: no such probe."""


def main(cfg: Config) -> dict[str, Any]:
    """Measure, plot, report."""
    with RunFolder.create(JOB, cfg).recording() as run:
        set_up_torch()
        model = load_pretrained(AutoModelForCausalLM, cfg.model).eval()
        blocks = cfg.data.blocks(load_tokenizer(cfg.model), "dev")
        similarity = layer_similarity(
            model,
            [text for batch in as_texts(blocks, count=cfg.similarity_blocks) for text in batch],
            adjacent_only=not cfg.all_pairs,
            drop_first_key=cfg.drop_first_key,
        )
        layers = range(1, model.config.num_hidden_layers)
        orders = {i: similarity.permutation(i - 1, i).tolist() for i in layers}
        texts = as_texts(blocks, count=cfg.probe_blocks)
        probes = {
            "shared": probe_sharing(model, texts),
            "shared, heads permuted": probe_sharing(model, texts, permutations=orders),
        }
        noise = probe_noise(model, texts, sigmas=cfg.noise) if cfg.noise else {}
        report = {
            "layers": model.config.num_hidden_layers,
            "rise": probes["shared, heads permuted"],
            "rise_raw": probes["shared"],
            "noise": noise,
            "divergence": {
                how: {i: float(similarity.reduce(how)[i - 1, i]) for i in layers}
                for how in get_args(Reduction)
            },
            "head_order": orders,
        }
        run.plots.mkdir(exist_ok=True)
        plot_neighbours(similarity, run.plots / "neighbours.png")
        plot_similarity(similarity, run.plots / "similarity.png")
        plot_sensitivity(probes, run.plots / "sensitivity.png")
        run.write_report(report)
    return report


if __name__ == "__main__":
    from eagleray.jobs.launch import run_job

    run_job(JOB)
