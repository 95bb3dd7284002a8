"""What `eagleray serve` does, and `serving` for programs that need a running server.

    eagleray serve gram=runs/demo/model
    eagleray serve gram=runs/demo/model gram.max_responses=16 nast=runs/nast/model --port 9000
    eagleray serve gram:small=runs/a/model gram:large=runs/b/model gram:large.gpus=1
    eagleray serve gram=runs/demo/model --print-yaml > gram.yaml

`jobs` and `serve` stand side by side and do not import each other; an application is reached by its import path,
here as in Ray Serve's own YAML.
"""

from __future__ import annotations

import importlib
import re
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from pydantic import create_model
from rich.console import Console

from eagleray.platform.config import Config, load_config, validate_config
from eagleray.platform.keys import read_keys
from eagleray.platform.kuberay import ray_service, split_settings
from eagleray.platform.serving import (
    App,
    ServedModel,
    ServingError,
    check_host,
    running,
    serve_yaml,
    update,
)

APPLICATIONS = {
    "gram": "eagleray.serve.gram",
    "lisa": "eagleray.serve.lisa",
    "lrhp": "eagleray.serve.lrhp",
    "nast": "eagleray.serve.nast",
    "rovrm": "eagleray.serve.rovrm",
}
"""Kind of model -> module with the application's `build_app` and its argument, the config class `Args`."""

GATEWAY = "eagleray.serve.gateway"
"""The application in front of them."""

