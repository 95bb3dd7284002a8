"""Connecting to Ray without surprises: a private local cluster unless an address is given."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

import ray

from eagleray.platform.sections import RaySection

# Set by Ray in the driver of a submitted job (`ray job submit`), which belongs to the job's cluster.
_JOB_ENVIRONMENT = "RAY_JOB_CONFIG_JSON_ENV_VAR"


class PlacementError(ValueError):
    """The cluster does not have what the run needs; the message says what is needed and what there is."""


@contextlib.contextmanager
def connected(section: RaySection) -> Iterator[None]:
    """Ray is connected inside the block.

    A connection that exists already is used and left open. Otherwise: `ray.address` if given, the own
    cluster inside a submitted job, and else a new local cluster with this machine's cores. `ray.init()`
    without an address would silently join any cluster that happens to run on the machine.
    """
    if ray.is_initialized():
        yield
        return
    address = section.address or ("auto" if _JOB_ENVIRONMENT in os.environ else "local")
    try:
        ray.init(address=address, log_to_driver=True, logging_level=logging.WARNING)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise PlacementError(
            f"`ray.address` is {address!r}; no cluster can be reached there: {error}"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


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
    need = _worker_needs(section)
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


def describe_needs(section: RaySection) -> str:
    """What the workers of a run take, e.g. `2 worker(s) x 1 CPU + 1 GPU`."""
    needs = " + ".join(f"{amount:g} {name}" for name, amount in _worker_needs(section).items())
    least, most = section.min_workers, section.max_workers
    return f"{least if least == most else f'{least} to {most}'} worker(s) x {needs}"


def _worker_needs(section: RaySection) -> dict[str, float]:
    return {"CPU": section.cpus_per_worker} | ({"GPU": 1.0} if wants_gpu(section) else {})
