"""What can be checked about serving without a cluster: hosts, ports, model folders, revisions, the YAML."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ray.serve.schema import ServeDeploySchema
from safetensors.torch import save_file

from eagleray.platform.config import Config
from eagleray.platform.serving import (
    App,
    ServedModel,
    ServingError,
    check_host,
    model_folder,
    model_revision,
    running,
    serve_yaml,
)

GATEWAY = App("gateway", "no.gateway:build", Config(), deployment="gateway", route_prefix="/")


def model(folder: Path | str, **settings: Any) -> App:
    args = ServedModel.model_validate({"model": str(folder), "name": "x", **settings})
    return App("x", "some.module:build", args, deployment="kind")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As much of a model as the checks look at."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"w": torch.zeros(3)}, folder / "model.safetensors")
    (folder / "gram.json").write_text(json.dumps({"swap_average": "prob"}))
    return folder


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_this_machine_is_allowed(host: str) -> None:
    check_host(host, keys=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_other_hosts_need_keys(host: str) -> None:
    with pytest.raises(ServingError, match=r"other machines may reach.*eagleray keys add"):
        check_host(host, keys=False)
    check_host(host, keys=True)


def test_grpc_needs_keys_as_it_listens_on_all_addresses() -> None:
    with pytest.raises(ServingError, match=r"`--grpc-port` is 9000.*all addresses.*eagleray keys add"):
        check_host("127.0.0.1", keys=False, grpc_port=9000)
    check_host("127.0.0.1", keys=True, grpc_port=9000)


def test_a_taken_port_is_named(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(ServingError, match=rf"Cannot listen on 127.0.0.1:{port}.*Choose another port"),
            running(GATEWAY, [model(folder)], port=port),
        ):
            pass


def test_only_folders_with_safetensors_are_served(tmp_path: Path, folder: Path) -> None:
    assert model_folder(str(folder)) == folder
    with pytest.raises(ServingError, match="there is no such folder"):
        model_folder(str(tmp_path / "missing"))
    whole = (folder / "model.safetensors").read_bytes()
    for part in (whole[:-1], whole[:20], b"cut off"):
        (folder / "model.safetensors").write_bytes(part)
        with pytest.raises(ServingError, match=r"model.safetensors in it is damaged \(.+\). Copy"):
            model_folder(str(folder))
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ServingError, match=r"no \*.safetensors file.*not served"):
        model_folder(str(folder))


def test_the_revision_follows_weights_files_and_settings(folder: Path) -> None:
    revisions = [model_revision(folder, "fp32"), model_revision(folder, "bf16")]
    (folder / "README.md").write_text("decides nothing")
    assert model_revision(folder, "fp32") == revisions[0]
    (folder / "gram.json").write_text(json.dumps({"swap_average": "logit"}))
    revisions.append(model_revision(folder, "fp32"))
    save_file({"w": torch.ones(3)}, folder / "model.safetensors")
    revisions.append(model_revision(folder, "fp32"))
    assert len(set(revisions)) == 4


def test_the_yaml_is_what_serve_deploy_takes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    app = model("model", cpus=2, timeout_s=5)
    values = yaml.safe_load(serve_yaml(GATEWAY, [app], host="127.0.0.1", port=8123))
    ServeDeploySchema.model_validate(values)
    assert values["http_options"] == {"host": "127.0.0.1", "port": 8123, "request_timeout_s": 15}
    door, application = values["applications"]
    assert door["route_prefix"] == "/" and application["route_prefix"] is None
    assert application["import_path"] == "some.module:build"
    assert application["deployments"] == [{"name": "kind", "num_replicas": 1}]
    args = ServedModel.model_validate(application["args"])
    assert args == app.args.model_copy(update={"model": str(folder)})


def test_a_replica_takes_what_the_arguments_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # another test's cluster may be connected
    assert ServedModel(model="m", cpus=3, gpus=0.5).actor_options() == {"num_cpus": 3, "num_gpus": 0.5}
    assert ServedModel(model="m").actor_options() == {"num_cpus": 1, "num_gpus": 0}  # without a cluster
    with pytest.raises(ValueError, match="must be greater than 0, or 'auto'"):
        ServedModel(model="m", cpus=0)
