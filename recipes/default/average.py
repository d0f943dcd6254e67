"""Move a checkpoint's weights towards another's, or its encoder towards a published Whisper's.

    average.py --model CHECKPOINT --towards OTHER --share 0.5 --output FOLDER

Fine-tuning on few voices forgets others; between the weights of two runs that began alike lies what
both of them know. Wortsman et al. 2022: "Robust fine-tuning of zero-shot models" for the encoder,
"Model soups" for the rest.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from model.checkpoint import load_encoder, load_model, load_processor, read_config_file, save_model

if TYPE_CHECKING:
    from torch import nn


def average(model: nn.Module, other: nn.Module, share: float) -> None:
    """Move every parameter of `model` by a share of the way to that of `other`.

    Raises:
        ValueError: their parameters differ in name or shape.
    """
    own, others = dict(model.named_parameters()), dict(other.named_parameters())
    shapes = [{name: each.shape for name, each in side.items()} for side in (own, others)]
    if shapes[0] != shapes[1]:
        raise ValueError("the two have other parameters")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.lerp_(others[name].to(parameter.dtype), share)


def main() -> None:
    """Write a checkpoint between two, in 16 bit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of a speech LLM")
    parser.add_argument("--towards", type=Path, required=True, help="of another, or of a Whisper")
    parser.add_argument("--share", type=float, default=0.5, help="of the way to it, 0 to 1")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    options = parser.parse_args()
    speech_llm = load_model(options.model, dtype=torch.float32)
    kind = read_config_file(options.towards / "config.json").get("model_type")
    if kind == "whisper":
        published = load_encoder(options.towards, speech_llm.config, torch.float32)
        average(speech_llm.encoder, published, options.share)
    else:
        average(speech_llm, load_model(options.towards, dtype=torch.float32), options.share)
    processor = load_processor(options.model)
    save_model(speech_llm, options.output, processor=processor, dtype=torch.float16)


if __name__ == "__main__":
    main()
