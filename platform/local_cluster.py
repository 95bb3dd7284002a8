"""A Ray cluster of several nodes on this machine, for trying what needs more than one.

Each node is a `ray start --block` of its own with own ports and an own folder, so that a cluster that happens to
run here is neither joined nor disturbed, nor is its address file overwritten. It is stopped by its own processes;
`ray stop` would end every cluster of the machine.

    with local_cluster(nodes=3, cpus_per_node=2) as cluster:
        ray.init(cluster.address)
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

_GRACE_S = 8

RAY_GAVE_UP = "timed out during startup"
"""In what Ray says when a node has not started within its fixed 30 s, which a machine at its limit exceeds."""


class LocalClusterError(ValueError):
    """The cluster could not be started; the message holds what Ray said."""


@dataclass(frozen=True)
class LocalCluster:
    """A running cluster."""

    address: str
    """For `ray.address` and `ray.init`."""
    dashboard: str
    """For `eagleray submit --address`, and for a browser."""
    processes: list[subprocess.Popen[bytes]] = field(repr=False)
    """The `ray start` of each node, head first. To lose a node, kill its process group."""


@contextmanager
def local_cluster(
    *,
    nodes: int = 1,
    cpus_per_node: int = 1,
    object_store_mib: int = 100,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = 120,
) -> Iterator[LocalCluster]:
    """A cluster for the length of the block.

    Args:
        nodes: Nodes, of which the first is the head.
        cpus_per_node: CPU cores that each node offers; the machine need not have them.
        object_store_mib: Shared memory of each node.
        environment: Variables for the nodes on top of this process's, e.g. `RAY_AUTH_MODE`.
        timeout_s: How long the start may take.

    Raises:
        LocalClusterError: A node did not start.
    """
    # Sockets lie below this folder and their paths may not exceed 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="er-", dir="/tmp"))
    deadline = time.monotonic() + timeout_s
    # A node of the cluster is no part of the job that starts it.
    variables = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")}
    variables |= {"PATH": os.pathsep.join([str(Path(sys.executable).parent), variables.get("PATH", "")])}
    # For sessions, and the file that says where `ray.init` finds a cluster.
    variables |= {"RAY_TMPDIR": str(folder)} | dict(environment or {})
    common = [f"--num-cpus={cpus_per_node}", "--num-gpus=0", "--disable-usage-stats", "--block"]
    common += [f"--object-store-memory={object_store_mib * 2**20}", "--node-ip-address=127.0.0.1"]
    started: list[subprocess.Popen[bytes]] = []

    def start(*options: str) -> None:
        # Ray gives a node 30 s, which a machine at its limit exceeds; ours is `timeout_s`.
        while not launch(*options):
            _kill_session(started.pop())

    def launch(*options: str) -> bool:
        """Whether the node runs; if not, Ray found that it takes too long."""
        [agent_port] = _free_ports(1)
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *common, *options]
        command += [
            f"--dashboard-agent-listen-port={agent_port}",
            "--min-worker-port=0",
            "--max-worker-port=0",
        ]
        log = folder / f"node-{len(started)}.log"
        with log.open("wb") as output:
            # A session of its own: Ctrl-C in the terminal must reach us, who stop the nodes in order.
            process = subprocess.Popen(
                command, env=variables, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        started.append(process)
        while True:
            ended = process.poll() is not None  # before what it said is read, which is all of it then
            said = log.read_bytes()
            if b"block forever" in said:
                return True
            if ended and RAY_GAVE_UP.encode() in said and time.monotonic() < deadline:
                return False
            _check(process, log, deadline)

    try:
        port, dashboard_port, client_port = _free_ports(3)
        start(
            "--head",
            f"--port={port}",
            f"--dashboard-port={dashboard_port}",
            f"--ray-client-server-port={client_port}",
            "--include-dashboard=true",
        )
        # One after the other: nodes that start together take each other's socket names.
        for _ in range(1, nodes):
            start(f"--address=127.0.0.1:{port}")
        while not _listens(dashboard_port):
            _check(started[0], folder / "node-0.log", deadline)
        yield LocalCluster(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard_port}", started)
    finally:
        _stop(started)
        shutil.rmtree(folder, ignore_errors=True)


def _stop(processes: list[subprocess.Popen[bytes]]) -> None:
    """End the nodes, the head last; `ray start --block` takes its own processes along."""
    for process in reversed(processes):
        process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + _GRACE_S
    for process in reversed(processes):
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.1, deadline - time.monotonic()))
        _kill_session(process)


def _kill_session(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a node's session: workers whose node was killed, or a node with work unfinished."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _check(process: subprocess.Popen[bytes], log: Path, deadline: float) -> None:
    """Wait a moment for a node that must not end or take for ever."""
    if process.poll() is not None or time.monotonic() > deadline:
        reason = "ended" if process.poll() is not None else "is not ready in time"
        said = "\n".join(log.read_text(errors="replace").strip().splitlines()[-15:])
        raise LocalClusterError(f"A node of the local cluster {reason}. Ray said:\n{said}")
    time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    """Different ports that nobody listens on now."""
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0
