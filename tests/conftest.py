"""Environment and fixtures of all tests."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

_TESTS = Path(__file__).parent

# Before anything imports Ray, torch or matplotlib. Tests talk to no cluster but their own, so tokens only stand
# in the way, and no test may reach for the network or a display.
for _name, _value in {
    "RAY_AUTH_MODE": "disabled",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "MPLBACKEND": "Agg",
}.items():
    os.environ.setdefault(_name, _value)

# Ray's workers import tasks of the tests.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(_TESTS.parent), str(_TESTS), os.environ.get("PYTHONPATH")])
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start Ray come first, so that at the end no core is left with a long one alone."""
    long = {item.path for item in items if item.get_closest_marker("ray")}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(autouse=True)
def _linear_of_torch() -> Iterator[None]:
    """Jobs that compute in this process leave another `F.linear` behind."""
    yield
    if (cpu := sys.modules.get("eagleray.platform.cpu")) is not None:
        cpu.F.linear = cpu._torch_linear


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One private local Ray for all tests of the session, with four (possibly imaginary) CPU cores."""
    import ray

    from eagleray.platform.cluster import start_ray

    # Sockets lie below this folder and their paths may not exceed 107 characters, hence no `tmp_path`.
    folder = tempfile.mkdtemp(prefix="er-", dir="/tmp")
    os.environ.setdefault("EAGLERAY_WORK_DIR", f"{folder}/work")  # of runs at URIs
    start_ray(
        address="local",
        num_cpus=4,
        object_store_memory=200 * 2**20,
        include_dashboard=False,
        _temp_dir=folder,
    )
    try:
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
