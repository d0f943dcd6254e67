"""A user's mistake ends a command with one clear line, not a traceback."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import typer
from pydantic import ValidationError

if TYPE_CHECKING:
    from collections.abc import Callable

_P = ParamSpec("_P")
_R = TypeVar("_R")


def user_errors(command: Callable[_P, _R]) -> Callable[_P, _R]:
    """Turn the errors that bad input raises into one line on stderr and exit status 1."""

    @functools.wraps(command)
    def guarded(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return command(*args, **kwargs)
        except ValidationError as error:
            first = error.errors()[0]
            option = "--" + "-".join(str(part) for part in first["loc"]).replace("_", "-")
            typer.echo(f"error: {option}: {first['msg']} (got {first['input']!r})", err=True)
            raise typer.Exit(1) from error
        except (ValueError, OSError, FloatingPointError) as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from error

    return guarded
