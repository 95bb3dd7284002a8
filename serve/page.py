"""The page at `/`: plain files of this package, and the rule that a browser loads nothing for it from elsewhere."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles

FOLDER = Path(__file__).with_name("web")
FILES = "/web/"
"""Where the page's files are; like the page itself they hold nothing worth a key."""

_POLICY = {
    "default-src": "'self'",
    "img-src": "'self' blob: data:",  # the picture that was dropped
    "media-src": "blob:",  # the recording
    "base-uri": "'none'",
    "form-action": "'self'",
    "frame-ancestors": "'none'",
}


def add_page(app: FastAPI) -> None:
    """Serve the page; before a catch-all is mounted."""
    app.mount(FILES.rstrip("/"), StaticFiles(directory=FOLDER))

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        policy = "; ".join(f"{what} {where}" for what, where in _POLICY.items())
        return FileResponse(FOLDER / "index.html", headers={"Content-Security-Policy": policy})
