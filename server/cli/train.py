"""`speechllm train …` and `speechllm cache`: the recipe's stages."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.cli.failures import user_errors

if TYPE_CHECKING:
    from model.data.manifest import Utterance
    from model.training.loop import LoopConfig, Stage

train_app = typer.Typer(no_args_is_help=True, help="Train a stage; every one resumes after a kill.")

Output = Annotated[Path, typer.Option(help="Run folder; holds the product at the end.")]
Manifests = Annotated[list[Path], typer.Option("--manifest", help="Training manifest; repeatable.")]
Dev = Annotated[list[Path] | None, typer.Option("--dev", help="Validation manifest; repeatable.")]
AudioRoot = Annotated[Path | None, typer.Option(help="Folder that audio paths are relative to.")]
Epochs = Annotated[int, typer.Option(min=1)]
LearningRate = Annotated[float, typer.Option(help="Peak of the schedule.")]
Warmup = Annotated[int, typer.Option(min=0, help="Optimiser steps of linear warm-up.")]
WeightDecay = Annotated[float, typer.Option(min=0.0)]
Accumulation = Annotated[int, typer.Option(min=1, help="Batches for one optimiser step.")]
Precision = Annotated[str, typer.Option(help="bf16 (autocast) or fp32.")]
Seed = Annotated[int, typer.Option(help="Of everything random.")]
BatchSeconds = Annotated[float, typer.Option(help="Padded audio seconds in a batch.")]
MaxSteps = Annotated[int | None, typer.Option(help="Stop after so many steps; resumable.")]
SaveEvery = Annotated[float, typer.Option(help="Seconds between states on disk.")]
Tensorboard = Annotated[bool, typer.Option(help="Also log for TensorBoard.")]
Concatenation = Annotated[float, typer.Option(help="Share of utterances that are joined.")]
Augment = Annotated[bool, typer.Option(help="Speed, gain, noise, reverberation, telephone band.")]
NoiseDir = Annotated[Path | None, typer.Option(help="Recordings of noise for augmentation.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that decode and augment.")]
MaxAudio = Annotated[float, typer.Option(help="Longer utterances are left out, seconds.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]


def _read(manifests: list[Path] | None, audio_root: Path | None) -> list[Utterance]:
    from model.data.manifest import read_manifest

    return [u for manifest in manifests or [] for u in read_manifest(manifest, audio_root)]


def _run(stage: Stage, loop: LoopConfig, output: Path, identity: dict[str, Any]) -> None:
    from model.training.loop import TrainingLoop

    run = TrainingLoop(stage, loop, output, identity)
    if run.run():
        typer.echo(f"written to {output}")
        return
    typer.echo(f"stopped at step {run.progress.step}; the same command goes on from there")
    if loop.max_steps is None or run.progress.step < loop.max_steps:
        raise typer.Exit(1)


@train_app.command("whisper")
@user_errors
def train_whisper(
    manifest: Manifests,
    output: Output,
    whisper: Annotated[str, typer.Option(help="Folder or hub id.")] = "openai/whisper-tiny",
    dev: Dev = None,
    audio_root: AudioRoot = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Replace the decoder's vocabulary by this tokenizer's.")
    ] = None,
    language: Annotated[str | None, typer.Option(help="Whisper's language token.")] = None,
    init: Annotated[str, typer.Option(help="pretrained or random (an ablation).")] = "pretrained",
    encoder_mode: Annotated[str, typer.Option(help="padded or trimmed.")] = "padded",
    ctc_weight: Annotated[float, typer.Option(help="Share of an auxiliary CTC loss.")] = 0.0,
    label_smoothing: Annotated[float, typer.Option()] = 0.0,
    dropout: Annotated[float, typer.Option()] = 0.0,
    spec_augment: Annotated[bool, typer.Option(help="SpecAugment.")] = False,
    new_parameters_lr_scale: Annotated[float, typer.Option()] = 5.0,
    epochs: Epochs = 10,
    learning_rate: LearningRate = 1e-4,
    warmup_steps: Warmup = 500,
    weight_decay: WeightDecay = 0.01,
    grad_accumulation: Accumulation = 1,
    precision: Precision = "bf16",
    seed: Seed = 0,
    max_batch_audio_s: BatchSeconds = 120.0,
    max_audio_s: MaxAudio = 30.0,
    concatenation: Concatenation = 0.0,
    augment: Augment = False,
    noise_dir: NoiseDir = None,
    workers: Workers = 1,
    max_steps: MaxSteps = None,
    save_every_s: SaveEvery = 300.0,
    tensorboard: Tensorboard = False,
) -> None:
    """Fine-tune a Whisper encoder-decoder: the encoder to serve, and the baseline to beat."""
    from model.training.loop import LoopConfig
    from model.training.speech_data import SpeechDataConfig
    from model.training.whisper import WhisperStage, WhisperStageConfig

    loop = LoopConfig(
        epochs=epochs, learning_rate=learning_rate, warmup_steps=warmup_steps,
        weight_decay=weight_decay, grad_accumulation=grad_accumulation, precision=precision,
        seed=seed, max_steps=max_steps, save_every_s=save_every_s, tensorboard=tensorboard,
    )  # fmt: skip
    data = SpeechDataConfig(
        max_batch_audio_s=max_batch_audio_s, max_audio_s=max_audio_s, concatenation=concatenation,
        augment=augment, noise_dir=noise_dir, workers=workers,
    )  # fmt: skip
    config = WhisperStageConfig(
        whisper=whisper, tokenizer=tokenizer, init=init, encoder_mode=encoder_mode,
        ctc_weight=ctc_weight, label_smoothing=label_smoothing, dropout=dropout,
        spec_augment=spec_augment, new_parameters_lr_scale=new_parameters_lr_scale, data=data,
    )  # fmt: skip
    stage = WhisperStage(
        config, _read(manifest, audio_root), _read(dev, audio_root), language, seed
    )
    _run(stage, loop, output, {"kind": "whisper", **config.model_dump(mode="json")})


@train_app.command("connector")
@user_errors
def train_connector(
    output: Output,
    manifest: Annotated[list[Path] | None, typer.Option(help="Manifest; repeatable.")] = None,
    cache: Annotated[list[Path] | None, typer.Option(help="Feature cache; repeatable.")] = None,
    model: Annotated[str | None, typer.Option(help="Checkpoint to go on from.")] = None,
    encoder: Annotated[str, typer.Option(help="Folder or hub id.")] = "openai/whisper-tiny",
    llm: Annotated[str, typer.Option(help="Folder or hub id.")] = "Qwen/Qwen2.5-0.5B-Instruct",
    dev: Dev = None,
    audio_root: AudioRoot = None,
    stack_size: Annotated[int, typer.Option(help="Encoder frames in one audio embedding.")] = 5,
    connector_hidden_size: Annotated[int, typer.Option()] = 2048,
    ctc: Annotated[str, typer.Option(help="none, auxiliary or fused.")] = "none",
    encoder_mode: Annotated[
        str | None, typer.Option(help="padded or trimmed; default: as the encoder was tuned.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What the user turn asks.")] = None,
    language: Annotated[list[str] | None, typer.Option(help="ISO 639-1 code; repeatable.")] = None,
    lora: Annotated[bool, typer.Option(help="Train a LoRA adapter on the LLM.")] = False,
    lora_r: Annotated[int, typer.Option()] = 8,
    lora_alpha: Annotated[int, typer.Option()] = 32,
    lora_targets: Annotated[str, typer.Option(help="Comma-separated, or all-linear.")] = (
        "q_proj,v_proj"
    ),
    train_encoder: Annotated[bool, typer.Option(help="Train the encoder too.")] = False,
    train_llm: Annotated[bool, typer.Option(help="Train the whole LLM.")] = False,
    random_encoder: Annotated[
        bool, typer.Option(help="Random encoder weights (ablation).")
    ] = False,
    encoder_lr_scale: Annotated[float, typer.Option()] = 0.2,
    llm_lr_scale: Annotated[float, typer.Option()] = 0.5,
    ctc_weight: Annotated[float, typer.Option(help="Weight of the auxiliary CTC loss.")] = 0.2,
    stored_dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "bf16",
    epochs: Epochs = 10,
    learning_rate: LearningRate = 1e-4,
    warmup_steps: Warmup = 1000,
    weight_decay: WeightDecay = 0.01,
    grad_accumulation: Accumulation = 1,
    precision: Precision = "bf16",
    seed: Seed = 0,
    max_batch_audio_s: BatchSeconds = 120.0,
    max_audio_s: MaxAudio = 30.0,
    concatenation: Concatenation = 0.0,
    augment: Augment = False,
    spec_augment: Annotated[
        bool, typer.Option(help="SpecAugment, or its like on features.")
    ] = True,
    noise_dir: NoiseDir = None,
    workers: Workers = 1,
    max_steps: MaxSteps = None,
    save_every_s: SaveEvery = 300.0,
    tensorboard: Tensorboard = False,
) -> None:
    """Train the connector; with --lora, --train-encoder or --train-llm those too."""
    from model.assembly import Parts, assemble
    from model.checkpoint import load_model, load_processor
    from model.configuration import DEFAULT_PROMPT
    from model.training.connector import ConnectorStage, ConnectorStageConfig, LoraSettings
    from model.training.feature_cache import FeatureCache, fingerprint, merge_clips
    from model.training.loop import LoopConfig
    from model.training.speech_data import SpeechDataConfig

    if bool(manifest) == bool(cache):
        raise typer.BadParameter("give either --manifest or --cache")
    loop = LoopConfig(
        epochs=epochs, learning_rate=learning_rate, warmup_steps=warmup_steps,
        weight_decay=weight_decay, grad_accumulation=grad_accumulation, precision=precision,
        seed=seed, max_steps=max_steps, save_every_s=save_every_s, tensorboard=tensorboard,
    )  # fmt: skip
    data = SpeechDataConfig(
        max_batch_audio_s=max_batch_audio_s, max_audio_s=max_audio_s, concatenation=concatenation,
        augment=augment, noise_dir=noise_dir, workers=workers,
    )  # fmt: skip
    targets: Any = lora_targets if lora_targets == "all-linear" else tuple(lora_targets.split(","))
    config = ConnectorStageConfig(
        train_encoder=train_encoder, train_llm=train_llm,
        lora=LoraSettings(r=lora_r, alpha=lora_alpha, target_modules=targets) if lora else None,
        encoder_lr_scale=encoder_lr_scale, llm_lr_scale=llm_lr_scale, ctc_weight=ctc_weight,
        feature_augment=spec_augment, spec_augment=spec_augment, stored_dtype=stored_dtype,
        data=data,
    )  # fmt: skip
    parts = Parts(
        encoder=encoder, llm=llm,
        connector={"stack_size": stack_size, "hidden_size": connector_hidden_size}, ctc=ctc,
        encoder_mode=encoder_mode, prompt=DEFAULT_PROMPT if prompt is None else prompt,
        languages=tuple(language or ()), random_encoder=random_encoder, seed=seed,
    )  # fmt: skip
    if model is not None:
        import torch

        speech_llm = load_model(model, dtype=torch.float32, merge_lora=True)
        speech_llm.config.lora = None
        processor = load_processor(model)
    else:
        speech_llm, processor = assemble(parts)
    if train_encoder:
        speech_llm.config.encoder = "encoder"
    if train_llm:
        speech_llm.config.llm = "llm"
    train: Any = _read(manifest, audio_root)
    if cache:
        identity = fingerprint(speech_llm, processor)
        train = merge_clips(FeatureCache(folder, identity) for folder in cache)
    stage = ConnectorStage(speech_llm, processor, config, train, _read(dev, audio_root), seed)
    record = {
        "kind": "connector",
        "model": model,
        "parts": str(parts),
        **config.model_dump(mode="json"),
    }
    _run(stage, loop, output, record)


@train_app.command("tokenizer")
@user_errors
def train_tokenizer_command(
    text: Annotated[list[Path], typer.Option(help="Text, a sentence a line; repeatable.")],
    output: Output,
    vocab_size: Annotated[int, typer.Option(help="Entries, bytes and specials included.")] = 2048,
) -> None:
    """Learn a byte-level BPE with ChatML's special tokens."""
    from model.training.tokenizer import train_tokenizer

    lines = [line for path in text for line in path.read_text(encoding="utf-8").splitlines()]
    tokenizer = train_tokenizer(lines, vocab_size)
    tokenizer.save_pretrained(output)
    typer.echo(f"{len(tokenizer)} entries, written to {output}")