GRPC = "eagleray.serve.rpc.add_gateway_to_server"
"""Its service."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")
_SYNTAX = (
    "Write KIND=FOLDER, or KIND:NAME=FOLDER for several of one kind, and KIND.KEY=VALUE or KIND:NAME.KEY=VALUE for "
    f"settings, with a kind of: {', '.join(sorted(APPLICATIONS))}."
)

_PAIR = '{"prompt": "Name a river in Peru.", "a": "The Ucayali.", "b": "Probably the Nile."}'
_CHAT = '{"model": "MODEL", "messages": [{"role": "user", "content": "Name a river in Peru."}]}'
_LABELLED = '{"prompt": "Name a river in Peru.", "chosen": "The Ucayali.", "rejected": "Probably the Nile."}'
_EXAMPLES = {
    "gram": f"/compare -H 'content-type: application/json' -d {shlex.quote(_PAIR)}",
    "lisa": f"/v1/chat/completions -H 'content-type: application/json' -d {shlex.quote(_CHAT)}",
    "lrhp": f"/represent -H 'content-type: application/json' -d {shlex.quote(_LABELLED)}",
    "nast": "/translate --data-binary @recording.wav",
    "rovrm": "/score -F prompt='How many cups?' -F responses=Two. -F responses=Five. -F image=@cups.png",
}
"""Kind of model -> the rest of a `curl` command that tries it."""


def serve_models(
    settings: Sequence[str],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    grpc_port: int | None = None,
    address: str | None = None,
    print_yaml: bool = False,
    keys: Path | None = None,
) -> None:
    """Serve until Ctrl-C, or print the configuration for `serve deploy`.

    Args:
        settings: `KIND=FOLDER` or `KIND:NAME=FOLDER`, and `KIND.KEY=VALUE` for any field of the kind's `Args`.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        grpc_port: Port for gRPC, which needs `keys`; None: no gRPC.
        address: Address of a running Ray cluster. Default: a private local one.
        print_yaml: Print the YAML and stop; nothing is started.
        keys: File of API keys; without one no key is asked for, and only this machine may be listened on.
    """
    models = parse_models(settings)
    check_host(host, keys=keys is not None, grpc_port=grpc_port)
    if keys is not None:
        read_keys(keys)
    console = Console(soft_wrap=True, markup=False, highlight=False)
    if print_yaml:
        console.print(serve_yaml(gateway(keys), models, host=host, port=port, grpc_port=grpc_port), end="")
        return
    try:
        door = {"host": host, "port": port, "grpc_port": grpc_port}
        with running(gateway(keys), models, **door, address=address, access_log=True) as url:
            console.print(f"Serving at {url} (documentation: {url}/docs). Try:\n")
            for app in models:
                console.print(f"  curl -s {url}{_EXAMPLES[app.deployment].replace('MODEL', app.name)}\n")
            ray_address = ray.get_runtime_context().gcs_address
            console.print(
                f"Other models without a stop: eagleray serve --update --address {ray_address} KIND=FOLDER..."
            )
            console.print("Ctrl-C stops it after the requests in progress.")
            while True:
                time.sleep(3600)
    except KeyboardInterrupt:
        console.print("Stopped.")


def update_models(settings: Sequence[str], *, address: str | None) -> None:
    """Change what a running server serves, and say what changed.

    Args:
        settings: As in `serve_models`: all models to serve from now on.
        address: Address of the Ray cluster on which the server runs; `eagleray serve` prints it.
    """
    if address is None:
        raise ServingError("`--update` needs the `--address` that `eagleray serve` printed when it started.")
    done = update("gateway", parse_models(settings), address=address)
    for word, names in vars(done).items():
        if names:
            print(f"{word}: {', '.join(names)}")


def render(settings: Sequence[str], *, keys: Path | None = None) -> str:
    """The YAML of a KubeRay RayService that serves models.

    Args:
        settings: As in `serve_models`, and `kube.KEY=VALUE` for the fields of `KubeSection`.
        keys: File of API keys on the pods' shared volume.
    """
    kube, settings = split_settings(settings)
    models = parse_models(settings)
    sharing = sum(_settings(app).gpus == "auto" for app in models)
    placed = [
        replace(
            app,
            args=_settings(app).model_copy(
                update={
                    "model": kube.on_storage(_settings(app).model, key=f"{app.deployment}.model"),
                    "cpus": 1.0 if _settings(app).cpus == "auto" else _settings(app).cpus,
                    "gpus": float(kube.gpu) / sharing
                    if _settings(app).gpus == "auto"
                    else _settings(app).gpus,
                }
            ),
        )
        for app in models
    ]
    return ray_service(
        kube,
        name=f"serve-{models[0].name.lower().replace('_', '-')}" if len(models) == 1 else "serve-models",
        gateway=gateway(None if keys is None else kube.on_storage(str(keys), key="--keys")).config(),
        models=[app.config() for app in placed],
        cpus=sum(float(_settings(app).cpus) for app in placed),
        gpu=any(float(_settings(app).gpus) > 0 for app in placed),
    )


@contextmanager
def serving(
    model: str | Path, *, kind: str = "gram", port: int = 0, address: str | None = None, **limits: Any
) -> Iterator[str]:
    """A model behind HTTP on this machine, for the length of the block; see `platform.serving.running`.

    Args:
        model: Model folder.
        kind: Kind of model, a key of `APPLICATIONS`, which is also the model's name.
        port: Port on the loopback address; 0 takes a free one.
        address: Address of a running Ray cluster. Default: the connected one, or a private local one.
        limits: Further fields of the application's `Args`.

    Yields:
        The base URL; requests are answered.
    """
    args = validate_config(_args_class(kind), {"model": str(model), "name": kind, **limits}, "serving")
    with running(gateway(), [_app(kind, args)], port=port, address=address) as url:
        yield url


def parse_models(settings: Sequence[str]) -> list[App]:
    """The models that settings name, in the order of their first mention.

    `gram=FOLDER` is short for `gram:gram=FOLDER`: a model of kind `gram` with the name `gram`. `gram:NAME.KEY=VALUE`
    sets a field of its arguments.

    Raises:
        ServingError: No model is named, a kind is not known, or two models have one name.
        ConfigError: A field is missing, unknown or not allowed.
    """
    kinds: dict[str, str] = {}
    folders: set[str] = set()
    for setting in settings:
        section, _, key = setting.partition("=")[0].partition(".")
        kind, colon, name = section.partition(":")
        if kind not in APPLICATIONS or (colon and not _NAME.fullmatch(name)):
            raise ServingError(f"{setting!r} names no model. {_SYNTAX}")
        if key == "name":
            raise ServingError(f"{setting!r}: a model gets its name by `{kind}:NAME=FOLDER`.")
        if key == "" and section in folders:
            raise ServingError(
                f"`{section}` is given twice. Several models of one kind need names: `{kind}:first=FOLDER "
                f"{kind}:second=FOLDER`."
            )
        if key == "":
            folders.add(section)
        kinds.setdefault(section, kind)
    if not kinds:
        raise ServingError(f"No model is named. {_SYNTAX}")
    names = [section.partition(":")[2] or kind for section, kind in kinds.items()]
    if twice := {name for name in names if names.count(name) > 1 or name == "gateway"}:
        raise ServingError(f"The name `{twice.pop()}` is taken; each model needs a name of its own.")
    settings = [s.replace("=", ".model=", 1) if s.partition("=")[0] in kinds else s for s in settings]
    # One section for each model, so that messages name keys as they were written.
    sections: dict[str, Any] = {section: (_args_class(kind), ...) for section, kind in kinds.items()}
    config = load_config(create_model("ServeConfig", __base__=Config, **sections), overrides=settings)
    return [
        _app(kind, getattr(config, section).model_copy(update={"name": name}))
        for (section, kind), name in zip(kinds.items(), names, strict=True)
    ]


def _app(kind: str, args: ServedModel) -> App:
    assert args.name is not None
    return App(args.name, f"{APPLICATIONS[kind]}:build_app", args, deployment=kind)


def gateway(keys: str | Path | None = None) -> App:
    """The application in front of the models."""
    args = importlib.import_module(GATEWAY).Args(keys=None if keys is None else str(keys))
    return App(
        "gateway",
        f"{GATEWAY}:build_app",
        args,
        deployment="gateway",
        route_prefix="/",
        grpc_servicer=GRPC,
    )


def _settings(app: App) -> ServedModel:
    assert isinstance(app.args, ServedModel)
    return app.args


def _args_class(kind: str) -> type[ServedModel]:
    return importlib.import_module(APPLICATIONS[kind]).Args
