"""What a run ran on: code version, package versions and hardware, for the manifest."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import eagleray

PACKAGES = (
    "torch",
    "torchaudio",
    "ray",
    "deepspeed",
    "transformers",
    "datasets",
    "peft",
    "trl",
    "numpy",
    "pydantic",
)
"""Packages whose versions can change a result."""

_ROOT = Path(eagleray.__file__).resolve().parent.parent


def checkout() -> Path | None:
    """The working tree that this code runs from; `None` if it is installed as a package."""
    return _ROOT if (_ROOT / "pyproject.toml").is_file() else None


def in_submitted_job() -> bool:
    """Whether this process is the driver of a submitted job (`ray job submit`), which belongs to that cluster."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def describe_environment() -> dict[str, Any]:
    """Versions, git state and hardware of this process; nothing heavy is imported to find them."""
    return {
        "eagleray": eagleray.__version__,
        "git": git_state(_ROOT),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": package_versions(),
        "host": socket.gethostname(),
        "hardware": hardware(),
    }


def package_versions() -> dict[str, str]:
    """Installed versions of `PACKAGES`; what is not installed is left out."""
    versions: dict[str, str] = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def git_state(checkout: Path) -> dict[str, Any] | None:
    """Commit of a checkout and whether tracked files differ from it; `None` outside a checkout.

    Only a folder that is itself the top of a checkout counts: an installed package may lie in the virtual
    environment of somebody else's repository.
    """
    if not (checkout / ".git").exists():
        return None
    commit = _output("git", "-C", str(checkout), "rev-parse", "HEAD")
    if not commit:
        return None
    changes = _output("git", "-C", str(checkout), "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def hardware() -> dict[str, Any]:
    """Usable CPU cores, memory and GPUs of this machine; the cluster may have more."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    gpus = _output("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader") or ""
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30, 1),
        "gpus": [line.strip() for line in gpus.splitlines()],
    }


def _output(*command: str) -> str | None:
    """Standard output of a command; `None` if it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
