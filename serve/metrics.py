"""What is counted, for Prometheus. Ray collects it from all processes and offers it on each node (docs/serving.md).

Serve adds the application, which is the model, and the replica to what a replica counts.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from ray.serve.metrics import Counter, Gauge, Histogram

_SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60]
_SIZES = [float(2**i) for i in range(18)]


class _Meters(NamedTuple):
    requests: Counter
    seconds: Histogram
    items: Histogram
    cost: Histogram
    batch_seconds: Histogram
    pending: Gauge
    generated: Counter


@cache
def _meters() -> _Meters:
    """Made at the first use: a process that imports this counts nothing yet."""
    tags: Any = ("model", "path")  # Ray annotates a tuple of one
    return _Meters(
        Counter("eagleray_requests_total", description="Requests answered.", tag_keys=(*tags, "status")),
        Histogram(
            "eagleray_request_seconds",
            description="Time to the end of the answer.",
            boundaries=_SECONDS,
            tag_keys=tags,
        ),
        Histogram("eagleray_batch_items", description="Items of a batch.", boundaries=_SIZES),
        Histogram("eagleray_batch_cost", description="Tokens or frames of a batch.", boundaries=_SIZES),
        Histogram("eagleray_batch_seconds", description="Time a batch took.", boundaries=_SECONDS),
        Gauge("eagleray_pending_items", description="Items admitted and not finished."),
        Counter("eagleray_generated_tokens_total", description="Tokens written by a language model."),
    )


def request_answered(*, model: str, path: str, status: int, seconds: float) -> None:
    """A request has its whole answer, or its client went away (status 499)."""
    meters = _meters()
    meters.requests.inc(tags={"model": model, "path": path, "status": str(status)})
    meters.seconds.observe(seconds, tags={"model": model, "path": path})


def batch_computed(*, items: int, cost: int, seconds: float, pending: int) -> None:
    """A batch was computed, while `pending` items waited or were in it."""
    meters = _meters()
    meters.items.observe(items)
    meters.cost.observe(cost)
    meters.batch_seconds.observe(seconds)
    meters.pending.set(pending)


def tokens_generated(count: int) -> None:
    """A request to a language model ended."""
    if count:
        _meters().generated.inc(count)
