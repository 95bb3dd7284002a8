"""Jobs on a cluster through Ray's job server: token, package, log, exit code.

What `ray job submit` leaves to its user is done here: the token is sent where the cluster asks for one, the working
tree is found from any folder, and a log that breaks off is taken up again where it stopped.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

import eagleray
from eagleray.platform.environment import checkout

STOPPED = 130
"""Exit code of a job that somebody stopped."""

_NOT_SHIPPED = {".git", ".venv"}
_PATIENCE_S = 60


class SubmissionError(ValueError):
    """The cluster did not take the job; the message says why and what to do."""


@contextmanager
def package(files: dict[str, str]) -> Iterator[Path]:
    """The folder that a job runs in: this code, so that the cluster runs the same, and some files more.

    The code is the working tree or, where Eagleray is installed as a package, that package. It is linked, not copied;
    Ray follows the links and leaves out what `.rayignore` and `.gitignore` name.

    Args:
        files: Name -> text of the further files.
    """
    with tempfile.TemporaryDirectory(prefix="eagleray-submit-") as name:
        folder, tree = Path(name), checkout()
        for entry in tree.iterdir() if tree else [Path(eagleray.__file__).parent]:
            if entry.name not in _NOT_SHIPPED | files.keys():
                (folder / entry.name).symlink_to(entry)
        if tree is None:
            (folder / ".rayignore").write_text("__pycache__/\n", encoding="utf-8")
        for file, text in files.items():
            (folder / file).write_text(text, encoding="utf-8")
        yield folder


class JobServer:
    """The job server of a cluster; made by `connect`."""

    def __init__(self, address: str, *, token: str | None) -> None:
        from ray.job_submission import JobSubmissionClient  # a second to import

        self._address, self._uses_token = address, token is not None
        self._client: Any = JobSubmissionClient(
            address, headers={"Authorization": f"Bearer {token}"} if token else {}
        )

    def submit(self, job_id: str, entrypoint: str, folder: Path, *, metadata: dict[str, str]) -> None:
        """Send a folder and start a command in it.

        Raises:
            SubmissionError: The cluster refuses the job.
        """
        try:
            self._client.submit_job(
                entrypoint=entrypoint,
                submission_id=job_id,
                runtime_env={"working_dir": str(folder)},
                metadata=metadata,
            )
        except (RuntimeError, ValueError, OSError) as error:
            raise SubmissionError(f"{self._address} did not take the job: {error}") from error

    def command(self, verb: str, job_id: str) -> str:
        """The `ray job` command that does something with a job of this cluster."""
        prefix = "RAY_AUTH_MODE=token " if self._uses_token else ""
        return f"{prefix}ray job {verb} --address {self._address} {job_id}"

    def follow(self, job_id: str, write: Callable[[str], Any]) -> int:
        """Write the log of a job until it ends; return its exit code.

        A job that ended without one (its environment could not be made, or its node died) counts as 1, one that
        was stopped as `STOPPED`; why is written after its log.

        Raises:
            SubmissionError: The cluster is out of reach for a minute.
        """
        asyncio.run(self._follow_log(job_id, write))
        info = self._client.get_job_info(job_id)
        if info.status == "SUCCEEDED":
            return 0
        if info.status == "STOPPED":
            write(f"{job_id} was stopped.\n")
            return STOPPED
        if info.driver_exit_code is None:
            write(f"{info.message}\n")
        return info.driver_exit_code or 1

    async def _follow_log(self, job_id: str, write: Callable[[str], Any]) -> None:
        """Every new connection tells the log from its start, so that what was shown is skipped."""
        from aiohttp import ClientError

        shown, heard = 0, time.monotonic()
        while True:
            position = 0
            try:
                async for text in self._client.tail_job_logs(job_id):
                    write(text[max(0, shown - position) :])
                    position += len(text)
                    shown, heard = max(shown, position), time.monotonic()
                if self._client.get_job_status(job_id).is_terminal():
                    return
                heard = time.monotonic()
            except (RuntimeError, OSError, ClientError) as error:  # what `requests` raises is an OSError
                if time.monotonic() - heard > _PATIENCE_S:
                    raise SubmissionError(
                        f"The log of {job_id} broke off, and the cluster is out of reach: {error}. The job may go on; "
                        f"look with `{self.command('status', job_id)}`."
                    ) from error
            await asyncio.sleep(1)


def connect(address: str) -> JobServer:
    """The job server behind the dashboard at `address`, with the caller's token if the cluster asks for one.

    Raises:
        SubmissionError: Nothing answers there, or the token is missing or wrong.
    """
    if not address.startswith(("http://", "https://")):
        raise SubmissionError(
            f"The address is {address!r}; jobs go to the dashboard of the head node, e.g. http://head:8265."
        )
    token, status = None, _status(address, None)
    if status == 401:
        # Only to a server that asks: a token lets its reader run code on the cluster.
        token = _read_token(address)
        status = _status(address, token)
    if status in (401, 403):
        raise SubmissionError(
            f"{address} refuses the token. Set RAY_AUTH_TOKEN_PATH to the file with that cluster's token."
        )
    if status != 200:
        raise SubmissionError(
            f"{address} answers {status} and is no Ray dashboard. Give that of the head node, e.g. http://head:8265."
        )
    return JobServer(address, token=token)


def _status(address: str, token: str | None) -> int:
    """What the server says to a request with this token."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        return httpx.get(f"{address.rstrip('/')}/api/version", headers=headers, timeout=20).status_code
    except httpx.HTTPError as error:
        raise SubmissionError(
            f"Nothing answers at {address} ({error}). Is the cluster up, and its port (8265) reachable from here?"
        ) from error


def _read_token(address: str) -> str:
    """The caller's token, looked for where Ray looks."""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise SubmissionError(
            f"{address} asks for a token, and there is none in RAY_AUTH_TOKEN or {path}. Copy the file "
            "~/.ray/auth_token of the head node, and set RAY_AUTH_TOKEN_PATH to the copy."
        ) from error
