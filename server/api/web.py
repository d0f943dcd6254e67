"""`GET /`: the page for people, or what is where for programs; and the page's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import FileResponse, JSONResponse, Response

from server.api.dependencies import RuntimeDependency  # noqa: TC001 - FastAPI reads it
from server.api.health import version
from server.api.schemas import IndexBody

router = APIRouter(tags=["health"])

_FOLDER = Path(__file__).parents[1] / "web"
_MEDIA_TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
_FILES = {path.name: path for path in _FOLDER.iterdir() if path.suffix in _MEDIA_TYPES}
# Everything comes from this server; the audio that is played is the page's own.
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; media-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Permissions-Policy": "microphone=(self), camera=(), geolocation=()",
}
_FRESH = {"Cache-Control": "no-cache"}  # or a page would run with files of an earlier version
_ANSWER: dict[int | str, dict[str, Any]] = {
    200: {
        "model": IndexBody,
        "content": {"text/html": {"schema": {"type": "string"}}},
        "description": "The page where Accept names text/html, else what is where.",
    }
}


@router.get("/", response_class=JSONResponse, response_model=None, responses=_ANSWER)
async def index(request: Request, runtime: RuntimeDependency) -> Response:
    """Show the page to browsers, and say what is where to others."""
    vary = {"Vary": "Accept"}
    if "text/html" in request.headers.get("accept", ""):
        return _file("index.html", {**_PAGE_HEADERS, **vary})
    body = IndexBody(
        name="speechllm",
        version=version(),
        model=runtime.settings.served_name,
        endpoints={
            "POST /transcribe": "a recording in the multipart field 'file' -> its text",
            "POST /v1/audio/transcriptions": "the same, as OpenAI's API has it",
            "WS /v1/realtime": "audio while it is spoken -> text, as OpenAI's API has it",
            "GET /v1/models": "the models that can be asked for",
            "GET /docs": "this API, to try out",
            "GET /health/ready": "200 while requests are taken",
            "GET /metrics": "for Prometheus",
        },
    )
    return JSONResponse(body.model_dump(), headers={**_FRESH, **vary})


@router.get("/web/{name}", include_in_schema=False)
async def file(name: str) -> FileResponse:
    """Return one of the page's files."""
    if name not in _FILES:
        raise HTTPException(404, "Not Found")
    return _file(name, {})


def _file(name: str, headers: dict[str, str]) -> FileResponse:
    path = _FILES[name]
    return FileResponse(path, media_type=_MEDIA_TYPES[path.suffix], headers={**_FRESH, **headers})
