"""`GET /health/live`, `/health/ready` and `/metrics`."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from server.api.dependencies import RuntimeDependency  # noqa: TC001 - FastAPI reads it
from server.api.schemas import HealthBody

router = APIRouter(tags=["health"])

_REASONS = {
    "loading": "the model is loading",
    "draining": "the server is shutting down",
    "failed": "the model has failed",
}
_NOT_READY: dict[int | str, dict[str, Any]] = {
    503: {"model": HealthBody, "description": "Requests are not taken; the reason says why."}
}


@router.get("/health/live")
async def live() -> HealthBody:
    """Answer as long as the process can."""
    return HealthBody(status="alive")


@router.get("/health/ready", responses=_NOT_READY)
async def ready(runtime: RuntimeDependency, response: Response) -> HealthBody:
    """Answer 200 while requests are taken: the model is loaded, warm and not about to go."""
    state = runtime.state
    if state != "ready":
        response.status_code = 503
    return HealthBody(status=state, reason=_REASONS.get(state))


@router.get("/metrics", response_class=Response)
async def metrics(runtime: RuntimeDependency) -> Response:
    """Return all series in Prometheus' text format."""
    return Response(await runtime.render_metrics(), media_type=CONTENT_TYPE_LATEST)


def version() -> str:
    """Return the package's version."""
    try:
        return metadata.version("speechllm")
    except metadata.PackageNotFoundError:  # run from a source tree that is not installed
        return "unknown"
