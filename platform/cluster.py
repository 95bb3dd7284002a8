"""Connecting to Ray without surprises: a private local cluster unless an address is given."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from collections.abc import Iterator, Mapping
from typing import Any

import psutil
import ray
from ray._private.state import jobs  # the public list needs the dashboard
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from eagleray.platform.environment import in_submitted_job
from eagleray.platform.local_cluster import RAY_GAVE_UP
from eagleray.platform.remote import SharedFolder, open_folder
from eagleray.platform.sections import RaySection

logger = logging.getLogger(__name__)

_ATTEMPTS = 4
"""How often a private cluster is started, then."""


class SharedStorageError(ValueError):
    """A node does not see the run folder; the message names the node and the folder."""


class PlacementError(ValueError):
    """The cluster does not have what the run needs; the message says what is needed and what there is."""


@contextlib.contextmanager
def connected(section: RaySection, *, dashboard: bool = False) -> Iterator[None]:
    """Ray is connected inside the block.

    A connection that exists already is used and left open. Otherwise: `ray.address` if given, the own
    cluster inside a submitted job, and else a new local cluster with this machine's cores. `ray.init()`
    without an address would silently join any cluster that happens to run on the machine.

    Args:
        section: Where.
        dashboard: Whether a new local cluster has Ray's dashboard, a web server that takes seconds of a core to start.
    """
    if ray.is_initialized():
        yield
        return
    address = section.address or ("auto" if in_submitted_job() else "local")
    try:
        start_ray(
            address=address,
            include_dashboard=dashboard if address == "local" else None,
            log_to_driver=True,
            logging_level=logging.WARNING,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise PlacementError(
            f"`ray.address` is {address!r}; no cluster can be reached there: {error}"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def start_ray(**options: Any) -> None:
    """`ray.init`, again where Ray gave up on a private cluster because the machine is busy.

    Raises:
        ConnectionError: Ray gave up each time.
    """
    here = psutil.Process()
    for attempt in range(1, _ATTEMPTS + 1):
        before = here.children(recursive=True)
        try:
            ray.init(**options)
        except Exception as error:  # Ray raises it as that
            if RAY_GAVE_UP not in str(error):
                raise
        else:
            return
        # Ray lets run what it has started.
        left = [process for process in here.children(recursive=True) if process not in before]
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=10)
        logger.warning(
            "Ray did not start within its 30 s, attempt %d of %d: this machine is busy.", attempt, _ATTEMPTS
        )
    raise ConnectionError(
        f"Ray did not start within its 30 s, in {_ATTEMPTS} attempts: this machine is too busy. End other work, or "
        "name a running cluster in `ray.address`."
    )


def driver_is_gone() -> bool:
    """In an actor: whether its job's driver has ended; Ray then ends all processes of the job, in no order."""
    here = ray.get_runtime_context()
    if here.get_actor_id() is None:  # the driver itself, which may have lost whom it would ask
        return False
    return any(job["JobID"] == here.get_job_id() and job["IsDead"] for job in jobs())


def wants_gpu(section: RaySection) -> bool:
    """Whether workers get a GPU each; `auto` means yes if the cluster has enough."""
    if section.use_gpu == "auto":
        return ray.cluster_resources().get("GPU", 0) >= section.min_workers
    return section.use_gpu


