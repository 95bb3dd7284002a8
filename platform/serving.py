"""Ray Serve on this machine: start, deploy applications, update them, drain and stop; and what every model is given.

Each model is a Serve application of its own and so is the gateway, the only one with a route. Serve versions an
application as a whole: were all models in one, adding a model would restart the others (docs/decisions/0013-gateway.md).
An application is named by the import path of its builder, as in the YAML of `serve deploy`.
"""

from __future__ import annotations

import hashlib
import importlib
import ipaddress
import math
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import ray
import yaml
from pydantic import Field, field_validator
from ray import serve
from ray.serve.schema import LoggingConfig
from safetensors import SafetensorError, safe_open

from eagleray.platform.cluster import PlacementError, connected
from eagleray.platform.config import Config
from eagleray.platform.sections import RaySection

_PARTS_OF_A_MODEL = (".json", ".jinja", ".safetensors", ".model", ".txt")


class ServingError(ValueError):
    """The server cannot be started; the message says why and what to do."""


class ServedModel(Config):
    """A model folder, its share of the machine, and the longest time for a request."""

    model: str
    """Folder of the model, readable on every node that runs a replica; weights must be safetensors."""
    name: str | None = Field(default=None, pattern="^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$")
    """Name by which clients choose the model. Default: the folder's."""
    cpus: float | Literal["auto"] = "auto"
    """CPU cores that Ray reserves for one replica; without a GPU, also its threads. `auto`: one on a cluster; on a single
    machine nothing is reserved and every model may use all cores."""
    gpus: float | Literal["auto"] = "auto"
    """GPUs of one replica, or a share of one. `auto`: one if the cluster has any."""
    timeout_s: float = Field(default=60, gt=0)
    """Longest time for one request; it gets 504 then, and its work is dropped."""

    @field_validator("cpus")
    @classmethod
    def _some_cores(cls, cpus: float | Literal["auto"]) -> float | Literal["auto"]:
        if cpus != "auto" and cpus <= 0:
            raise ValueError("must be greater than 0, or 'auto'")
        return cpus

    def actor_options(self) -> dict[str, Any]:
        """Ray's resources for one replica; `auto` is decided by the connected cluster."""
        cpus, gpus = self.cpus, self.gpus
        if cpus == "auto":
            cpus = 0 if ray.is_initialized() and len(ray.nodes()) == 1 else 1
        if gpus == "auto":
            gpus = 1 if ray.is_initialized() and ray.cluster_resources().get("GPU", 0) >= 1 else 0
        return {"num_cpus": cpus, "num_gpus": gpus}


@dataclass(frozen=True)
class App:
    """A Serve application: the import path of its builder, and the builder's argument."""

    name: str
    import_path: str
    args: Config
    deployment: str
    """Name of its only deployment."""
    route_prefix: str | None = None
    """Where it answers HTTP; None for a model, which only the gateway calls."""
    grpc_servicer: str | None = None
    """Import path of the function that adds its gRPC service to a server."""

    def build(self) -> serve.Application:
        """The application, to be run from here."""
        module, _, builder = self.import_path.partition(":")
        return getattr(importlib.import_module(module), builder)(self.args)

    def config(self, **deployment: Any) -> dict[str, Any]:
        """Its entry in a Serve config file, with further options of the deployment."""
        args = self.args.model_dump(mode="json", exclude_none=True)
        if isinstance(self.args, ServedModel):
            # Replicas run in another folder than the one in which a relative path was meant.
            args["model"] = str(Path(self.args.model).expanduser().absolute())
        return {
            "name": self.name,
            "route_prefix": self.route_prefix,
            "import_path": self.import_path,
            "args": args,
            "deployments": [{"name": self.deployment} | deployment],
        }


