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


def user_errors(command: Callable[_P, _R], *, status: int = 1) -> Callable[_P, _R]:
    """Turn the errors that bad input raises into one line on stderr and an exit status.

    An option whose value a settings object refuses ends with status 2, as bad usage does.
    """

    @functools.wraps(command)
    def guarded(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return command(*args, **kwargs)
        except ValidationError as error:
            typer.echo(f"error: {_first_fault(error)}", err=True)
            raise typer.Exit(2) from error
        except OSError as error:
            # Without the system's number of the error, where the system is what refused.
            is_systems = error.filename is not None and error.strerror is not None
            reason = f"{error.filename}: {error.strerror}" if is_systems else str(error)
            typer.echo(f"error: {reason}", err=True)
            raise typer.Exit(status) from error
        except (ValueError, FloatingPointError) as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(status) from error

    return guarded


def _first_fault(error: ValidationError) -> str:
    """Which option has what wrong; settings objects name their fields as the options."""
    fault = error.errors()[0]
    said = fault["msg"].removeprefix("Value error, ")
    if not fault["loc"]:
        return said
    option = "--" + str(fault["loc"][-1]).replace("_", "-")
    return f"{option}: {said} (got {fault['input']!r})"