@train_app.command("lm")
@user_errors
def train_language_model(
    text: Annotated[list[Path], typer.Option(help="Text, or JSONL manifests; repeatable.")],
    tokenizer: Annotated[str, typer.Option(help="Folder of the tokenizer.")],
    output: Output,
    dev_text: Annotated[list[Path] | None, typer.Option(help="Held-out text.")] = None,
    hidden_size: Annotated[int, typer.Option()] = 384,
    intermediate_size: Annotated[int, typer.Option()] = 960,
    layers: Annotated[int, typer.Option()] = 6,
    heads: Annotated[int, typer.Option()] = 6,
    key_value_heads: Annotated[int, typer.Option()] = 2,
    reading: Annotated[float, typer.Option(help="Share of sentences read from a copy.")] = 0.8,
    prompt: Annotated[str, typer.Option(help="What the user turn asks.")] = "",
    batch_tokens: Annotated[int, typer.Option(help="Padded target tokens in a batch.")] = 4096,
    curriculum: Annotated[
        float, typer.Option(help="Share of the first epoch that goes from easy to full reading.")
    ] = 0.0,
    epochs: Epochs = 10,
    learning_rate: LearningRate = 1e-3,
    warmup_steps: Warmup = 200,
    weight_decay: WeightDecay = 0.05,
    grad_accumulation: Accumulation = 1,
    precision: Precision = "bf16",
    seed: Seed = 0,
    max_steps: MaxSteps = None,
    save_every_s: SaveEvery = 300.0,
    tensorboard: Tensorboard = False,
) -> None:
    """Pre-train a small Qwen2 on text, where no published LLM can be had."""
    from model.training.language_model import LanguageModelConfig, LanguageModelStage, read_lines
    from model.training.loop import LoopConfig

    loop = LoopConfig(
        epochs=epochs, learning_rate=learning_rate, warmup_steps=warmup_steps,
        weight_decay=weight_decay, grad_accumulation=grad_accumulation, precision=precision,
        seed=seed, max_steps=max_steps, save_every_s=save_every_s, tensorboard=tensorboard,
    )  # fmt: skip
    config = LanguageModelConfig(
        tokenizer=tokenizer, hidden_size=hidden_size, intermediate_size=intermediate_size,
        layers=layers, heads=heads, key_value_heads=key_value_heads, reading=reading,
        prompt=prompt, batch_tokens=batch_tokens, curriculum=curriculum,
    )  # fmt: skip
    stage = LanguageModelStage(config, read_lines(text), read_lines(dev_text or []), seed)
    _run(stage, loop, output, {"kind": "lm", **config.model_dump(mode="json")})