@contextmanager
def running(
    gateway: App,
    models: Sequence[App],
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    grpc_port: int | None = None,
    address: str | None = None,
    access_log: bool = False,
) -> Iterator[str]:
    """Models behind the gateway for the length of the block; afterwards requests in progress end first.

    Uses the Ray that is connected; else starts a private local one (or connects to `address`) and ends it after.

    Args:
        gateway: The application that answers HTTP.
        models: Applications whose argument is a `ServedModel`.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        grpc_port: Port for gRPC, on all addresses of the machine; None: no gRPC.
        address: Address of a running Ray cluster.
        access_log: Whether the gateway logs a line for each request (method, path, model, status, time).

    Yields:
        The base URL; requests are answered.

    Raises:
        ServingError: Ray Serve runs already on the cluster, the port is taken, or a model cannot be loaded.
        PlacementError: The cluster has no room for a replica.
    """
    models = [_absolute(app) for app in models]
    port = free_port(host, port)
    if grpc_port is not None:
        free_port("0.0.0.0", grpc_port)
    with connected(RaySection(address=address), dashboard=True):  # `serve status` and metrics go through it
        models = _placed(models)
        if serve.status().proxies:
            raise ServingError(
                "Ray Serve runs already on this cluster, and its address cannot be changed. Stop it (`serve "
                "shutdown`), change its models with `--update`, or use `serve deploy` and the YAML of `--print-yaml`."
            )
        try:
            serve.start(
                proxy_location="HeadOnly",
                http_options=_http_options(models, host=host, port=port),
                grpc_options=_grpc_options(gateway, grpc_port),
                logging_config=LoggingConfig(log_level="WARNING"),
            )
            try:
                _deploy(models)
                _deploy([gateway], access_log=access_log)
                yield f"http://{f'[{host}]' if ':' in host else host}:{port}"
            finally:
                # Deleting first lets the requests in progress end; a shutdown alone would cut them off.
                for app in (gateway, *models):
                    with suppress(TimeoutError):
                        serve.delete(app.name)
        finally:
            serve.shutdown()


@dataclass(frozen=True)
class Update:
    """What an update did, by the names of the models."""

    loaded: list[str]
    replaced: list[str]
    unloaded: list[str]
    kept: list[str]


def update(gateway: str, models: Sequence[App], *, address: str) -> Update:
    """Make a running server serve exactly these models.

    New ones are loaded beside the others; one whose settings changed is replaced replica by replica, while its
    requests wait for the next replica; one that is not named any more ends its requests and is unloaded. Models that
    stay as they are notice nothing, and the gateway follows within a second.

    Args:
        gateway: Name of the gateway's application.
        models: The models to serve from now on.
        address: Address of the Ray cluster on which the server runs.

    Raises:
        ServingError: No gateway runs there, or a model cannot be loaded; those that ran before still do.
    """
    models = [_absolute(app) for app in models]
    with connected(RaySection(address=address)):
        running = serve.status().applications
        if gateway not in running:
            raise ServingError(
                f"`--address` is {address!r}, and no gateway runs there. Start it with `eagleray serve` first."
            )
        old = {name: _settings(name) for name in running if name != gateway}
        kept = [app.name for app in models if app.name in old and _same(app, old[app.name])]
        changed = [app for app in _placed(models) if app.name not in kept]
        gone = [name for name in old if name not in {app.name for app in models}]
        try:
            _deploy(changed)
        except ServingError:
            for app in changed:
                if app.name not in old:
                    serve.delete(app.name)
            raise
        for name in gone:
            serve.delete(name)
        return Update(
            loaded=[app.name for app in changed if app.name not in old],
            replaced=[app.name for app in changed if app.name in old],
            unloaded=gone,
            kept=kept,
        )


def serve_yaml(
    gateway: App, models: Sequence[App], *, host: str, port: int, grpc_port: int | None = None
) -> str:
    """The file with which `serve deploy` runs the same applications."""
    grpc = _grpc_options(gateway, grpc_port)
    config = {
        "proxy_location": "HeadOnly",
        "http_options": _http_options(models, host=host, port=port),
        **({} if grpc is None else {"grpc_options": grpc}),
        "applications": [app.config(num_replicas=1) for app in (gateway, *models)],
    }
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)


def check_host(host: str, *, keys: bool, grpc_port: int | None = None) -> None:
    """Refuse an address that other machines may reach, unless API keys are asked for.

    Raises:
        ServingError: It is not a loopback address or gRPC is on, and there are no keys.
    """
    if grpc_port is not None and not keys:
        raise ServingError(
            f"`--grpc-port` is {grpc_port}, and Ray Serve's gRPC listens on all addresses of the machine: everybody there "
            "could use the models. Make API keys with `eagleray keys add NAME FILE` and give the file by `--keys FILE`."
        )
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback and not keys:
        raise ServingError(
            f"`--host` is {host!r}, which other machines may reach: everybody there could use the models. Make API keys "
            "with `eagleray keys add NAME FILE` and give the file by `--keys FILE`, or keep 127.0.0.1."
        )


