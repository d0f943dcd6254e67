"""The real application in this process, and a client for it."""

import asyncio
import contextlib

import httpx

from server.app import create_app


@contextlib.asynccontextmanager
async def serving(settings, engine=None):
    app = create_app(settings, engine)
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client,
    ):
        client.app = app
        yield client


async def until_ready(client):
    while (await client.get("/health/ready")).json()["status"] == "loading":  # noqa: ASYNC110 - a state, no event
        await asyncio.sleep(0.02)


def upload(data, name="recording.wav"):
    return {"files": {"file": (name, data)}}


def error_of(response):
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "code", "param", "request_id"}
    assert body["error"]["request_id"] == response.headers["x-request-id"]
    return body["error"]