@user_errors
def cache(
    manifest: Manifests,
    output: Annotated[Path, typer.Option(help="Folder of the cache.")],
    encoder: Annotated[str, typer.Option(help="Folder or hub id.")] = "openai/whisper-tiny",
    llm: Annotated[
        str, typer.Option(help="Folder or hub id; its tokenizer makes the targets.")
    ] = "Qwen/Qwen2.5-0.5B-Instruct",
    encoder_mode: Annotated[
        str | None, typer.Option(help="padded or trimmed; default: as the encoder was tuned.")
    ] = None,
    audio_root: AudioRoot = None,
    plain_copies: Annotated[int, typer.Option(help="0 leaves the plain recordings out.")] = 1,
    augmented_copies: Annotated[int, typer.Option(help="Augmented copies of each clip.")] = 0,
    noise_dir: NoiseDir = None,
    max_batch_audio_s: BatchSeconds = 120.0,
    max_audio_s: MaxAudio = 30.0,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Store encoder outputs and token ids, so that `train connector` need not encode again."""
    from model.assembly import Parts, assemble
    from model.training.caching import CachingConfig, write_cache
    from model.transcription import pick_device

    model, processor = assemble(Parts(encoder=encoder, llm=llm, encoder_mode=encoder_mode))
    config = CachingConfig(
        plain_copies=plain_copies, augmented_copies=augmented_copies,
        noise_dir=str(noise_dir) if noise_dir else None, max_batch_audio_s=max_batch_audio_s,
        max_audio_s=max_audio_s, seed=seed,
    )  # fmt: skip
    model = model.to(pick_device(device))
    count = write_cache(model, processor, _read(manifest, audio_root), config, output)
    typer.echo(f"{count} clips in {output}")
