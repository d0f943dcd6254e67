"""What endpoints take from the application."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from server.runtime import Runtime


async def _runtime(request: Request) -> Runtime:  # FastAPI hands others to another thread
    runtime = request.app.state.runtime
    if not isinstance(runtime, Runtime):
        raise TypeError("the application was not made by create_app")
    return runtime


RuntimeDependency = Annotated[Runtime, Depends(_runtime)]
