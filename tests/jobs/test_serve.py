"""The settings of `eagleray serve`; the server itself is tested in tests/serve/test_gram.py."""

from __future__ import annotations

import importlib

import pytest
import yaml

from eagleray.jobs.serve import APPLICATIONS, serve_models
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
    [application] = values["applications"]
    assert application["import_path"] == "eagleray.serve.gram:build_app"
    assert application["args"]["model"] == "/models/judge"
    assert application["args"]["max_responses"] == 7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], "no model is named. Write KIND=FOLDER"),
        (["grim=x"], "the settings name grim"),
        (["gram.max_responses=3"], r"`gram.model` is required"),
        (["gram=x", "gram.max_response=3"], r"did you mean `gram.max_responses`"),
        (["gram=x", "gram.timeout_s=0"], r"`gram.timeout_s`.*greater than 0"),
        (["gram=x", "gram.max_pending=10"], "could never be admitted"),
    ],
)
def test_wrong_settings_are_explained(settings: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        serve_models(settings, print_yaml=True)


def test_other_hosts_are_refused() -> None:
    with pytest.raises(ServingError, match="no API keys"):
        serve_models(["gram=x"], host="0.0.0.0")
