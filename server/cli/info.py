"""`speechllm info`: what a checkpoint is, and what it would run on."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from server.cli.failures import user_errors


@user_errors
def info(
    model: Annotated[str, typer.Option(help="Checkpoint folder or hub id.")] = "weights/default",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Load a checkpoint and print its parts, sizes and limits as JSON."""
    import platform

    import torch
    import transformers

    from model.transcription import Transcriber

    transcriber = Transcriber.from_pretrained(model, device)
    config, lexicon = transcriber.config, transcriber.model.lexicon
    parts = {
        name: sum(parameter.numel() for parameter in part.parameters())
        for name, part in transcriber.model.named_children()
    }
    description = {
        "model": model,
        "parameters": {**parts, "total": sum(parts.values())},
        "encoder_mode": config.encoder_mode,
        "connector": config.connector,
        "llm": config.get_text_config().model_type,
        "ctc": config.ctc,
        "ctc_tokens": config.ctc_tokens,
        "ctc_decoding_weight": config.ctc_decoding_weight,
        "lexicon_words": len(lexicon.words) if lexicon is not None else 0,
        "lexicon_penalty": config.lexicon_penalty,
        "prompt": config.prompt,
        "context_templates": transcriber.processor.context_templates,
        "languages": config.languages,
        "max_audio_s": transcriber.max_audio_s,
        "device": str(transcriber.device),
        "dtype": str(transcriber.model.dtype).removeprefix("torch."),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    typer.echo(json.dumps(description, ensure_ascii=False, indent=2))