def check_placement(section: RaySection) -> int:
    """Refuse a run that can never be placed, instead of waiting for resources that will not come.

    Returns:
        How many such runs the cluster holds at a time when it is empty; at least 1. What drives a run takes no core.

    Raises:
        PlacementError: The cluster's nodes, even empty, do not hold all workers.
    """
    need = _one_worker(section)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    # A worker never spans nodes; the workers of a run may.
    fits = sum(min(int(node.get(name, 0) // amount) for name, amount in need.items()) for node in nodes)
    if fits < section.min_workers:
        total = {name: sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU")}
        raise PlacementError(
            f"The run needs {describe_needs(section)}; the cluster has {len(nodes)} node(s) with "
            f"{total['CPU']:g} CPU and {total['GPU']:g} GPU in all and places at most {fits} such worker(s). "
            "Lower `ray.num_workers` or `ray.cpus_per_worker`, or name a larger cluster in `ray.address`."
        )
    return max(1, fits // section.max_workers)


def worker_nodes(section: RaySection) -> set[str]:
    """Ids of the nodes that are there and could hold a worker of the run."""
    need = _one_worker(section).items()
    return {
        node["NodeID"]
        for node in ray.nodes()
        if node["Alive"] and all(node["Resources"].get(name, 0) >= amount for name, amount in need)
    }


def describe_needs(section: RaySection) -> str:
    """What the workers of a run take, e.g. `2 worker(s) x 1 CPU + 1 GPU`."""
    needs = " + ".join(f"{amount:g} {name}" for name, amount in _one_worker(section).items())
    least, most = section.min_workers, section.max_workers
    return f"{least if least == most else f'{least} to {most}'} worker(s) x {needs}"


def check_shared_folder(section: RaySection, folder: SharedFolder, *, timeout_s: float = 60) -> None:
    """Refuse a run whose folder is not the same on all nodes, before it trains up to its first checkpoint.

    Each node that can hold a worker reads what this process wrote, and writes what this process must read.

    Args:
        section: What the run asks for.
        folder: The run folder; it exists here.
        timeout_s: How long the nodes may take.

    Raises:
        SharedStorageError: The folder is missing, another one or read-only on a node, or a node does not answer.
    """
    asked = worker_nodes(section)
    if asked <= {ray.get_runtime_context().get_node_id()}:
        return
    nodes = [node for node in ray.nodes() if node["NodeID"] in asked]
    marker, text = f".probe-{os.getpid()}", secrets.token_hex(8)
    answers = {node["NodeID"]: f"{marker}-{node['NodeID']}" for node in nodes}
    folder.write_text(marker, text)
    try:
        problems = _ask_nodes(folder.place, marker, text, answers, timeout_s)
        for node in nodes:
            problem = problems.get(node["NodeID"], "it does not answer")
            if problem is None and not _holds(folder, answers[node["NodeID"]], text):
                problem = "what it writes there does not arrive here"
            if problem is not None:
                raise SharedStorageError(
                    f"{folder.place} is not shared with node {node['NodeManagerAddress']} (id {node['NodeID'][:8]}): "
                    f"{problem}. A run on several nodes needs `run.root` or `run.dir` on storage that all of them mount "
                    "under the same path, e.g. NFS, or at a URI that all of them reach; docs/cluster.md says how."
                )
    finally:
        for name in (marker, *answers.values()):
            folder.remove(name)


def _ask_nodes(
    place: str, marker: str, text: str, answers: Mapping[str, str], timeout_s: float
) -> dict[str, str | None]:
    """What is wrong with the folder on each node that answers."""
    task = ray.remote(num_cpus=0, max_retries=0)(_answer_marker)
    asked = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
            place, marker, text, answer
        ): node
        for node, answer in answers.items()
    }
    done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=timeout_s)
    return {asked[reference]: ray.get(reference) for reference in done}


def _answer_marker(place: str, marker: str, text: str, answer: str) -> str | None:
    """On a node: read the marker and answer beside it; returns what went wrong."""
    try:
        folder = open_folder(place)
        if folder.read_text(marker) != text:
            return "it sees another folder under this path"
        folder.write_text(answer, text)
    except OSError as error:
        return f"{type(error).__name__} there ({error.strerror or error})"
    except ValueError as error:
        return str(error)
    return None


def _holds(folder: SharedFolder, name: str, text: str) -> bool:
    try:
        return folder.read_text(name) == text
    except OSError:
        return False


def _one_worker(section: RaySection) -> dict[str, float]:
    return {"CPU": section.cpus_per_worker} | ({"GPU": 1.0} if wants_gpu(section) else {})
