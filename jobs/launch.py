"""Starting a job and ending it well: `eagleray train` and `python -m eagleray.jobs.<name>` behave alike.

What a user did wrong is one message and exit code 2; Ctrl-C says how to resume and is exit code 130, a
termination signal 143; anything else is our bug and keeps its traceback.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler
from rich.text import Text

from eagleray.jobs.registry import JOBS, job_name, load_job
from eagleray.platform.config import load_config
from eagleray.platform.remote import is_uri, open_folder
from eagleray.platform.runs import RunFinishedError, RunInterrupted

USER_ERROR = 2
"""Exit code; that of a run stopped by a signal is 128 and the signal's number, as in a shell."""

_TRACEBACK_VARIABLE = "EAGLERAY_TRACEBACK"


def run_job(job: str, argv: Sequence[str] | None = None) -> None:
    """Run one job from the command line; the body of `if __name__ == "__main__":` in its module.

    The job is imported again under its real name: classes and functions of `__main__` would differ from those
    that Ray's workers import.

    Args:
        job: Name of the job in `registry.JOBS`.
        argv: Command-line arguments; default: those of the process.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {JOBS[job]}", epilog=f"`eagleray config schema {job}` lists all keys."
    )
    parser.add_argument("--config", type=Path, help="YAML file; without it all values come from key=value")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. optim.lr=2e-5")
    arguments = parser.parse_intermixed_args(argv)
    start(job, arguments.config, arguments.overrides)


def start(job: str | None, config: Path | None, overrides: Sequence[str]) -> None:
    """Load the config of a job and run it.

    Args:
        job: Name of the job; `None`: the one that the file names.
        config: A YAML file; `None` starts from the defaults.
        overrides: `key=value` settings.
    """
    configure_logging()
    with clean_exit():
        if job is None:
            assert config is not None
            job = job_name(config)
        module = load_job(job)
        module.main(load_config(module.Config, config, overrides))


@contextmanager
def clean_exit() -> Iterator[None]:
    """End the process on what a user did, with a message in place of a traceback."""
    try:
        yield
    except RunFinishedError as finished:
        # Asking again for what is done is no error: a scheduler that restarts its jobs must see a success.
        _say("Nothing to do", str(finished), style="bold green")
        raise SystemExit(0) from None
    except KeyboardInterrupt as stop:
        _say("Interrupted", _how_to_resume(stop), style="bold yellow")
        raise SystemExit(128 + getattr(stop, "signal", signal.SIGINT)) from None
    except Exception as error:
        found = find_user_error(error)
        if found is None:
            raise
        if os.environ.get(_TRACEBACK_VARIABLE):
            traceback.print_exception(error)
        _say("Error", str(found), style="bold red")
        raise SystemExit(USER_ERROR) from None


def find_user_error(error: BaseException) -> ValueError | None:
    """The part of an error that speaks to the user, or `None` if the error is a bug.

    A user error is a `ValueError` of a class of ours, or one that code of ours raised: that is what we use
    `ValueError` for (internal mistakes are assertions). Ray's wrappers are opened, because the text of an
    error that comes from a worker is a traceback.
    """
    failures = getattr(error, "worker_failures", None) or {}
    inner = [getattr(error, name, None) for name in ("cause", "controller_failure", "_base_exc")]
    for candidate in (*inner, *failures.values()):
        if isinstance(candidate, BaseException):
            found = find_user_error(candidate)
            if found is not None:
                return found
    if isinstance(error, ValueError) and (_class_is_ours(error) or _raised_by_us(error)):
        return error
    return None


def configure_logging() -> None:
    """Our own messages from INFO, those of others from WARNING, on standard error."""
    if sys.stderr.isatty():
        handler: logging.Handler = RichHandler(console=Console(stderr=True), show_path=False, markup=False)
        handler.setFormatter(logging.Formatter("%(message)s", datefmt="%H:%M:%S"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("eagleray").setLevel(logging.INFO)


def resume_command(place: str) -> str:
    """The shell command that goes on with an interrupted run."""
    folder = open_folder(place).path
    if folder.is_relative_to(Path.cwd()):
        folder = folder.relative_to(Path.cwd())
    run_dir = place if is_uri(place) else folder
    return f"eagleray train {shlex.quote(str(folder / 'config.yaml'))} {shlex.quote(f'run.dir={run_dir}')}"


def _how_to_resume(stop: KeyboardInterrupt) -> str:
    if isinstance(stop, RunInterrupted):
        return f"resume the run with\n  {resume_command(stop.place)}"
    return str(stop) or "no run had begun."


def _class_is_ours(error: BaseException) -> bool:
    return any(base.__module__.startswith("eagleray.") for base in type(error).__mro__)


def _raised_by_us(error: BaseException) -> bool:
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and frames[-1].f_globals.get("__name__", "").startswith("eagleray.")


def _say(label: str, message: str, *, style: str) -> None:
    # Text, not a string: a message may hold brackets that rich would take for markup.
    Console(stderr=True).print(
        Text(f"{label}: ", style=style) + Text(message, style="default"), soft_wrap=True
    )
