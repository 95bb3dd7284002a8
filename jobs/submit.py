"""What `eagleray submit` does: run the job of a config file on a cluster, follow its log, end with its exit code.

    eagleray submit --address http://head:8265 configs/gram/finetune_tiny.yaml run.root=/shared/runs

The config is resolved here, checked here, and travels with the working tree, so that neither has to lie on the
cluster, and the command may be given in any folder. The job's results stay on the cluster, in its run folder.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from eagleray.jobs.registry import job_name, load_job
from eagleray.platform.config import ConfigError, load_config, to_yaml, validate_config
from eagleray.platform.data.files import absolute_path, is_pattern
from eagleray.platform.kuberay import ray_job, split_settings
from eagleray.platform.remote import is_uri
from eagleray.platform.runs import new_run_name, run_place
from eagleray.platform.sections import JobConfig
from eagleray.platform.submission import connect, package

CONFIG_FILE = "submitted.yaml"
"""Name that the config has on the cluster."""

ENTRYPOINT = f"python -m eagleray.jobs.cli train {CONFIG_FILE}"

_KEYS_OF_PATHS = ("path", "paths", "pairs", "store", "reward_model")


@dataclass(frozen=True)
class Submission:
    """A job ready to be sent."""

    job: str
    id: str
    """Submission id, by which `ray job` commands name it."""
    config: JobConfig
    """The resolved config: `run.dir` is set, and paths do not depend on the folder they are read in."""
    local_paths: list[str]
    """Paths of the config that exist on this machine; the cluster must have them too."""


def prepare(config: Path, overrides: Sequence[str]) -> Submission:
    """The job that a config file describes, for another machine.

    Raises:
        ConfigError: The config cannot be used, or names a cluster itself.
    """
    job = job_name(config)
    cfg = load_config(load_job(job).Config, config, overrides)
    if cfg.ray.address is not None:
        raise ConfigError(
            f"`ray.address` is {cfg.ray.address!r}; a submitted job runs on the cluster that it is sent to. Remove the "
            "key, and give the dashboard of that cluster as `--address`."
        )
    name = new_run_name()
    values = cfg.model_dump(mode="json")
    values["run"]["dir"] = cfg.run.dir or run_place(cfg.run.root, job, name)
    paths = list(_make_paths_absolute(values, ""))
    resolved = validate_config(type(cfg), values, str(config))
    return Submission(job, f"{job.replace('.', '-')}-{name}", resolved, paths)


def submit(config: Path, overrides: Sequence[str], *, address: str, wait: bool = True) -> int:
    """Send the job; return its exit code, or 0 at once if it is not waited for.

    Args:
        config: Config file of the job.
        overrides: `key=value` settings.
        address: Dashboard of the cluster's head node.
        wait: Follow the log until the job ends.

    Raises:
        ConfigError: The config cannot be used.
        SubmissionError: The cluster cannot be reached, or refuses the job.
    """
    job = prepare(config, overrides)
    server = connect(address)
    with package({CONFIG_FILE: to_yaml(job.config)}) as folder:
        server.submit(
            job.id,
            ENTRYPOINT,
            folder,
            metadata={"eagleray_job": job.job, "eagleray_run": str(job.config.run.dir)},
        )
    console = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
    commands = (
        f"Follow it: {server.command('logs --follow', job.id)}\nStop it:   {server.command('stop', job.id)}"
    )
    console.print(f"Submitted {job.id}.\n{_places(job)}\n{commands}")
    if not wait:
        return 0
    try:
        return server.follow(job.id, lambda text: print(text, end="", flush=True))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"the job goes on without you.\n{commands}") from None


def render(config: Path, settings: Sequence[str]) -> str:
    """The YAML of a KubeRay RayJob that runs the job of a config file.

    Args:
        config: Config file of the job.
        settings: `key=value` settings of the job, and `kube.KEY=VALUE` for the fields of `KubeSection`.

    Raises:
        ConfigError: The config or a `kube` setting cannot be used.
    """
    kube, overrides = split_settings(settings)
    job = prepare(config, overrides)
    values = job.config.model_dump(mode="json")
    if not is_uri(values["run"]["dir"]):
        values["run"]["dir"] = kube.on_storage(values["run"]["dir"], key="run.dir")
    gpu = kube.gpu or job.config.ray.use_gpu is True
    values["ray"]["use_gpu"] = gpu
    for path in job.local_paths:
        kube.on_storage(path, key=path)
    return ray_job(
        kube,
        name=job.job.replace(".", "-").replace("_", "-"),
        config=to_yaml(validate_config(type(job.config), values, str(config))),
        workers=job.config.ray.max_workers,
        cpus=job.config.ray.cpus_per_worker,
        gpu=gpu,
    )


def _places(job: Submission) -> str:
    """Where its results will be, and what it needs to find there."""
    folder = str(job.config.run.dir)
    if not is_uri(folder) and not Path(folder).expanduser().is_absolute():
        folder = f"~/{folder} of the node that runs it (give an absolute `run.root` for another place)"
    lines = [f"Results:   {folder}"]
    if job.local_paths:
        lines.append(f"Needs:     {', '.join(job.local_paths)}, under the same paths there")
    return "\n".join(lines)


def _make_paths_absolute(values: Any, key: str) -> Iterator[str]:
    """Make the paths of files of this machine absolute, in place; yields all that exist here."""
    for name, value in list(values.items() if isinstance(values, dict) else enumerate(values)):
        inner = name if isinstance(name, str) else key
        if isinstance(value, dict | list):
            yield from _make_paths_absolute(value, inner)
        elif isinstance(value, str) and inner in _KEYS_OF_PATHS:
            path = absolute_path(value, Path.cwd())
            if Path(path).exists() or (is_pattern(value) and glob.glob(path)):
                values[name] = path
                yield path
