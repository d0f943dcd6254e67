"""The command line `speechllm`, one module a group of commands; --help waits for no torch."""

from __future__ import annotations

from typing import Annotated

import typer

from server.cli import data
from server.cli.evaluate import compare, evaluate
from server.cli.info import info
from server.cli.lexicon import lexicon
from server.cli.parity import parity
from server.cli.serve import serve
from server.cli.train import cache, train_app
from server.cli.transcribe import transcribe

__all__ = ["app"]

app = typer.Typer(
    name="speechllm",
    help="Train speech LLMs and serve them over HTTP.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(data.app, name="data")
app.add_typer(train_app, name="train")
app.command()(cache)
app.command()(lexicon)
app.command()(evaluate)
app.command()(compare)
app.command()(parity)
app.command()(serve)
app.command()(transcribe)
app.command()(info)


def _print_version(wanted: bool) -> None:
    if wanted:
        from server.api.health import version

        typer.echo(f"speechllm {version()}")
        raise typer.Exit


@app.callback()
def _main(
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print it and end."),
    ] = False,
) -> None:
    pass
