"""`speechllm serve`: the HTTP server."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import os
import socket
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.settings import (
    SettingError,
    Settings,
    flag_of,
    read_settings,
    unknown_variables,
    variable_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastapi import FastAPI

_log = logging.getLogger(__name__)

_FAILED = 1
_BAD_USAGE = 2


def with_settings(command: Callable[[Settings], None]) -> Callable[..., None]:
    """Give a command one option for each of the settings' fields, with its help and default."""

    @functools.wraps(command)
    def parsed(**options: Any) -> None:  # noqa: ANN401 - as many types as fields
        command(_settings({name: value for name, value in options.items() if value is not None}))

    parameters = []
    for name, field in Settings.model_fields.items():
        flag = flag_of(name)
        option = typer.Option(
            f"{flag}/--no-{flag.removeprefix('--')}" if field.annotation is bool else flag,
            help=f"{field.description} \\[env: {variable_of(name)}]",
            show_default=str(field.default),
        )
        # Typer shows the default; None tells a flag that was given from one that was not.
        annotation: Any = Annotated[_flag_type(field.annotation) | None, option]
        parameters.append(
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
            )
        )
    parsed.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads it
    parsed.__annotations__ = {each.name: each.annotation for each in parameters}
    return parsed


def _flag_type(annotation: Any) -> Any:  # noqa: ANN401 - a type expression
    """Return the type Typer parses; choices stay texts, which the settings check."""
    return annotation if annotation in {int, float, str, bool} else str


def _settings(options: dict[str, Any]) -> Settings:
    try:
        return read_settings(**options)
    except SettingError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(_BAD_USAGE) from error


@with_settings
def serve(settings: Settings) -> None:
    """Serve a checkpoint over HTTP.

    Every option is also an environment variable; the flag wins.
    """
    from server.log import configure_logging

    configure_logging(settings.log_level)
    _warn_of_variables(settings)
    listener = _listen(settings.host, settings.port)
    try:
        failure = (_serve_alone if settings.front_ends == 1 else _serve_together)(
            settings, listener
        )
    except SettingError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(_BAD_USAGE) from error
    if failure is not None:
        typer.echo(f"error: cannot serve {settings.model}: {failure}", err=True)
        raise typer.Exit(_FAILED)


def _serve_alone(settings: Settings, listener: socket.socket) -> Exception | None:
    """Serve in this process; returns why the model has failed, if it has."""
    from server.app import create_app
    from server.front_end import serve as serve_http

    def announced(end: Callable[[], None]) -> FastAPI:
        app = create_app(settings, on_failure=end)
        _announce(settings, listener)
        return app

    return serve_http(announced, listener).failure


def _serve_together(settings: Settings, listener: socket.socket) -> Exception | None:
    """Run the engine in this process, and front ends in others."""
    import uvloop

    from server.keys import KeyRing
    from server.preflight import check_model_settings
    from server.supervisor import supervise

    if not hasattr(os, "memfd_create"):
        raise SettingError("front_ends", "more than one needs Linux")
    check_model_settings(settings)
    keys = KeyRing.from_settings(settings.api_keys.get_secret_value(), settings.api_keys_file)
    _announce(settings, listener)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(supervise(settings, listener, keys=len(keys.owners)))


def _warn_of_variables(settings: Settings) -> None:
    """Tell of variables without the effect that their names promise.

    They are not refused: an orchestrator may set some of its own, as Kubernetes does for a service
    whose name is `speechllm`.
    """
    from server.client import API_KEY_VARIABLE

    for name, meant in unknown_variables(os.environ).items():
        hint = f"; is {meant} meant?" if meant else ""
        _log.warning("%s sets nothing: there is no such setting%s", name, hint)
    has_keys = settings.api_keys.get_secret_value() or settings.api_keys_file
    if os.environ.get(API_KEY_VARIABLE) and not has_keys:
        _log.warning(
            "%s is read by clients only, and this server lets everybody in; is %s meant?",
            API_KEY_VARIABLE,
            variable_of("api_keys"),
        )


def _listen(host: str, port: int) -> socket.socket:
    """Bind before anything is loaded, so that a port in use shows at once."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # asyncio turns Nagle's algorithm off only where the protocol is named; with it, an answer
        # whose body follows its head waits 40 ms for the client's delayed acknowledgement.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()  # of two that begin at once, both may bind
    except OSError as error:
        typer.echo(f"error: cannot listen on {host}:{port}: {error.strerror}", err=True)
        raise typer.Exit(_FAILED) from error
    return listener


def _announce(settings: Settings, listener: socket.socket) -> None:
    host = settings.host if ":" not in settings.host else f"[{settings.host}]"
    url = f"http://{host}:{listener.getsockname()[1]}"
    typer.echo(f"Serving {settings.model} at {url} once the model is loaded ({url}/health/ready)")
    typer.echo(f"Try it: curl -F file=@recording.wav {url}/transcribe")
    typer.echo(f"In a browser: {url}")
    typer.echo(f"The API: {url}/docs")
