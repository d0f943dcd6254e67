"""Whose a request is, by its bearer key."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from server.api.dependencies import RuntimeDependency  # noqa: TC001 - FastAPI reads it
from server.api.upload import discard_body
from server.errors import ApiKeyError

_scheme = HTTPBearer(
    auto_error=False, description="One of the server's API keys, if it has been given any."
)


async def _owner(
    request: Request,
    runtime: RuntimeDependency,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_scheme)],
) -> str:
    try:
        owner = runtime.keys.owner(credentials.credentials if credentials else None)
    except ApiKeyError:
        await discard_body(request, runtime.settings.max_upload_bytes)
        raise
    if len(runtime.keys):
        request.state.log_fields = {"key": owner}
    return owner


OwnerDependency = Annotated[str, Depends(_owner)]
"""Name of the key's owner; refuses requests without a key where keys are needed."""
