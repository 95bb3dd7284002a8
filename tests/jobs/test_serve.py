"""The settings of `eagleray serve`; the server itself is tested in tests/serve/test_gram.py."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import yaml

from eagleray.jobs.serve import APPLICATIONS, parse_models, serve_models
from eagleray.platform.keys import KeyFileError, add_key
from eagleray.platform.serving import ServedModel, ServingError


@pytest.mark.parametrize("module", APPLICATIONS.values())
def test_every_application_has_a_builder_and_its_arguments(module: str) -> None:
    application = importlib.import_module(module)
    assert issubclass(application.Args, ServedModel)
    # Ray Serve reads this annotation; were it a string, wrong YAML would reach the model unchecked.
    assert application.build_app.__annotations__["args"] is application.Args


def test_print_yaml_starts_nothing_and_takes_settings(capsys: pytest.CaptureFixture[str]) -> None:
    serve_models(["gram=/models/judge", "gram.max_responses=7"], port=9000, print_yaml=True)
    values = yaml.safe_load(capsys.readouterr().out)
    assert values["http_options"]["port"] == 9000
    gateway, application = values["applications"]
    assert gateway["import_path"] == "eagleray.serve.gateway:build_app"
    assert application["import_path"] == "eagleray.serve.gram:build_app" and application["name"] == "gram"
    assert application["args"]["model"] == "/models/judge"
    assert application["args"]["max_responses"] == 7


def test_models_have_kinds_names_and_settings() -> None:
    models = parse_models(["gram:small=/a", "nast=/b", "gram:large=/c", "gram:small.max_responses=5"])
    assert [(app.name, app.deployment) for app in models] == [
        ("small", "gram"),
        ("nast", "nast"),
        ("large", "gram"),
    ]
    small = models[0].args.model_dump()
    assert (small["name"], small["model"], small["max_responses"]) == ("small", "/a", 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], "No model is named. Write KIND=FOLDER, or KIND:NAME=FOLDER"),
        (["grim=x"], "'grim=x' names no model. Write KIND=FOLDER"),
        (["gram:=x"], "'gram:=x' names no model"),
        (["gram:a.b=x", "gram:a=y"], r"unknown key `gram:a\.b`"),
        (["gram=x", "gram=y"], "`gram` is given twice.*`gram:first=FOLDER gram:second=FOLDER`"),
        (["gram=x", "lisa:gram=y"], "The name `gram` is taken"),
        (["gram:gateway=x"], "The name `gateway` is taken"),
        (["gram=x", "gram.name=y"], "a model gets its name by `gram:NAME=FOLDER`"),
        (["gram.max_responses=3"], r"`gram.model` is required"),
        (["gram=x", "gram.max_response=3"], r"did you mean `gram.max_responses`"),
        (["gram=x", "gram.timeout_s=0"], r"`gram.timeout_s`.*greater than 0"),
        (["gram=x", "gram.max_pending=10"], "could never be admitted"),
    ],
)
def test_wrong_settings_are_explained(settings: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        serve_models(settings, print_yaml=True)


def test_other_hosts_need_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ServingError, match=r"other machines may reach.*`--keys FILE`"):
        serve_models(["gram=x"], host="0.0.0.0")
    with pytest.raises(KeyFileError, match=r"There is no file .*eagleray keys add"):
        serve_models(["gram=x"], host="0.0.0.0", keys=tmp_path / "keys.json")
    add_key(tmp_path / "keys.json", "me")
    serve_models(["gram=x"], host="0.0.0.0", keys=tmp_path / "keys.json", print_yaml=True)
    values = yaml.safe_load(capsys.readouterr().out)
    assert values["applications"][0]["args"] == {"keys": str(tmp_path / "keys.json")}
