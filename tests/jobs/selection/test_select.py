"""The job `select`: what it writes, refuses and resumes, and that workers change nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eagleray.jobs import cli, select
from eagleray.jobs.selection import methods
from eagleray.models.selection.rows import SelectionError
from eagleray.models.selection.synthetic import planted_pairs
from eagleray.platform.config import ConfigError, load_config
from eagleray.platform.data.preferences import PreferenceData, load_preferences
from eagleray.platform.data.sources import DataError, SourceConfig
from eagleray.platform.data.vectors import read_vectors
from eagleray.platform.runs import RunFolder

CONFIGS = Path(__file__).parents[3] / "configs" / "select"


def run(config: str, folder: Path, *overrides: str) -> dict[str, Any]:
    cfg = load_config(select.Config, CONFIGS / f"{config}_tiny.yaml", [f"run.dir={folder}", *overrides])
    return select.main(cfg)


def scores(folder: Path, name: str) -> dict[str, list[Any]]:
    return pq.read_table(folder / "scores" / f"{name}.parquet").to_pydict()


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_store(
    path: Path, vectors: np.ndarray, *, prefix: str = "p", model: str = "m1", **columns: Any
) -> Path:
    ids = [f"{prefix}{i}" for i in range(len(vectors))]
    values = {"id": ids, "h": vectors.astype(np.float32).tolist(), "model_hash": [model] * len(ids)} | columns
    table = pa.table(values)
    place = table.schema.get_field_index("h")
    pq.write_table(table.set_column(place, "h", table["h"].cast(pa.list_(pa.float32()))), path)
    return path


@pytest.fixture(scope="module")
def transported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of the tiny transport config."""
    folder = tmp_path_factory.mktemp("select") / "run"
    run("transport", folder)
    return folder


def test_check_23_the_tiny_config_finds_the_planted_kind(transported: Path) -> None:
    report = json.loads((transported / "report.json").read_text())
    assert list(report) == ["captions", "texts"]
    for name, count in (("captions", 60), ("texts", 60)):
        found = report[name]
        assert found["selected"] == count == sum(part["selected"] for part in found["sources"].values())
        assert found["sources"]["picture"]["share_of_selection"] >= 0.9
        assert found["sources"]["picture"]["share_of_pool"] == 0.5
        assert found["converged"] and found["marginal_error"]["target"] < 1e-6
    assert (report["captions"]["target"], report["texts"]["target"]) == ("target", "captions")
    assert report["texts"]["targets"] == 60
    assert len(list((transported / "plots").glob("*.png"))) == 4


def test_scores_ranks_and_the_most_similar_target(transported: Path) -> None:
    columns = scores(transported, "texts")
    assert list(columns) == ["id", "score", "rank", "selected", "argmax_target_id"]
    order = np.argsort(columns["rank"])
    assert sorted(columns["rank"]) == list(range(1, 201))
    assert (np.diff(np.array(columns["score"])[order]) > -1e-12).all()
    assert [columns["selected"][row] for row in order] == [True] * 60 + [False] * 140
    chosen = scores(transported, "captions")
    selected = {name for name, taken in zip(chosen["id"], chosen["selected"], strict=True) if taken}
    assert set(columns["argmax_target_id"]) <= selected


def test_selected_rows_are_preference_data(transported: Path) -> None:
    source = SourceConfig(path=str(transported / "selected" / "texts.jsonl"))
    pairs, report = load_preferences(PreferenceData(sources=[source]))
    assert report.kept == report.read == 60
    made = {row["id"]: row for row in planted_pairs(200, seed=3)}
    for pair in pairs:
        row = made[pair.id]
        assert (pair.prompt_text, pair.chosen, pair.rejected) == (
            row["prompt"],
            row["chosen"],
            row["rejected"],
        )
        assert pair.extra["source"] == row["source"]
    assert [pair.extra["selection_rank"] for pair in pairs] == list(range(1, 61))


def test_baselines_and_cosine_on_one_budget(tmp_path: Path) -> None:
    shares = {}
    for method in ("cosine", "random", "longest"):
        report = run("cosine", tmp_path / method, f"method={method}")
        shares[method] = report["general"]["sources"]["picture"]["share_of_selection"]
    assert shares["cosine"] >= 0.9
    assert 0.25 < shares["random"] < 0.75
    longest = scores(tmp_path / "longest", "general")
    assert min(
        s for s, taken in zip(longest["score"], longest["selected"], strict=True) if taken
    ) >= np.median(longest["score"])
    columns = scores(tmp_path / "cosine", "general")
    assert [name is not None for name in columns["argmax_target_id"]] == columns["selected"]


def test_clusters_keep_a_selection_diverse(tmp_path: Path) -> None:
    """Quotas by cluster take a part of the pool that the scores alone would leave out."""
    report = run("cosine", tmp_path / "run", "clusters=auto")
    assert report["general"]["selected"] == 50
    assert report["general"]["sources"]["kitchen"]["selected"] >= 5


