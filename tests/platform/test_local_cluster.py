"""Two nodes on this machine: the command, the probe of shared storage on them, and that other clusters live on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from eagleray.platform import cluster
from eagleray.platform import local_cluster as module
from eagleray.platform.local_cluster import LocalClusterError, local_cluster

pytestmark = pytest.mark.ray

# In a process of its own: pytest's is connected to another cluster.
PROBE = """
    import sys
    from pathlib import Path
    import ray
    from eagleray.platform import cluster
    from eagleray.platform.remote import open_folder
    from eagleray.platform.sections import RaySection

    address, folder = sys.argv[1], Path(sys.argv[2])
    section = RaySection(address=address, num_workers=2)
    with cluster.connected(section):
        cluster.check_placement(section)
        for place in (str(folder), f"file://{folder}"):
            cluster.check_shared_folder(section, open_folder(place))
            assert list(folder.iterdir()) == [], "the probe leaves nothing behind"
        print("shared")
        [head, other] = sorted(ray.nodes(), key=lambda n: n["NodeID"] != ray.get_runtime_context().get_node_id())

        def on_its_own_disk(place, marker, text, answer, there=other["NodeID"], real=cluster._answer_marker):
            here = ray.get_runtime_context().get_node_id()
            return real(place, "not/here" if here == there else marker, text, answer)

        def to_nowhere(place, marker, text, answer):
            return None

        for answer in (on_its_own_disk, to_nowhere):
            cluster._answer_marker = answer
            try:
                cluster.check_shared_folder(section, open_folder(str(folder)))
            except cluster.SharedStorageError as error:
                print(f"{other['NodeID'][:8]} {error}")
"""


def test_the_command_starts_nodes_and_stops_only_them(tmp_path: Path) -> None:
    with local_cluster() as other:
        command = [sys.executable, "-m", "eagleray.jobs.cli", "cluster", "local", "--nodes", "2"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(5)]
        [address] = re.findall(r"^Address: +(\S+)", "".join(lines), re.MULTILINE)
        probe = [sys.executable, "-c", textwrap.dedent(PROBE), address, str(tmp_path)]
        found = subprocess.run(probe, check=False, capture_output=True, text=True, timeout=100)
        started = _children(process.pid)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert len(started) == 2 and not any(_alive(pid) for pid in started)
        assert [node.poll() for node in other.processes] == [None]
    assert found.returncode == 0, found.stderr
    shared, missing, lost = found.stdout.splitlines()
    assert shared == "shared"
    node = missing[:8]
    assert "is not shared with node" in missing and f"(id {node}): FileNotFoundError there" in missing
    assert "what it writes there does not arrive here" in lost
    assert not any(_alive(node.pid) for node in other.processes)


def test_a_node_that_does_not_start_is_explained() -> None:
    with (
        pytest.raises(LocalClusterError, match=r"node of the local cluster is not ready in time\. Ray said:"),
        local_cluster(timeout_s=0.2),
    ):
        pass


def test_a_node_that_ray_gave_up_on_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    gave_up = "print('Exception: The current node timed out during startup.'); raise SystemExit(1)"
    commands: list[list[str]] = []

    def popen(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        commands.append(command)
        return subprocess.Popen(command if len(commands) > 1 else [sys.executable, "-c", gave_up], **options)

    monkeypatch.setattr(module, "subprocess", SimpleNamespace(**vars(subprocess) | {"Popen": popen}))
    with local_cluster() as started:
        [head] = started.processes
        assert head.poll() is None and len(commands) == 2


def test_what_a_node_says_about_the_folder(tmp_path: Path) -> None:
    folder = str(tmp_path)
    (tmp_path / "marker").write_text("text")
    assert cluster._answer_marker(folder, "marker", "text", "answer") is None
    assert (tmp_path / "answer").read_text() == "text"
    other = cluster._answer_marker(folder, "marker", "other text", "answer")
    assert other == "it sees another folder under this path"
    gone = cluster._answer_marker(folder, "gone/marker", "text", "answer")
    assert gone == "FileNotFoundError there (No such file or directory)"


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