def model_folder(path: str) -> Path:
    """The absolute folder, if it can hold a model that is safe to load.

    Raises:
        ServingError: It is no folder with safetensors files, or one of them is not whole.
    """
    folder = Path(path).expanduser().resolve()
    if not folder.is_dir():
        raise ServingError(
            f"`model` is {path!r}; there is no such folder on this machine. Give the `model` folder of a run, or "
            "download a model from the hub first."
        )
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ServingError(
            f"`model` is {path!r}; the folder holds no *.safetensors file. Give the `model` folder of a run; weights "
            "in other formats can run code when they are loaded, and are not served."
        )
    for file in files:
        try:
            with safe_open(file, framework="numpy"):  # reads the header and compares it with the size
                pass
        except SafetensorError as error:
            raise ServingError(
                f"`model` is {path!r}; {file.name} in it is damaged ({error}). Copy or export the model again."
            ) from None
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


def _model(app: App) -> ServedModel:
    assert isinstance(app.args, ServedModel)
    return app.args


def _absolute(app: App) -> App:
    folder = model_folder(_model(app).model)
    return replace(app, args=_model(app).model_copy(update={"model": str(folder)}))


def _placed(models: Sequence[App]) -> list[App]:
    """The models with their share of the GPUs, if the cluster has room for all of them."""
    settings = [_model(app) for app in models]
    resources = ray.cluster_resources()
    need = {
        "CPU": sum(args.cpus for args in settings if args.cpus != "auto"),
        "GPU": sum(args.gpus for args in settings if args.gpus != "auto"),
    }
    for name, amount in need.items():
        if amount > resources.get(name, 0):
            raise PlacementError(
                f"The models ask for {amount:g} {name} in all; the cluster has {resources.get(name, 0):g}. Lower "
                f"`{name.lower()}s` of some, or name a larger cluster by `--address`."
            )
    sharing = sum(args.gpus == "auto" for args in settings)
    free = resources.get("GPU", 0) - need["GPU"]
    share = 1.0 if free >= sharing else math.floor(100 * free / sharing) / 100
    return [
        replace(app, args=args.model_copy(update={"gpus": share})) if args.gpus == "auto" else app
        for app, args in zip(models, settings, strict=True)
    ]


def _deploy(apps: Sequence[App], *, access_log: bool = False) -> None:
    if not apps:
        return
    log = LoggingConfig(
        encoding="JSON", log_level="INFO" if access_log else "WARNING", enable_access_log=False
    )
    targets = [
        serve.RunTarget(app.build(), name=app.name, route_prefix=app.route_prefix, logging_config=log)
        for app in apps
    ]
    try:
        serve.run_many(targets)
    except RuntimeError as error:
        raise ServingError(_why_not_running(apps) or str(error)) from error


def _why_not_running(apps: Sequence[App]) -> str:
    """Which model could not be served, and why. Serve's message holds the remote traceback; its last line is the reason."""
    found: list[str] = []
    applications = serve.status().applications
    for app in apps:
        if app.name in applications and isinstance(app.args, ServedModel):
            messages = [d.message.strip() for d in applications[app.name].deployments.values()]
            reasons = [message.splitlines()[-1] for message in messages if message]
            if reasons:
                found.append(f"{app.args.model} could not be served: {' '.join(reasons)}")
    return " ".join(found)


def _settings(name: str) -> dict[str, Any]:
    """The settings with which a model runs."""
    handle: Any = serve.get_app_handle(name)
    return handle.describe.remote().result().settings


def _same(app: App, running: dict[str, Any]) -> bool:
    wanted = app.args.model_dump(mode="json")
    if wanted["gpus"] == "auto":
        wanted["gpus"] = running["gpus"]
    return wanted == running


def _http_options(models: Sequence[App], *, host: str, port: int) -> dict[str, Any]:
    # The applications' own limits answer with a proper body; this one only catches what hangs outside of them.
    longest = max((app.args.timeout_s for app in models if isinstance(app.args, ServedModel)), default=60)
    return {"host": host, "port": port, "request_timeout_s": longest + 10}


def _grpc_options(gateway: App, port: int | None) -> dict[str, Any] | None:
    if port is None or gateway.grpc_servicer is None:
        return None
    return {"port": port, "grpc_servicer_functions": [gateway.grpc_servicer]}


def free_port(host: str, port: int = 0) -> int:
    """The port, or a free one for 0.

    Raises:
        ServingError: Something listens there already.
    """
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
