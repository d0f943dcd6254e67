"""`speechllm lexicon`: give a checkpoint the words that its answers are likely made of."""

from __future__ import annotations

from collections import Counter
from pathlib import Path  # noqa: TC003 - Typer reads annotations at run time
from typing import Annotated

import typer

from server.cli.failures import user_errors


@user_errors
def lexicon(
    model: Annotated[Path, typer.Option(help="Folder of the checkpoint, which is changed.")],
    text: Annotated[list[Path], typer.Option(help="Text, or JSONL manifests; repeatable.")],
    penalty: Annotated[
        float, typer.Option(help="Of each word that is not in it, in nats of the joint score.")
    ] = 3.0,
    min_count: Annotated[int, typer.Option(min=1, help="Leave rarer words out.")] = 1,
) -> None:
    """List a text's words in a checkpoint: beams that spell others are held back."""
    from model.checkpoint import write_lexicon
    from model.lexicon import words_of
    from model.training.language_model import read_lines

    counts = Counter(word for line in read_lines(text) for word in words_of(line))
    words = [word for word, count in counts.items() if count >= min_count]
    if not words:
        raise ValueError(f"no word stands {min_count} times in the text")
    write_lexicon(model, words, penalty)
    typer.echo(f"{len(words)} words in {model / 'lexicon.txt'}")
