"""Serving trained models from one machine: what `eagleray serve` does, and `serving` for programs.

    eagleray serve gram=runs/demo/model
    eagleray serve gram=runs/demo/model gram.max_responses=16 --port 9000
    eagleray serve gram=runs/demo/model --print-yaml > gram.yaml

The server is bound to this machine only: there are no API keys yet, so anybody who reaches the port may use it.
"""

from __future__ import annotations

import ipaddress
import shlex
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
import yaml
from ray import serve
from ray.serve.schema import LoggingConfig
from rich.console import Console

from eagleray.platform.cluster import check_placement, connected
from eagleray.platform.config import Config, load_config, validate_config
from eagleray.platform.sections import RaySection
from eagleray.serve.gram import ServeGramArgs, build_app, check_model_folder

_APPLICATION = "gram"
_EXAMPLE = '{"prompt": "Name a river in Peru.", "a": "The Ucayali.", "b": "Probably the Nile."}'


class ServingError(ValueError):
    """The server cannot be started; the message says why and what to do."""


class ServeConfig(Config):
    """What `eagleray serve` takes as `key=value`."""

    gram: ServeGramArgs
    """The reward model; `gram=FOLDER` is short for `gram.model=FOLDER`."""


def serve_models(
    settings: Sequence[str],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    address: str | None = None,
    print_yaml: bool = False,
    insecure_bind: bool = False,
) -> None:
    """Serve until Ctrl-C, or print the configuration for `serve deploy`.

    Args:
        settings: `gram=FOLDER`, and `gram.KEY=VALUE` for any field of `ServeGramArgs`.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        address: Address of a running Ray cluster. Default: a private local one.
        print_yaml: Print the YAML and stop; nothing is started.
        insecure_bind: Allow a `host` that other machines can reach.
    """
    args = _parse(settings)
    _check_host(host, insecure_bind=insecure_bind)
    console = Console()
    if print_yaml:
        console.print(serve_yaml(args, host=host, port=port), markup=False, soft_wrap=True, end="")
        return
    try:
        with _running(args, host=host, port=port, address=address, access_log=True) as url:
            console.print(f"Serving {args.model} at {url} (interactive documentation: {url}/docs). Try:\n")
            header = "'content-type: application/json'"
            console.print(
                f"  curl -s {url}/compare -H {header} -d {shlex.quote(_EXAMPLE)}\n",
                markup=False,
                soft_wrap=True,
            )
            console.print("Ctrl-C stops it after the requests in progress.")
            while True:
                time.sleep(3600)
    except KeyboardInterrupt:
        console.print("Stopped.")


@contextmanager
def serving(model: str | Path, *, port: int = 0, address: str | None = None, **limits: Any) -> Iterator[str]:
    """A GRAM model behind HTTP on this machine, for the length of the block.

    Uses the Ray that is connected; else starts a private local one (or connects to `address`) and ends it after.

    Args:
        model: Model folder.
        port: Port on the loopback address; 0 takes a free one.
        address: Address of a running Ray cluster.
        limits: Further fields of `ServeGramArgs`.

    Yields:
        The base URL; requests are answered.

    Raises:
        ServingError: Ray Serve runs already on the cluster, the port is taken, or the model could not be loaded.
    """
    args = validate_config(ServeGramArgs, {"model": str(model), **limits}, "serving")
    with _running(args, host="127.0.0.1", port=port, address=address, access_log=False) as url:
        yield url


def serve_yaml(args: ServeGramArgs, *, host: str, port: int) -> str:
    """The file for `serve deploy` that runs the same application."""
    application = {
        "name": _APPLICATION,
        "route_prefix": "/",
        "import_path": "eagleray.serve.gram:build_app",
        "args": args.model_dump(mode="json", exclude_none=True),
        "deployments": [{"name": "gram", "num_replicas": 1}],
    }
    config = {
        "proxy_location": "HeadOnly",
        "http_options": _http_options(args, host=host, port=port),
        "applications": [application],
    }
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)


@contextmanager
def _running(
    args: ServeGramArgs, *, host: str, port: int, address: str | None, access_log: bool
) -> Iterator[str]:
    args = args.model_copy(update={"model": str(check_model_folder(args.model))})
    port = _free_port(host, port)
    with connected(RaySection(address=address)):
        args = _with_cores(args)
        use_gpu = "auto" if args.gpus == "auto" else args.gpus > 0
        check_placement(RaySection(cpus_per_worker=args.cpus, use_gpu=use_gpu))
        if serve.status().proxies:
            raise ServingError(
                "Ray Serve runs already on this cluster, and its address cannot be changed. Stop it (`serve shutdown`), "
                "or add the model to it: `eagleray serve ... --print-yaml > gram.yaml; serve deploy gram.yaml`."
            )
        try:
            serve.start(
                proxy_location="HeadOnly",
                http_options=_http_options(args, host=host, port=port),
                logging_config=LoggingConfig(log_level="WARNING"),
            )
            try:
                _deploy(args, access_log=access_log)
                yield f"http://{f'[{host}]' if ':' in host else host}:{port}"
            finally:
                # Deleting first lets the requests in progress end; a shutdown alone would cut them off.
                with suppress(TimeoutError):
                    serve.delete(_APPLICATION)
        finally:
            serve.shutdown()


def _deploy(args: ServeGramArgs, *, access_log: bool) -> None:
    log = LoggingConfig(log_level="INFO" if access_log else "WARNING", enable_access_log=access_log)
    try:
        serve.run(build_app(args), name=_APPLICATION, route_prefix="/", logging_config=log)
    except RuntimeError as error:
        # Serve's message holds the remote traceback; its last line is the reason.
        deployments = serve.status().applications[_APPLICATION].deployments.values()
        reasons = [
            status.message.strip().splitlines()[-1] for status in deployments if status.message.strip()
        ]
        raise ServingError(f"{args.model} could not be served: {' '.join(reasons) or error}") from error


def _http_options(args: ServeGramArgs, *, host: str, port: int) -> dict[str, Any]:
    # The application's own limit answers with a proper body; this one only catches what hangs outside of it.
    return {"host": host, "port": port, "request_timeout_s": args.timeout_s + 10}


def _parse(settings: Sequence[str]) -> ServeGramArgs:
    kinds = ServeConfig.model_fields
    expanded = []
    for setting in settings:
        key, separator, value = setting.partition("=")
        expanded.append(f"{key}.model={value}" if separator and key in kinds else setting)
    return load_config(ServeConfig, overrides=expanded).gram


def _check_host(host: str, *, insecure_bind: bool) -> None:
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


def _with_cores(args: ServeGramArgs) -> ServeGramArgs:
    """On one machine and without a GPU, the model gets all cores unless the user said otherwise."""
    resources = ray.cluster_resources()
    if "cpus" in args.model_fields_set or resources.get("GPU", 0) >= 1 or len(ray.nodes()) > 1:
        return args
    return args.model_copy(update={"cpus": resources["CPU"]})
