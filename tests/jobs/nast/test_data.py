"""Preparation of speech data: checks of a manifest, counts, vocabularies, the cache, and what the task makes of rows."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eagleray.jobs.experiment import Config as Experiment
from eagleray.jobs.experiment import plan
from eagleray.jobs.nast import data as nast_data
from eagleray.jobs.nast import train
from eagleray.jobs.nast.data import SpeechData, VocabularySection, prepare_examples
from eagleray.jobs.nast.distill import write_manifest
from eagleray.jobs.nast.evaluate import latency_figures
from eagleray.jobs.nast.train import SpeechTask
from eagleray.models.nast.audio import Clip, from_pcm, write_wav
from eagleray.models.nast.errors import SpeechDataError
from eagleray.models.nast.features import frame_count
from eagleray.models.nast.frontend import Frontend
from eagleray.models.nast.layouts import read_layout
from eagleray.models.nast.manifest import Utterance
from eagleray.models.nast.vocabulary import load_vocabularies
from eagleray.platform.config import ConfigError, load_config, validate_config
from eagleray.platform.data.examples import Examples
from eagleray.platform.engine import _schedule
from eagleray.platform.runs import RunFolder

CONFIGS = Path(__file__).parents[3] / "configs" / "nast"
WORDS = VocabularySection(size=40, kind="word")
CLEAN = Frontend()


def _corpus(folder: Path) -> SpeechData:
    """A manifest with every fault: two good rows, one too long for CTC, and five that cannot be used."""
    for name, seconds in {"a": 0.5, "b": 0.3, "frame": 0.025, "none": 0.0, "long": 3.0}.items():
        write_wav(folder / f"{name}.wav", np.random.default_rng(0).normal(0, 0.1, int(seconds * 16000)))
    (folder / "text.wav").write_text("no audio")
    rows = [
        ("a", "one two", "eins zwei"),
        ("b", "two", "zwei zwei zwei zwei"),
        ("a", "ONE, Two!", "zwei eins"),
    ]
    rows += [(name, "one", "eins") for name in ("frame", "none", "long", "text", "missing")]
    for split in ("train", "dev"):
        with (folder / f"{split}.tsv").open("w", newline="") as file:
            writer = csv.writer(file, delimiter="\t")
            writer.writerows([("audio", "src_text", "tgt_text"), *((f"{n}.wav", s, t) for n, s, t in rows)])
    sources = {"train": [{"path": "train.tsv"}], "eval": [{"path": "dev.tsv"}]}
    return SpeechData(root=str(folder), max_seconds=2, on_error="skip", **sources)  # type: ignore[arg-type]


def test_faults_are_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cfg = _corpus(tmp_path)
    with caplog.at_level(logging.WARNING):
        summary = prepare_examples(cfg, WORDS, CLEAN, tmp_path / "out", strides=(2, 2), seed=0)
    train_part = summary["train"]
    assert train_part["utterances"] == 3
    assert train_part["skipped"] == {
        "the audio is too short": 1,
        "the audio is empty": 1,
        "the audio is too long": 1,
        "not a readable audio file": 1,
        "there is no such audio file": 1,
    }
    # 0.3 s are 28 frames and 7 after subsampling: four times the same word needs exactly 7.
    assert train_part["infeasible_targets"] == 0
    tight = prepare_examples(cfg, WORDS, CLEAN, tmp_path / "tight", strides=(2, 2, 2), seed=0)
    assert tight["train"]["infeasible_targets"] == 1 and tight["eval"]["infeasible_targets"] == 1
    assert (
        "5 rows were left out: 1 x" in caplog.text
        and "1 of 3 targets of the train data are longer" in caplog.text
    )
    dropped = cfg.model_copy(update={"drop_infeasible": True})
    prepare_examples(dropped, WORDS, CLEAN, tmp_path / "dropped", strides=(2, 2, 2), seed=0)
    sizes = [len(Examples(tmp_path / "dropped" / f"{part}.arrow")) for part in ("train", "eval")]
    assert sizes == [2, 3]  # evaluation keeps what the model cannot say


def test_the_first_fault_stops_unless_told_otherwise(tmp_path: Path) -> None:
    cfg = _corpus(tmp_path).model_copy(update={"on_error": "raise"})
    with pytest.raises(
        SpeechDataError, match=r"train\.tsv:5: the audio is too short: .*`data\.on_error: skip`"
    ):
        cfg.read(cfg.train)
    with pytest.raises(SpeechDataError, match="no row can be used: 1 x the audio is too long"):
        too_short = cfg.model_copy(update={"on_error": "skip", "max_seconds": 0.1})
        too_short.usable(list(read_layout(tmp_path / "train.tsv"))[:1])


@pytest.mark.parametrize(
    ("style", "text"), [("raw", "ONE, Two!"), ("lower", "one, two!"), ("plain", "one two")]
)
def test_transcripts_can_be_simplified(tmp_path: Path, style: Any, text: str) -> None:
    cfg = _corpus(tmp_path).model_copy(update={"source_text": style})
    assert cfg.read(cfg.train).utterances[2].source == text


def test_separate_vocabularies(tmp_path: Path) -> None:
    separate = WORDS.model_copy(update={"joint": False})
    prepare_examples(_corpus(tmp_path), separate, CLEAN, tmp_path / "out", strides=(2, 2), seed=0)
    target, source = load_vocabularies(tmp_path / "out")
    assert 3 in target.encode("one") and 3 not in source.encode("one") and 3 in source.encode("eins")


def _task(folder: Path, *overrides: str) -> SpeechTask:
    cfg = load_config(train.Config, CONFIGS / "train_tiny.yaml", ["data.synthetic.utterances=8", *overrides])
    if not (folder / "train.arrow").exists():
        frontend = cfg.frontend.build()
        prepare_examples(cfg.data, cfg.vocabulary, frontend, folder, strides=(2, 2), seed=0)
    return SpeechTask(cfg, folder)


def test_a_batch_is_padded_and_weighed(tmp_path: Path) -> None:
    task = _task(tmp_path)
    batch = task.collate([task.train[0], task.train[1]])
    sizes = {name: tuple(tensor.shape) for name, tensor in batch.tensors.items()}
    assert sizes["features"] == (2, int(batch.tensors["lengths"].max()), 80)
    assert batch.weight == int(batch.tensors["target_lengths"].sum()) + 2  # one </s> each
    assert batch.tokens == int(batch.tensors["lengths"].sum())
    for row in range(2):
        count = int(batch.tensors["target_lengths"][row])
        ids = batch.tensors["target"][row]
        assert task.target.decode(ids[:count].tolist()) == task.train[row]["target"]
        assert (ids[count:] == 1).all()


@pytest.mark.parametrize("architecture", ["nast", "autoregressive"])
def test_loss_and_decoding_run_in_bf16(tmp_path: Path, architecture: str) -> None:
    """As DeepSpeed runs them: weights in bf16, features as they come."""
    task = _task(tmp_path, f"model.architecture={architecture}")
    torch.manual_seed(0)
    model, batch = task.build_model(), task.collate([task.train[i] for i in range(4)])
    whole, terms = task.loss(model.train(), batch.tensors)
    torch.manual_seed(0)
    half, _ = task.loss(task.build_model().bfloat16().train(), batch.tensors)
    half.backward()
    assert half.item() == pytest.approx(whole.item(), rel=0.05) and all(t.isfinite() for t in terms.values())
    assert len(task.evaluate_batch(model.bfloat16().eval(), batch.tensors)) == 4


def test_augmentation_follows_from_seed_step_and_utterance(tmp_path: Path) -> None:
    """An utterance sounds the same in any batch of a step, and different at another step."""
    task = _task(tmp_path)
    together, alone = task.train_batch([3, 5], step=7), task.train_batch([5], step=7)
    length = int(alone.tensors["lengths"][0])
    assert together.tensors["lengths"][1] == length
    assert torch.equal(together.tensors["features"][1, :length], alone.tensors["features"][0])
    steps = [task.train_batch([5], step=step).tensors["features"] for step in range(6)]
    assert len({tuple(features.shape) for features in steps}) > 1  # speeds
    assert not torch.equal(
        task.eval_batch([0]).tensors["features"], task.train_batch([0], step=0).tensors["features"]
    )
    plain = _task(tmp_path, "augment={speeds: [1.0], spec_augment: false}")
    assert torch.equal(
        plain.train_batch([5], step=0).tensors["features"], plain.train_batch([5], step=9).tensors["features"]
    )


def test_cached_features_are_those_made_on_the_fly(tmp_path: Path) -> None:
    one_speed = "augment.speeds=[1.0]"
    fresh = _task(tmp_path / "fresh", one_speed)
    cached = _task(tmp_path / "cached", one_speed, "data.cache=features")
    assert torch.equal(
        fresh.eval_batch([0, 1]).tensors["features"], cached.eval_batch([0, 1]).tensors["features"]
    )
    summary = json.loads((tmp_path / "cached" / nast_data.SUMMARY_FILE).read_text())
    assert summary["cached"] == "features"
    assert summary["frontend"] == {"level": None, "dither": 1e-4, "max_frequency": 8000.0}
    reuse = SpeechData(prepared=str(tmp_path / "cached"))
    with pytest.raises(
        ValueError, match=r"were computed with .*'dither': 0\.0001.*, the config has .*'dither': 0\.0,"
    ):
        prepare_examples(reuse, WORDS, CLEAN, tmp_path / "again", strides=(2, 2), seed=0)
    linked = prepare_examples(reuse, WORDS, Frontend(dither=1e-4), tmp_path / "again", strides=(2, 2), seed=0)
    assert linked == summary and len(Examples(tmp_path / "again" / "train.arrow")) == 8
    with pytest.raises(ValueError, match=r"holds no prepared\.json"):
        nowhere = SpeechData(prepared=str(tmp_path / "nowhere"))
        prepare_examples(nowhere, WORDS, CLEAN, tmp_path / "x", strides=(2, 2), seed=0)


def test_cached_audio_is_augmented_as_what_is_read(tmp_path: Path) -> None:
    changes = "augment={speeds: [0.9, 1.1], warps: [0.9, 1.1], noise_db: [10, 30]}"
    fresh = _task(tmp_path / "fresh", changes)
    cached = _task(tmp_path / "cached", changes, "data.cache=audio")
    assert "audio" in cached.train[0] and "audio" not in fresh.train[0]
    for step in range(3):
        pair = [task.train_batch([0, 1], step=step).tensors["features"] for task in (fresh, cached)]
        torch.testing.assert_close(*pair, atol=0.02, rtol=0)  # 16 bit


@pytest.mark.parametrize("change", ["speeds=[1.1]", "warps=[1.1]", "noise_db=[10, 10]"])
def test_each_augmentation_changes_the_features(tmp_path: Path, change: str) -> None:
    off = ["augment.speeds=[1.0]", "augment.spec_augment=false"]
    plain, changed = (
        _task(tmp_path, *off, *extra).train_batch([0], step=0).tensors["features"]
        for extra in ([], [f"augment.{change}"])
    )
    assert plain.shape != changed.shape or (plain - changed).abs().mean() > 0.05


def test_the_front_end_gives_silence_a_floor_and_no_frame_nothing(tmp_path: Path) -> None:
    assert Frontend()(np.zeros(399)).shape == (0, 80)
    wave = np.zeros(8000, np.float32)
    assert torch.isfinite(Frontend(dither=1e-3)(wave)).all() and torch.isfinite(CLEAN(wave)).all()
    assert torch.equal(Frontend(dither=1e-3)(wave), Frontend(dither=1e-3)(wave))
    loud = np.random.default_rng(0).normal(0, 0.1, 8000).astype(np.float32)
    levelled = Frontend(dither=1e-2, level=0.05)
    torch.testing.assert_close(levelled(0.01 * loud), levelled(loud), atol=1e-3, rtol=0)
    assert torch.isfinite(levelled(wave)).all() and levelled(np.zeros(0)).shape == (0, 80)
    Frontend(dither=0.5, level=0.1, max_frequency=4000.0).save(tmp_path)
    assert Frontend.load(tmp_path) == Frontend(dither=0.5, level=0.1, max_frequency=4000.0)
    with pytest.raises(ValueError, match=r"holds no frontend\.json"):
        Frontend.load(tmp_path / "none")


def test_joined_utterances_are_of_one_speaker_in_the_order_of_the_audio(tmp_path: Path) -> None:
    tones = {
        name: 0.1 * np.sin(np.arange(4800) * step) for name, step in (("a", 0.1), ("b", 0.2), ("c", 0.3))
    }
    for name, waveform in tones.items():
        write_wav(tmp_path / f"{name}.wav", waveform)
    rows = [("a", "ann", "one", "eins"), ("b", "ann", "", "zwei"), ("c", "bob", "three", "drei")]
    # Ids like those of joined utterances: each keeps its own audio.
    text = "id\taudio\tspeaker\tsrc_text\ttgt_text\n" + "".join(
        "\t".join((f"joined-{i}", f"{row[0]}.wav", *row[1:])) + "\n" for i, row in enumerate(rows)
    )
    (tmp_path / "t.tsv").write_text(text)
    sources = {"train": [{"path": "t.tsv"}], "eval": [{"path": "t.tsv"}]}
    base = {"root": str(tmp_path), **sources, "join_pause": 0.5, "cache": "audio"}
    summary = prepare_examples(
        SpeechData.model_validate(base | {"joined": 40}),
        WORDS,
        CLEAN,
        tmp_path / "out",
        strides=(2, 2),
        seed=0,
    )
    assert (summary["joined"], summary["train"]["utterances"], summary["eval"]["utterances"]) == (40, 43, 3)
    examples = Examples(tmp_path / "out" / "train.arrow")
    assert len({examples[i]["id"] for i in range(43)}) == 43
    joined = [examples[i] for i in range(3, 43)]
    words = {"eins": ("a", "one"), "zwei": ("b", ""), "drei": ("c", "three")}
    assert {row["target"] for row in joined} == {
        "eins eins",
        "eins zwei",
        "zwei eins",
        "zwei zwei",
        "drei drei",
    }
    for row in joined:
        (first, said), (second, also) = (words[word] for word in row["target"].split())
        assert row["source"] == (f"{said} {also}" if said and also else "")
        audio = from_pcm(row["audio"])
        expected = np.concatenate([tones[first], np.zeros(8000), tones[second]])
        assert np.abs(audio - expected).max() < 1e-4
        assert row["length"] == frame_count(17_600)
    # A limit that leaves no room for two.
    short = SpeechData.model_validate(base | {"joined": 40, "max_seconds": 1})
    assert prepare_examples(short, WORDS, CLEAN, tmp_path / "short", strides=(2, 2), seed=0)["joined"] == 0


def test_a_written_manifest_is_read_back(tmp_path: Path) -> None:
    clips = (Clip("/x/ä \\ b.wav", 0.5, None, 0.1), Clip("/x/y.wav"))
    row = Utterance("u", clips, 'say "a\tb"', "„ß“ \\ ☃", "ann")
    write_manifest(tmp_path / "t.tsv", [row])
    [again] = read_layout(tmp_path / "t.tsv")
    assert isinstance(again, Utterance)
    assert (again.clips, again.source, again.target) == (row.clips, row.source, row.target)


def test_latency_leaves_the_warm_up_out() -> None:
    rows = [{"compute_s": 9.0, "feature_s": 1.0, "seconds": 1.0}] * 2
    rows += [{"compute_s": 0.1 * i, "feature_s": 0.01, "seconds": 2.0} for i in range(1, 7)]
    figures = latency_figures(rows)
    assert figures["utterances"] == 6 and figures["mean_ms"] == pytest.approx(350)
    assert figures["p95_ms"] == pytest.approx(575) and figures["real_time_factor"] == pytest.approx(2.1 / 12)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data.synthetic=null"],
            "give either `data.train` and `data.eval`, or `data.synthetic`, or `data.prepared`",
        ),
        (["data.prepared=x"], "give either `data.train`"),
        (["data.prepared=x", "data.synthetic=null", "data.joined=5"], "`data.joined` is for `nast.prepare`"),
        (["data.cache=features"], "`augment.noise_db` need audio; set `data.cache: audio`"),
        (["augment.speeds=[0.1]"], "`augment.speeds` is .* give numbers from 0.5 to 2"),
        (["augment.warps=[]"], "`augment.warps` is .* give numbers from 0.7 to 1.4"),
        (["augment.noise_db=[30, 10]"], "`augment.noise_db` is .* give the smaller number first"),
        (["model.decoder_layers=2"], "is for `model.architecture: autoregressive`"),
        (["model.heads=5"], "`model`: .*`width` is 64; it must be a multiple of"),
        (["lora={}", "train.average_best=1"], "`lora` is for language models"),
        (
            ["model.architecture=autoregressive", "deepspeed.zero_stage=3"],
            "`model.architecture: autoregressive` needs `deepspeed.zero_stage` 0, 1 or 2",
        ),
        (["train.keep_model=last"], "`train.average_best` needs"),
        (["vocabulary.kind=char"], "`vocabulary.kind`"),
    ],
)
def test_contradictions_are_refused_before_anything_runs(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(train.Config, CONFIGS / "train_tiny.yaml", overrides)


def test_missing_transcripts_are_an_error_or_unused(tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav", np.random.default_rng(0).normal(0, 0.1, 8000))
    (tmp_path / "train.tsv").write_text("audio\ttgt_text\na.wav\teins zwei\n")
    data = ["data.synthetic=null", f"data.root={tmp_path}", f"run.dir={tmp_path / 'run'}"]
    data += ["data.train=[{path: train.tsv}]", "data.eval=[{path: train.tsv}]"]
    cfg = load_config(train.Config, CONFIGS / "train_tiny.yaml", data)
    with RunFolder.create(train.JOB, cfg).recording() as run:
        with pytest.raises(
            ValueError, match=r"1 of 1 training utterances have no transcript\. .*`loss\.source: 0`"
        ):
            train._prepare(cfg, run)
        loss = cfg.loss.model_copy(update={"source": 0.0, "inner_source": 0.0})
        train._prepare(cfg.model_copy(update={"loss": loss}), run)
    assert SpeechTask(cfg, run.data).eval_batch([0]).tensors["source_lengths"].tolist() == [0]


def test_a17_the_rate_rises_for_10000_steps_and_falls_with_the_square_root() -> None:
    cfg = load_config(train.Config, None, ["data.synthetic={}"])
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=cfg.optim.lr)
    factor = _schedule(optimizer, cfg.optim, cfg.train.max_steps).lr_lambdas[0]
    # The reference warms up from 1e-7, not from 0, hence 5.0005e-4 at step 5,000.
    for step, rate in ((5_000, 5.0005e-4), (10_000, 1e-3), (40_000, 5e-4)):
        assert cfg.optim.lr * factor(step) == pytest.approx(rate, abs=1e-7)


def test_every_rung_of_the_ladder_adds_one_part(tmp_path: Path) -> None:
    file = CONFIGS.parent / "experiments" / "nast_ladder.yaml"
    stages = plan(load_config(Experiment, file, [f"run.root={tmp_path}"]))
    configs = []
    for rung in ("plain", "inner", "pae", "cla", "curriculum"):
        (stage,) = (stage for stage in stages if stage.name == f"{rung}-2")
        cfg = validate_config(train.Config, stage.values, stage.name)
        assert cfg.train.seed == 2 and cfg.data.joined == 0
        model = cfg.model.config(vocab_size=39)
        configs.append(
            (
                len(model.inner_target_layers),
                model.target_prediction if model.inner_target_layers else "none",
                model.adapter,
                model.cross_layer_source,
                cfg.loss.curriculum.mixing(default=0.8).ratio,
            )
        )
    assert configs == [
        (0, "none", "none", None, 0.0),
        (2, "none", "none", None, 0.0),
        (2, "inter_league", "inter_league", None, 0.0),
        (2, "inter_league", "inter_league", 1, 0.0),
        (2, "inter_league", "inter_league", 1, 0.8),
    ]


def test_the_sibling_takes_the_defaults_of_its_recipe() -> None:
    cfg = load_config(train.Config, None, ["model.architecture=autoregressive", "data.synthetic={}"])
    config = cfg.model.config(vocab_size=100)
    assert (config.textual_layers, config.cross_layer_source, config.inner_target_layers) == (6, 2, [4])
    assert (
        cfg.model.model_copy(update={"cross_layer_source": 0}).config(vocab_size=9).cross_layer_source is None
    )
