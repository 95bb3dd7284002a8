"""Connecting to Ray without surprises: a private local cluster unless an address is given."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import ray

from eagleray.platform.environment import in_submitted_job
from eagleray.platform.sections import RaySection


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
    address = section.address or ("auto" if in_submitted_job() else "local")
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
        return ray.cluster_resources().get("GPU", 0) >= section.num_workers
    return section.use_gpu


def check_placement(section: RaySection, *, reserved_cpus: float = 0) -> None:
    """Refuse a run that can never be placed, instead of waiting for resources that will not come.

    Args:
        section: What the run asks for.
        reserved_cpus: CPU cores taken by something else for as long as the run lasts.

    Raises:
        PlacementError: The cluster's nodes, even empty, do not hold all workers.
    """
    need = {"CPU": section.cpus_per_worker} | ({"GPU": 1.0} if wants_gpu(section) else {})
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fits = sum(min(int(node.get(name, 0) // amount) for name, amount in need.items()) for node in nodes)
    total = {name: sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU")}
    if fits < section.num_workers or total["CPU"] - reserved_cpus < section.num_workers * need["CPU"]:
        wanted = " + ".join(f"{amount:g} {name}" for name, amount in need.items())
        raise PlacementError(
            f"The run needs {section.num_workers} worker(s) x {wanted}; the cluster has {len(nodes)} node(s) with "
            f"{total['CPU']:g} CPU and {total['GPU']:g} GPU in all and places at most {fits} such worker(s). "
            "Lower `ray.num_workers` or `ray.cpus_per_worker`, or name a larger cluster in `ray.address`."
        )
