"""`GET /docs`: Swagger UI from the installed packages, so that it works without the internet."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Literal

from fastapi import APIRouter
from fastapi.responses import FileResponse, HTMLResponse, Response

router = APIRouter(include_in_schema=False)

# The wheel of fastapi-offline holds the files of Swagger UI 5, which shows OpenAPI 3.1.
_STATIC = Path(str(resources.files("fastapi_offline"))) / "static"
_ASSETS = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "favicon.png": "image/png",
}
# Addresses are relative, so that the page works behind a proxy that adds a prefix.
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>speechllm API</title>
<link rel="icon" href="docs/favicon.png">
<link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""
_START = """SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  persistAuthorization: false,
  presets: [SwaggerUIBundle.presets.apis],
});
"""
# Swagger UI sets styles on its elements and draws with images in data URLs.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


@router.get("/docs")
async def page() -> HTMLResponse:
    """Show the API, to try out."""
    return HTMLResponse(_PAGE, headers={"Content-Security-Policy": _POLICY})


@router.get("/docs/start.js")
async def start() -> Response:
    """Start Swagger UI: a file of its own, since the page's policy forbids scripts within it."""
    return Response(_START, media_type="text/javascript")


@router.get("/docs/{name}")
async def asset(
    name: Literal["swagger-ui-bundle.js", "swagger-ui.css", "favicon.png"],
) -> FileResponse:
    """Return one of Swagger UI's files."""
    return FileResponse(_STATIC / name, media_type=_ASSETS[name])
