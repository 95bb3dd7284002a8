"""The layout that docs/decisions/0001-layout.md decides: links, no `__init__.py` at the top, import direction."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from eagleray.jobs.registry import job_name, load_job
from eagleray.platform.config import load_config

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("platform", "models", "jobs", "serve", "tune_spaces")
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))

# Two floors, five arrows between them, and none that runs back.
MAY_IMPORT = {
    "platform": set(),
    "models": set(),
    "tune_spaces": set(),
    "jobs": {"platform", "models", "tune_spaces"},
    "serve": {"platform", "models"},
}


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_package_links_to_the_folder(folder: str) -> None:
    link = ROOT / "eagleray" / folder
    assert os.readlink(link) == f"../{folder}"
    assert link.resolve() == ROOT / folder


@pytest.mark.parametrize("folder", [".", *FOLDERS])
def test_no_init_file_hides_a_library(folder: str) -> None:
    """With an `__init__.py`, `platform/` would hide Python's own `platform`."""
    assert not (ROOT / folder / "__init__.py").exists()


def test_no_init_file_in_tests() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_the_root_on_the_path_leaves_platform_alone() -> None:
    code = "import platform, uuid; print(platform.system())"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "Linux\n"


def test_git_and_ray_see_our_models() -> None:
    """A template's `models/` line would hide our source from git, and from Ray, which reads that file too."""
    lines = {line.strip().strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()}
    assert not lines & set(FOLDERS)


def test_ray_ships_the_package_only() -> None:
    lines = (ROOT / ".rayignore").read_text().split()
    assert {f"/{folder}/" for folder in FOLDERS} <= set(lines)
    assert "eagleray" not in {line.strip("/") for line in lines}


@pytest.mark.parametrize("folder", FOLDERS)
def test_import_direction(folder: str) -> None:
    broken = [
        f"{path.relative_to(ROOT)}: {reason}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for reason in violations(folder, path.relative_to(ROOT), path.read_text(encoding="utf-8"))
    ]
    assert broken == []


@pytest.mark.parametrize(
    ("path", "source", "reason"),
    [
        ("models/gram/judge.py", "import eagleray.platform.runs", "line 1 imports eagleray.platform"),
        (
            "models/gram/judge.py",
            "def f():\n    from eagleray.jobs import cli",
            "line 2 imports eagleray.jobs",
        ),
        ("models/gram/judge.py", "from eagleray import platform", "line 1 imports eagleray.platform"),
        ("models/gram/judge.py", "from ray.data import Dataset", "line 1 imports ray"),
        ("models/gram/judge.py", "from ...platform import runs", "line 1 imports eagleray.platform"),
        ("models/gram/judge.py", "import models.gram", "line 1 imports models without eagleray"),
        ("platform/runs.py", "from eagleray.models.gram import judge", "line 1 imports eagleray.models"),
        ("serve/gram.py", "import eagleray.jobs.cli", "line 1 imports eagleray.jobs"),
        ("tune_spaces/rank.py", "import torch", "line 1 imports torch"),
        ("tune_spaces/rank.py", "import ray", "line 1 imports ray"),
    ],
)
def test_the_check_of_import_direction_finds(path: str, source: str, reason: str) -> None:
    assert list(violations(Path(path).parts[0], Path(path), source)) == [reason]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "models/gram/judge.py",
            "import platform\nfrom eagleray.models.gram import losses\nfrom .losses import f",
        ),
        (
            "platform/environment.py",
            "import platform\nimport eagleray\nimport ray\nfrom eagleray.platform import runs",
        ),
        (
            "jobs/cli.py",
            "from eagleray.platform import runs\nimport eagleray.models.gram\nfrom eagleray import __version__",
        ),
        ("tune_spaces/rank.py", "from __future__ import annotations\nfrom ray import tune\nimport ray.tune"),
    ],
)
def test_the_check_of_import_direction_lets_pass(path: str, source: str) -> None:
    assert list(violations(Path(path).parts[0], Path(path), source)) == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_every_config_file_loads(path: Path) -> None:
    load_config(load_job(job_name(path)).Config, path)


def test_every_paper_has_a_tiny_config() -> None:
    folders = {path.parent for path in CONFIGS}
    assert [folder.name for folder in sorted(folders) if not list(folder.glob("*_tiny.yaml"))] == []


def violations(folder: str, path: Path, source: str) -> Iterator[str]:
    """Imports in a file of `folder` that its floor does not allow."""
    for line, module in imported_modules(path, source):
        top, *rest = module.split(".")
        part = rest[0] if rest else ""
        if top == "eagleray" and part in FOLDERS and part != folder and part not in MAY_IMPORT[folder]:
            yield f"line {line} imports eagleray.{part}"
        elif top in FOLDERS and top != "platform":  # `import platform` is the standard library's
            yield f"line {line} imports {top} without eagleray"
        elif folder == "models" and top == "ray":
            yield f"line {line} imports ray"
        elif folder == "tune_spaces" and not (
            module.startswith("ray.tune") or top == "eagleray" or top in sys.stdlib_module_names
        ):
            yield f"line {line} imports {top}"


def imported_modules(path: Path, source: str) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of everything a file imports, also inside functions."""
    package = ("eagleray", *path.parent.parts)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            if module in ("eagleray", "ray"):  # `from eagleray import models` imports a folder
                yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, module
