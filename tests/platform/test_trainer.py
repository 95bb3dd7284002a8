"""What Ray Train is told and what is left out of it when a run starts."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from eagleray.platform import launch
from eagleray.platform.sections import RaySection
from eagleray.platform.trainer import Trainer

POLL, WATCHER = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"


@pytest.fixture(autouse=True)
def driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's node is called `here`; the user has set nothing."""
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "here"))
    for name in (POLL, WATCHER):
        monkeypatch.delenv(name, raising=False)


def _told(nodes: set[str], monkeypatch: pytest.MonkeyPatch, **section: Any) -> tuple[str | None, str | None]:
    monkeypatch.setattr(launch, "worker_nodes", lambda _: nodes)
    with launch._ray_train_settings(RaySection.model_validate(section)):
        return os.environ.get(POLL), os.environ.get(WATCHER)


@pytest.mark.parametrize(
    ("nodes", "workers", "watcher"),
    [
        ({"here"}, 2, "0"),
        ({"here", "there"}, 2, None),
        (set(), 2, None),  # nodes that an autoscaler is still to start
        ({"here"}, [1, 4], None),  # may grow onto other nodes
    ],
)
def test_nodes_are_watched_unless_all_is_on_the_drivers(
    nodes: set[str], workers: Any, watcher: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _told(nodes, monkeypatch, num_workers=workers, max_failures=1) == ("0.2", watcher)
    assert POLL not in os.environ and WATCHER not in os.environ


def test_many_workers_are_asked_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _told({"there"}, monkeypatch, num_workers=1000)[0] == "2"


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(POLL, "7")
    monkeypatch.setenv(WATCHER, "1")
    assert _told({"here"}, monkeypatch) == ("7", "1")
    assert (os.environ[POLL], os.environ[WATCHER]) == ("7", "1")


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_two_services_of_ray_train_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.train.torch import TorchTrainer

    monkeypatch.undo()  # Ray asks for its own context
    theirs, ours = (
        {type(callback).__name__ for callback in trainer(lambda: None)._create_default_callbacks()}
        for trainer in (TorchTrainer, Trainer)
    )
    assert theirs - ours == {"DatasetsCallback", "PlacementGroupCleanerCallback"} and ours < theirs