def test_interrupted_runs_go_on_after_the_last_pool(
    transported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = methods.METHODS["transport"], []

    def fails_at_the_second(pool: Any, *args: Any) -> Any:
        calls.append(pool.name)
        if calls == ["captions", "texts"]:
            raise RuntimeError("the machine went away")
        return real(pool, *args)

    monkeypatch.setitem(methods.METHODS, "transport", fails_at_the_second)
    with pytest.raises(RuntimeError, match="went away"):
        run("transport", tmp_path / "run")
    with pytest.raises(ConfigError, match="another config"):
        run("transport", tmp_path / "run", "transport.mode=dual")
    report = run("transport", tmp_path / "run")
    assert calls == ["captions", "texts", "texts"]
    assert report == json.loads((transported / "report.json").read_text())
    assert scores(tmp_path / "run", "texts") == scores(transported, "texts")


def test_an_interrupted_solver_goes_on_from_its_potentials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a small eps the solver takes many iterations; the second attempt needs only those that were left."""
    hard = ("transport.eps_ratio=0.005", "transport.mode=dual", "transport.tolerance=1e-9")
    whole = run("transport", tmp_path / "whole", *hard)["captions"]
    assert whole["iterations"] > 20
    monkeypatch.setattr(methods, "_SAVE_EVERY_S", -1)
    real, told = methods._saver, []

    def stops_late(path: Path) -> Any:
        save = real(path)

        def progress(psi: np.ndarray) -> None:
            save(psi)
            told.append(len(psi))
            if len(told) == whole["iterations"] - 5:
                raise KeyboardInterrupt

        return progress

    monkeypatch.setattr(methods, "_saver", stops_late)
    with pytest.raises(KeyboardInterrupt):
        run("transport", tmp_path / "run", *hard)
    assert (tmp_path / "run" / "checkpoints" / "captions.npy").exists()
    report = run("transport", tmp_path / "run", *hard)["captions"]
    assert report["iterations"] < 15 < whole["iterations"]
    assert not (tmp_path / "run" / "checkpoints" / "captions.npy").exists()
    ours, theirs = scores(tmp_path / "run", "captions"), scores(tmp_path / "whole", "captions")
    assert ours["selected"] == theirs["selected"]
    np.testing.assert_allclose(ours["score"], theirs["score"], atol=1e-6)


@pytest.mark.ray
def test_workers_change_nothing(transported: Path, ray_cluster: None, tmp_path: Path) -> None:
    run("transport", tmp_path / "two", "ray.num_workers=2")
    for name in ("captions", "texts"):
        one, two = scores(transported, name), scores(tmp_path / "two", name)
        assert one["selected"] == two["selected"]
        np.testing.assert_allclose(one["score"], two["score"], atol=1e-10)
    one, two = (run("cosine", tmp_path / f"c{n}", f"ray.num_workers={n}") for n in (1, 2))
    assert one == two


def test_vectors_of_a_store(tmp_path: Path) -> None:
    """Rows that are only vectors: selected ids come out; with pairs, vectors are found by id."""
    rng = np.random.default_rng(0)
    pool = rng.normal(size=(40, 6)) + np.repeat([[3.0], [0.0]], 20, axis=0) * np.eye(6)[0]
    stores = [
        write_store(tmp_path / "pool.parquet", pool, source=["near"] * 20 + ["far"] * 20),
        write_store(tmp_path / "target.parquet", 3 * np.eye(6)[:1] + rng.normal(size=(5, 6)), prefix="t"),
    ]
    vectors = [f"pools.general={{vectors: {stores[0]}, count: 15}}", f"target={{vectors: {stores[1]}}}"]
    report = run("cosine", tmp_path / "run", "features.name=stored", *vectors)
    assert report["general"]["sources"]["near"]["selected"] >= 14
    assert report["general"]["model_hash"] == "m1"
    rows = [
        json.loads(line)
        for line in (tmp_path / "run" / "selected" / "general.jsonl").read_text().splitlines()
    ]
    assert set(rows[0]) == {"id", "source", "selection_score", "selection_rank"}
    pairs = write_rows(
        tmp_path / "pairs.jsonl", [{**row, "id": f"p{i}"} for i, row in enumerate(planted_pairs(40, seed=5))]
    )
    joined = f"pools.general={{pairs: {{sources: [{{path: {pairs}}}]}}, vectors: {stores[0]}, count: 15}}"
    run("cosine", tmp_path / "joined", "features.name=stored", joined, vectors[1])
    again = (tmp_path / "joined" / "selected" / "general.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in again] == [row["id"] for row in rows]
    write_rows(pairs, [{**row, "id": f"q{i}"} for i, row in enumerate(planted_pairs(40, seed=5))])
    with pytest.raises(SelectionError, match=r"40 pair\(s\) of general have no vector .* q0, q1"):
        run("cosine", tmp_path / "missing", "features.name=stored", joined, vectors[1])
    # Nothing would be left.
    with pytest.raises(SelectionError, match=r"40 pair\(s\) of general have no vector"):
        run("cosine", tmp_path / "none", "features.name=stored", joined, vectors[1], "without_vector=drop")
    write_rows(
        pairs,
        [
            {**row, "id": f"q{i}" if i % 2 else f"p{i}", "source": "texts"}
            for i, row in enumerate(planted_pairs(40, seed=5))
        ],
    )
    report = run(
        "cosine", tmp_path / "dropped", "features.name=stored", joined, vectors[1], "without_vector=drop"
    )
    assert report["general"]["pool"] == report["general"]["without_vector"] == 20
    left = [
        json.loads(line)["id"]
        for line in (tmp_path / "dropped" / "selected" / "general.jsonl").read_text().splitlines()
    ]
    # The order of the pairs that are left is as before: each has its own vector still.
    best_first = [row["id"] for row in rows if row["id"] in left]
    assert left[: len(best_first)] == best_first and len(best_first) >= 6


def test_vectors_of_two_models_are_refused(tmp_path: Path) -> None:
    rows = np.eye(4)
    pool = write_store(tmp_path / "pool.parquet", rows)
    target = write_store(tmp_path / "target.parquet", rows, prefix="t", model="m2")
    with pytest.raises(SelectionError, match=r"different models \(target: m2, general: m1\)"):
        run("cosine", tmp_path / "run", "features.name=stored", f"pools.general={{vectors: {pool}, count: 1}}",
            f"target={{vectors: {target}}}")  # fmt: skip


def test_broken_stores(tmp_path: Path) -> None:
    path = tmp_path / "store.parquet"
    pq.write_table(pa.table({"id": ["a", "b"], "h": [[1.0, 2], [1.0]]}), path)
    with pytest.raises(DataError, match="different width: `b` has 1 numbers, others have 2"):
        read_vectors(str(path))
    pq.write_table(pa.table({"id": ["a", "a"], "h": [[1.0], [2.0]], "order": ["x", "y"]}), path)
    with pytest.raises(DataError, match="more than once: `a`; if it has a pair in several orders"):
        read_vectors(str(path))
    assert read_vectors(str(path), order="y").vectors_ND.tolist() == [[2.0]]
    with pytest.raises(DataError, match="no row is left: of order `z`"):
        read_vectors(str(path), order="z")
    pq.write_table(pa.table({"id": ["a", "b"], "h": [[1.0], None]}), path)
    with pytest.raises(DataError, match="`h` is missing in 1 row"):
        read_vectors(str(path))
    pq.write_table(pa.table({"id": ["a"], "v": [[1.0]]}), path)
    with pytest.raises(DataError, match="`h` is missing: the columns are id, v"):
        read_vectors(str(path))
    pq.write_table(pa.table({"id": ["a", "b"], "h": [[1.0], [2.0]], "model_hash": ["m", "n"]}), path)
    with pytest.raises(DataError, match="several models: m, n"):
        read_vectors(str(path))


def test_pools_that_hold_the_target_or_its_test_data(tmp_path: Path) -> None:
    same = "pools.general={synthetic: {pairs: 40, seed: 1}, count: 5}"
    with pytest.raises(
        SelectionError, match=r"16 row\(s\) of the pool have a prompt that the target has too: picture-1-"
    ):
        run("cosine", tmp_path / "a", same)
    report = run("cosine", tmp_path / "b", same, "overlap=drop")
    assert report["general"]["pool"] == 24
    with pytest.raises(SelectionError, match="the test data has too: picture-2-000000"):
        run("cosine", tmp_path / "c", "held_out={synthetic: {pairs: 2, seed: 2}}")


def test_configs_that_are_refused(tmp_path: Path) -> None:
    for override, message in (
        ("features.name=stored", "so `target` needs `vectors`"),
        ("pools.general={synthetic: {pairs: 9}, count: 1, fraction: 0.5}", "either `count` or `fraction`"),
        ("pools.general={count: 1}", "give `pairs`, `vectors` or both"),
        ("pools={target: {synthetic: {pairs: 9}, count: 1}}", "`target` cannot name a pool"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(select.Config, CONFIGS / "cosine_tiny.yaml", [override])
    with pytest.raises(SelectionError, match="300 rows are to be selected from a pool of 200"):
        run("cosine", tmp_path / "run", "pools.general.count=300")
    assert RunFolder(tmp_path / "run").read_manifest()["status"] == "failed"


def test_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(cli, "start", lambda *args: asked.append(args))
    monkeypatch.setattr(cli, "configure_logging", lambda: None)
    with pytest.raises(SystemExit):
        cli.main(["select", "some.yaml", "method=cosine"])
    assert asked == [("select", Path("some.yaml"), ["method=cosine"])]
