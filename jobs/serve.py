"""What `eagleray serve` does, and `serving` for programs that need a running server.

    eagleray serve gram=runs/demo/model
    eagleray serve gram=runs/demo/model gram.max_responses=16 --port 9000
    eagleray serve gram=runs/demo/model --print-yaml > gram.yaml

The server is bound to this machine only: there are no API keys yet, so anybody who reaches the port may use it.
`jobs` and `serve` stand side by side and do not import each other; an application is reached by its import path,
here as in Ray Serve's own YAML.
"""

from __future__ import annotations

import importlib
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import create_model
from rich.console import Console

from eagleray.platform.config import Config, load_config, validate_config
from eagleray.platform.kuberay import ray_service, split_settings
from eagleray.platform.serving import (
    ServedModel,
    ServingError,
    check_host,
    running,
    serve_application,
    serve_yaml,
)

APPLICATIONS = {
    "gram": "eagleray.serve.gram",
    "lisa": "eagleray.serve.lisa",
    "lrhp": "eagleray.serve.lrhp",
    "nast": "eagleray.serve.nast",
    "rovrm": "eagleray.serve.rovrm",
}
"""Kind of model -> module with the application's `build_app` and its argument, the config class `Args`."""

_PAIR = '{"prompt": "Name a river in Peru.", "a": "The Ucayali.", "b": "Probably the Nile."}'
_CHAT = '{"model": "model", "messages": [{"role": "user", "content": "Name a river in Peru."}]}'
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
    address: str | None = None,
    print_yaml: bool = False,
    insecure_bind: bool = False,
) -> None:
    """Serve until Ctrl-C, or print the configuration for `serve deploy`.

    Args:
        settings: `KIND=FOLDER`, and `KIND.KEY=VALUE` for any field of the kind's `Args`.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        address: Address of a running Ray cluster. Default: a private local one.
        print_yaml: Print the YAML and stop; nothing is started.
        insecure_bind: Allow a `host` that other machines can reach.
    """
    kind, args = _parse(settings)
    check_host(host, insecure_bind=insecure_bind)
    console = Console(soft_wrap=True, markup=False, highlight=False)
    if print_yaml:
        console.print(serve_yaml(_builder(kind), args, name=kind, host=host, port=port), end="")
        return
    try:
        with running(
            _builder(kind), args, name=kind, host=host, port=port, address=address, access_log=True
        ) as url:
            request = f"curl -s {url}{_EXAMPLES[kind]}"
            console.print(f"Serving {args.model} at {url} (documentation: {url}/docs). Try:\n\n  {request}\n")
            console.print("Ctrl-C stops it after the requests in progress.")
            while True:
                time.sleep(3600)
    except KeyboardInterrupt:
        console.print("Stopped.")


def render(settings: Sequence[str]) -> str:
    """The YAML of a KubeRay RayService that serves a model.

    Args:
        settings: As in `serve_models`, and `kube.KEY=VALUE` for the fields of `KubeSection`.
    """
    kube, settings = split_settings(settings)
    kind, args = _parse(settings)
    args = args.model_copy(
        update={
            "model": kube.on_storage(args.model, key=f"{kind}.model"),
            "gpus": float(kube.gpu) if args.gpus == "auto" else args.gpus,
        }
    )
    assert args.gpus != "auto"
    application = serve_application(_builder(kind), args, name=kind)
    return ray_service(kube, name=f"serve-{kind}", application=application, cpus=args.cpus, gpu=args.gpus > 0)


@contextmanager
def serving(
    model: str | Path, *, kind: str = "gram", port: int = 0, address: str | None = None, **limits: Any
) -> Iterator[str]:
    """A model behind HTTP on this machine, for the length of the block; see `platform.serving.running`.

    Args:
        model: Model folder.
        kind: Kind of model, a key of `APPLICATIONS`.
        port: Port on the loopback address; 0 takes a free one.
        address: Address of a running Ray cluster. Default: the connected one, or a private local one.
        limits: Further fields of the application's `Args`.

    Yields:
        The base URL; requests are answered.
    """
    args = validate_config(_args_class(kind), {"model": str(model), **limits}, "serving")
    with running(_builder(kind), args, name=kind, port=port, address=address) as url:
        yield url


def _parse(settings: Sequence[str]) -> tuple[str, ServedModel]:
    """The kind of model and its arguments; `gram=FOLDER` is short for `gram.model=FOLDER`."""
    kinds = {setting.partition("=")[0].partition(".")[0] for setting in settings}
    if len(kinds) != 1 or not kinds <= APPLICATIONS.keys():
        given = f"the settings name {', '.join(sorted(kinds))}" if kinds else "no model is named"
        raise ServingError(
            f"One model is served at a time, and {given}. Write KIND=FOLDER, and KIND.KEY=VALUE for its settings, "
            f"with one kind of: {', '.join(sorted(APPLICATIONS))}."
        )
    [kind] = kinds
    settings = [s.replace("=", ".model=", 1) if s.startswith(f"{kind}=") else s for s in settings]
    # One section for the kind, so that messages name keys as they were written.
    sections: dict[str, Any] = {kind: (_args_class(kind), ...)}
    config = create_model("ServeConfig", __base__=Config, **sections)
    return kind, getattr(load_config(config, overrides=settings), kind)


def _builder(kind: str) -> str:
    return f"{APPLICATIONS[kind]}:build_app"


def _args_class(kind: str) -> type[ServedModel]:
    return importlib.import_module(APPLICATIONS[kind]).Args
