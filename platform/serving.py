"""Ray Serve on this machine: start, deploy one application, drain and stop; and what every served model is given.

An application is named by the import path of its builder, as in the YAML of `serve deploy`; the builder takes a
subclass of `ServedModel`.
"""

from __future__ import annotations

import hashlib
import importlib
import ipaddress
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import ray
import yaml
from pydantic import Field
from ray import serve
from ray.serve.schema import LoggingConfig

from eagleray.platform.cluster import check_placement, connected
from eagleray.platform.config import Config
from eagleray.platform.sections import RaySection

_PARTS_OF_A_MODEL = (".json", ".jinja", ".safetensors", ".model", ".txt")


class ServingError(ValueError):
    """The server cannot be started; the message says why and what to do."""


class ServedModel(Config):
    """A model folder, its share of the machine, and the longest time for a request."""

    model: str
    """Folder of the model, readable on every node that runs a replica; weights must be safetensors."""
    name: str | None = None
    """Name shown to clients. Default: the folder's."""
    cpus: float = Field(default=1, gt=0)
    """CPU cores of one replica; without a GPU, also its threads."""
    gpus: float | Literal["auto"] = "auto"
    """GPUs of one replica, or a share of one. `auto`: one if the cluster has any."""
    timeout_s: float = Field(default=60, gt=0)
    """Longest time for one request; it gets 504 then, and its work is dropped."""

    def actor_options(self) -> dict[str, Any]:
        """Ray's resources for one replica; `auto` is decided by the connected cluster."""
        gpus = self.gpus
        if gpus == "auto":
            gpus = 1 if ray.is_initialized() and ray.cluster_resources().get("GPU", 0) >= 1 else 0
        return {"num_cpus": self.cpus, "num_gpus": gpus}


@contextmanager
def running(
    import_path: str,
    args: ServedModel,
    *,
    name: str,
    host: str = "127.0.0.1",
    port: int = 0,
    address: str | None = None,
    access_log: bool = False,
) -> Iterator[str]:
    """The application behind HTTP for the length of the block; afterwards requests in progress end first.

    Uses the Ray that is connected; else starts a private local one (or connects to `address`) and ends it after.

    Args:
        import_path: `module:builder` of the application.
        args: Argument of the builder.
        name: Name of the application.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        address: Address of a running Ray cluster.
        access_log: Whether replicas log a line for each request (method, path, status, time).

    Yields:
        The base URL; requests are answered.

    Raises:
        ServingError: Ray Serve runs already on the cluster, the port is taken, or the model cannot be loaded.
        PlacementError: The cluster has no room for a replica.
    """
    folder = model_folder(args.model)
    port = _free_port(host, port)
    with connected(RaySection(address=address)):
        args = _with_cores(args.model_copy(update={"model": str(folder)}))
        use_gpu = "auto" if args.gpus == "auto" else args.gpus > 0
        check_placement(RaySection(cpus_per_worker=args.cpus, use_gpu=use_gpu))
        if serve.status().proxies:
            raise ServingError(
                "Ray Serve runs already on this cluster, and its address cannot be changed. Stop it (`serve "
                "shutdown`), or add the model to it with `serve deploy` and the YAML of `--print-yaml`."
            )
        try:
            serve.start(
                proxy_location="HeadOnly",
                http_options=_http_options(args, host=host, port=port),
                logging_config=LoggingConfig(log_level="WARNING"),
            )
            try:
                _deploy(import_path, args, name=name, access_log=access_log)
                yield f"http://{f'[{host}]' if ':' in host else host}:{port}"
            finally:
                # Deleting first lets the requests in progress end; a shutdown alone would cut them off.
                with suppress(TimeoutError):
                    serve.delete(name)
        finally:
            serve.shutdown()


def serve_yaml(import_path: str, args: ServedModel, *, name: str, host: str, port: int) -> str:
    """The file with which `serve deploy` runs the same application."""
    config = {
        "proxy_location": "HeadOnly",
        "http_options": _http_options(args, host=host, port=port),
        "applications": [serve_application(import_path, args, name=name)],
    }
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)


def serve_application(import_path: str, args: ServedModel, *, name: str) -> dict[str, Any]:
    """The application's entry in that file, and in the one of a RayService."""
    return {
        "name": name,
        "route_prefix": "/",
        "import_path": import_path,
        # Replicas run in another folder than the one in which a relative path was meant.
        "args": args.model_dump(mode="json", exclude_none=True)
        | {"model": str(Path(args.model).expanduser().absolute())},
        "deployments": [{"name": name, "num_replicas": 1}],
    }


def check_host(host: str, *, insecure_bind: bool) -> None:
    """Refuse an address that other machines may reach, unless told otherwise.

    Raises:
        ServingError: It is not a loopback address.
    """
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback and not insecure_bind:
        raise ServingError(
            f"`--host` is {host!r}, which other machines may reach, and the server has no API keys: everybody who "
            "reaches it could use the model. Keep 127.0.0.1 and put a proxy with authentication in front of it, or "
            "add `--insecure-bind` in a network that you trust."
        )


def model_folder(path: str) -> Path:
    """The absolute folder, if it can hold a model that is safe to load.

    Raises:
        ServingError: It is no folder with safetensors files.
    """
    folder = Path(path).expanduser().resolve()
    if not folder.is_dir():
        raise ServingError(
            f"`model` is {path!r}; there is no such folder on this machine. Give the `model` folder of a run, or "
            "download a model from the hub first."
        )
    if not any(folder.glob("*.safetensors")):
        raise ServingError(
            f"`model` is {path!r}; the folder holds no *.safetensors file. Give the `model` folder of a run; weights "
            "in other formats can run code when they are loaded, and are not served."
        )
    return folder


def model_revision(folder: Path, *settings: str) -> str:
    """A short hash of everything that decides a score: weights, tokenizer, settings."""
    digest = hashlib.sha256("\0".join(settings).encode())
    for file in sorted(folder.iterdir()):
        if file.suffix in _PARTS_OF_A_MODEL:
            digest.update(file.name.encode())
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:12]


def _deploy(import_path: str, args: ServedModel, *, name: str, access_log: bool) -> None:
    module, _, builder = import_path.partition(":")
    application = getattr(importlib.import_module(module), builder)(args)
    log = LoggingConfig(log_level="INFO" if access_log else "WARNING", enable_access_log=access_log)
    try:
        serve.run(application, name=name, route_prefix="/", logging_config=log)
    except RuntimeError as error:
        # Serve's message holds the remote traceback; its last line is the reason.
        deployments = serve.status().applications[name].deployments.values()
        reasons = [
            status.message.strip().splitlines()[-1] for status in deployments if status.message.strip()
        ]
        raise ServingError(f"{args.model} could not be served: {' '.join(reasons) or error}") from error


def _http_options(args: ServedModel, *, host: str, port: int) -> dict[str, Any]:
    # The application's own limit answers with a proper body; this one only catches what hangs outside of it.
    return {"host": host, "port": port, "request_timeout_s": args.timeout_s + 10}


def _free_port(host: str, port: int) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As the server will set it: a port whose last connections are still timing out is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServingError(
                f"Cannot listen on {host}:{port}: {error.strerror}. Choose another port."
            ) from error
        return probe.getsockname()[1]


def _with_cores(args: ServedModel) -> ServedModel:
    """On one machine and without a GPU, the model gets all cores unless the user said otherwise."""
    resources = ray.cluster_resources()
    if "cpus" in args.model_fields_set or resources.get("GPU", 0) >= 1 or len(ray.nodes()) > 1:
        return args
    return args.model_copy(update={"cpus": resources["CPU"]})
