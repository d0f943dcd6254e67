"""`speechllm train …` and `speechllm cache`: the recipe's stages.

Options that several commands share are declared once, by the function that makes a settings
object of them; `@takes` gives them to a command.
"""

import functools
import hashlib
import inspect
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.cli.failures import user_errors

# Annotations are real objects here, for `takes` to hand on to Typer; those in quotes are not.
if TYPE_CHECKING:
    from model.assembly import Parts
    from model.data.manifest import Utterance
    from model.training.connector import LoraSettings
    from model.training.loop import LoopConfig, Stage
    from model.training.speech_data import SpeechDataConfig

train_app = typer.Typer(no_args_is_help=True, help="Train a stage; every one resumes after a kill.")

_option = functools.partial(typer.Option, rich_help_panel="Optimisation")
_data_option = functools.partial(typer.Option, rich_help_panel="Data")
_lora_option = functools.partial(typer.Option, rich_help_panel="LoRA")

Output = Annotated[Path, typer.Option(help="Run folder; holds the product at the end.")]
Manifests = Annotated[list[Path], typer.Option("--manifest", help="Training manifest; repeatable.")]
Dev = Annotated[list[Path] | None, typer.Option("--dev", help="Validation manifest; repeatable.")]
AudioRoot = Annotated[Path | None, typer.Option(help="Folder that audio paths are relative to.")]
Encoder = Annotated[str, typer.Option(help="Folder or hub id.")]
EncoderMode = Annotated[
    str | None, typer.Option(help="padded or trimmed; default: as the encoder was tuned.")
]
BatchSeconds = Annotated[float, _data_option(help="Padded audio seconds in a batch.")]
MaxAudio = Annotated[float, _data_option(help="Longer utterances are left out, seconds.")]
NoiseDir = Annotated[Path | None, _data_option(help="Recordings of noise for augmentation.")]
Positions = Annotated[
    str, typer.Option(help="sequence, or ctc: audio lies beside the text that the CTC head hears.")
]
CompileLayers = Annotated[
    bool, _option(help="torch.compile the LLM's layers: a minute's start, then faster steps.")
]


def takes(name: str, make: Callable[..., Any], **defaults: Any) -> Callable[..., Any]:  # noqa: ANN401 - of any option
    """Give a command the options of `make`, and what it makes of them as argument `name`.

    Args:
        name: the command's parameter.
        make: has Typer options as parameters.
        **defaults: of options, where the command's differ from those of `make`.
    """
    options = inspect.signature(make).parameters

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def taking(**arguments: Any) -> None:  # noqa: ANN401 - the command's own and the options
            made = make(**{option: arguments.pop(option) for option in options})
            command(**arguments, **{name: made})

        signature = inspect.signature(command)
        parameters = [p for p in signature.parameters.values() if p.name != name]
        parameters += [
            option.replace(
                default=defaults.get(option.name, option.default),
                kind=inspect.Parameter.KEYWORD_ONLY,
            )
            for option in options.values()
        ]
        parameters.sort(key=lambda parameter: parameter.kind)
        taking.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]  # typer reads it
        taking.__annotations__ = {p.name: p.annotation for p in parameters}
        return taking

    return decorate


def loop_config(
    epochs: Annotated[int, _option(min=1)] = 10,
    learning_rate: Annotated[float, _option(help="Peak of the schedule.")] = 1e-4,
    warmup_steps: Annotated[int, _option(min=0, help="Optimiser steps of linear warm-up.")] = 1000,
    weight_decay: Annotated[float, _option(min=0.0)] = 0.01,
    grad_accumulation: Annotated[int, _option(min=1, help="Batches for one optimiser step.")] = 1,
    precision: Annotated[str, _option(help="bf16 (autocast) or fp32.")] = "bf16",
    seed: Annotated[int, _option(help="Of everything random.", min=0)] = 0,
    max_steps: Annotated[
        int | None, _option(min=1, help="Stop after so many steps; resumable.")
    ] = None,
    log_every_steps: Annotated[
        int, _option(min=1, help="Optimiser steps between lines of metrics.jsonl.")
    ] = 10,
    save_every_s: Annotated[float, _option(help="Seconds between states on disk.")] = 300.0,
    tensorboard: Annotated[bool, _option(help="Also log for TensorBoard.")] = False,
) -> "LoopConfig":
    """Options of the training loop."""
    from model.training.loop import LoopConfig

    return LoopConfig(
        epochs=epochs, learning_rate=learning_rate, warmup_steps=warmup_steps,
        weight_decay=weight_decay, grad_accumulation=grad_accumulation, precision=precision,
        seed=seed, max_steps=max_steps, log_every_steps=log_every_steps,
        save_every_s=save_every_s, tensorboard=tensorboard,
    )  # fmt: skip


def data_config(
    max_batch_audio_s: BatchSeconds = 120.0,
    max_audio_s: MaxAudio = 30.0,
    concatenation: Annotated[
        float, _data_option(min=0, max=1, help="Share of utterances that are joined.")
    ] = 0.0,
    augment: Annotated[
        bool, _data_option(help="Speed, silence around, room, microphone, noise, telephone, gain.")
    ] = False,
    noise_dir: NoiseDir = None,
    workers: Annotated[int, _data_option(min=0, help="Processes that decode and augment.")] = 1,
) -> "SpeechDataConfig":
    """Options of what is read and how it is varied."""
    from model.training.speech_data import SpeechDataConfig

    return SpeechDataConfig(
        max_batch_audio_s=max_batch_audio_s, max_audio_s=max_audio_s, concatenation=concatenation,
        augment=augment, noise_dir=noise_dir, workers=workers,
    )  # fmt: skip


def parts(
    encoder: Encoder = "openai/whisper-tiny",
    llm: Annotated[str, typer.Option(help="Folder or hub id.")] = "Qwen/Qwen2.5-0.5B-Instruct",
    encoder_mode: EncoderMode = None,
    random_encoder: Annotated[
        bool, typer.Option(help="Random encoder weights (ablation).")
    ] = False,
    stack_size: Annotated[
        int, typer.Option(min=1, help="Encoder frames in one audio embedding.")
    ] = 5,
    connector_hidden_size: Annotated[int, typer.Option(min=1)] = 2048,
    connector_convolutions: Annotated[
        int, typer.Option(min=0, help="Convolution modules before connector and CTC head.")
    ] = 0,
    ctc: Annotated[
        str, typer.Option(help="none, auxiliary or fused: a CTC head over the transcripts' tokens.")
    ] = "none",
    audio_positions: Positions = "sequence",
    prompt: Annotated[str | None, typer.Option(help="What the user turn asks.")] = None,
    language: Annotated[list[str] | None, typer.Option(help="ISO 639-1 code; repeatable.")] = None,
) -> "Parts":
    """Options of what a new speech LLM is made of."""
    from model.assembly import Parts
    from model.configuration import DEFAULT_PROMPT

    return Parts(
        encoder=encoder, llm=llm,
        connector={
            "stack_size": stack_size, "hidden_size": connector_hidden_size,
            "convolutions": connector_convolutions,
        },
        ctc=ctc, encoder_mode=encoder_mode, prompt=DEFAULT_PROMPT if prompt is None else prompt,
        languages=tuple(language or ()), random_encoder=random_encoder,
        audio_positions=audio_positions,
    )  # fmt: skip


def lora_settings(
    lora: Annotated[bool, _lora_option(help="Train a LoRA adapter on the LLM.")] = False,
    lora_r: Annotated[int, _lora_option(min=1)] = 8,
    lora_alpha: Annotated[int, _lora_option(min=1)] = 32,
    lora_targets: Annotated[
        str, _lora_option(help="Comma-separated, or all-linear.")
    ] = "q_proj,v_proj",
) -> "LoraSettings | None":
    """Options of a LoRA adapter."""
    from model.training.connector import LoraSettings

    names = lora_targets.split(",")
    targets: Any = lora_targets if lora_targets == "all-linear" else tuple(names)
    return LoraSettings(r=lora_r, alpha=lora_alpha, target_modules=targets) if lora else None


def _read(manifests: list[Path] | None, audio_root: Path | None) -> "list[Utterance]":
    from model.data.manifest import read_manifest

    return [u for manifest in manifests or [] for u in read_manifest(manifest, audio_root)]


def _digest(rows: list[Any]) -> str:
    """What tells the data of one run from another's, wherever their files lie."""
    return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()


def _digest_of(utterances: "list[Utterance]") -> str:
    return _digest([[u.id, u.text, u.duration] for u in utterances])


def _run(stage: "Stage", loop: "LoopConfig", output: Path, identity: dict[str, Any]) -> None:
    from model.training.loop import TrainingLoop

    identity["processes"] = int(os.environ.get("WORLD_SIZE", "1"))
    run = TrainingLoop(stage, loop, output, identity)
    finished = run.run()
    step = run.progress.step
    if run.is_main_process:
        unfinished = f"stopped at step {step}; the same command goes on from there"
        typer.echo(f"written to {output}" if finished else unfinished)
    if not finished and (loop.max_steps is None or step < loop.max_steps):
        raise typer.Exit(1)


@train_app.command("whisper")
@user_errors
@takes("loop", loop_config, warmup_steps=500)
@takes("data", data_config)
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
    encoder_lr_scale: Annotated[float, typer.Option(help="0 leaves the encoder as it is.")] = 1.0,
    tuned_share: Annotated[
        float, typer.Option(help="Of the stored encoder; the rest is the one it started from.")
    ] = 1.0,
    new_parameters_first_steps: Annotated[
        int, typer.Option(help="Steps in which only tensors made anew are trained.")
    ] = 0,
    *,
    loop: "LoopConfig",
    data: "SpeechDataConfig",
) -> None:
    """Fine-tune a Whisper encoder-decoder: the encoder to serve, and the baseline to beat."""
    from model.training.whisper import WhisperStage, WhisperStageConfig

    config = WhisperStageConfig(
        whisper=whisper, tokenizer=tokenizer, init=init, encoder_mode=encoder_mode,
        ctc_weight=ctc_weight, label_smoothing=label_smoothing, dropout=dropout,
        spec_augment=spec_augment, new_parameters_lr_scale=new_parameters_lr_scale,
        new_parameters_first_steps=new_parameters_first_steps, encoder_lr_scale=encoder_lr_scale,
        tuned_share=tuned_share, data=data,
    )  # fmt: skip
    train = _read(manifest, audio_root)
    stage = WhisperStage(config, train, _read(dev, audio_root), language, loop.seed)
    settings = {"kind": "whisper", "utterances": _digest_of(train)}
    _run(stage, loop, output, {**settings, **config.model_dump(mode="json")})


@train_app.command("connector")
@user_errors
@takes("loop", loop_config)
@takes("data", data_config)
@takes("lora", lora_settings)
@takes("new", parts)
def train_connector(
    output: Output,
    manifest: Annotated[list[Path] | None, typer.Option(help="Manifest; repeatable.")] = None,
    cache: Annotated[list[Path] | None, typer.Option(help="Feature cache; repeatable.")] = None,
    mixed_encoders: Annotated[
        bool, typer.Option(help="Take caches of other encoders than the model's, too.")
    ] = False,
    model: Annotated[str | None, typer.Option(help="Checkpoint to go on from.")] = None,
    dev: Dev = None,
    audio_root: AudioRoot = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Sentences without audio, for the LLM to read too; repeatable."),
    ] = None,
    text_weight: Annotated[float, typer.Option(help="Weight of the loss on them.")] = 0.5,
    text_batch_tokens: Annotated[
        int, typer.Option(help="Their padded tokens beside each batch of speech.")
    ] = 600,
    train_encoder: Annotated[bool, typer.Option(help="Train the encoder too.")] = False,
    train_llm: Annotated[bool, typer.Option(help="Train the whole LLM.")] = False,
    encoder_lr_scale: Annotated[float, typer.Option()] = 0.2,
    llm_lr_scale: Annotated[float, typer.Option()] = 0.5,
    ctc_weight: Annotated[float, typer.Option(help="Weight of the auxiliary CTC loss.")] = 0.2,
    label_smoothing: Annotated[float, typer.Option()] = 0.0,
    teacher: Annotated[
        str | None, typer.Option(help="Fine-tuned Whisper with the LLM's tokens, to distil from.")
    ] = None,
    teacher_weight: Annotated[float, typer.Option(help="Share of the teacher's loss.")] = 0.5,
    hotwords_share: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of the clips with hotwords before their audio."),
    ] = 0.0,
    hotwords_template: Annotated[
        str, typer.Option(help="What then precedes the audio, with {} for the list.")
    ] = "Hotwords: {}.\n",
    previous_text_share: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of the clips with another's text before them."),
    ] = 0.0,
    previous_text_template: Annotated[
        str, typer.Option(help="What then precedes the audio, with {} for the text.")
    ] = "Before: {}\n",
    ctc_decoding_weight: Annotated[
        float | None,
        typer.Option(min=0, max=0.99, help="Of the CTC head when an answer is decoded."),
    ] = None,
    spec_augment: Annotated[
        bool, typer.Option(help="SpecAugment, or its like on features.")
    ] = True,
    stored_dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "bf16",
    compile_layers: CompileLayers = False,
    *,
    new: "Parts",
    lora: "LoraSettings | None",
    data: "SpeechDataConfig",
    loop: "LoopConfig",
) -> None:
    """Train the connector; with --lora, --train-encoder or --train-llm those too.

    The parts of a new speech LLM (--encoder to --language) are not looked at with --model.
    """
    from model.training.connector import ConnectorStage, ConnectorStageConfig
    from model.training.feature_cache import FeatureCache, fingerprint, merge_clips
    from model.training.language_model import read_lines

    if bool(manifest) == bool(cache):
        raise typer.BadParameter("give either --manifest or --cache")
    if cache and (data.augment or data.noise_dir):
        raise typer.BadParameter(
            "--augment and --noise-dir vary audio, and there is none in a cache: give them to "
            "`speechllm cache`"
        )
    config = ConnectorStageConfig(
        train_encoder=train_encoder, train_llm=train_llm, lora=lora,
        encoder_lr_scale=encoder_lr_scale, llm_lr_scale=llm_lr_scale, ctc_weight=ctc_weight,
        label_smoothing=label_smoothing, teacher=teacher, teacher_weight=teacher_weight,
        hotwords_share=hotwords_share, hotwords_template=hotwords_template,
        previous_text_share=previous_text_share, previous_text_template=previous_text_template,
        ctc_decoding_weight=ctc_decoding_weight, text_weight=text_weight,
        text_batch_tokens=text_batch_tokens, feature_augment=spec_augment,
        spec_augment=spec_augment, stored_dtype=stored_dtype, compile_layers=compile_layers,
        data=data,
    )  # fmt: skip
    new = replace(new, seed=loop.seed)
    train: Any = _read(manifest, audio_root)
    transcripts = [utterance.text for utterance in train if utterance.text is not None]
    for folder in cache or []:
        transcripts += [clip.text for clip in FeatureCache(folder).clips]
    speech_llm, processor = _speech_llm(model, new, transcripts, trains_ctc=ctc_weight > 0)
    if train_encoder:
        speech_llm.config.encoder = "encoder"
    if train_llm:
        speech_llm.config.llm = "llm"
    read = _digest_of(train)
    if cache:
        if mixed_encoders and teacher is not None:
            raise ValueError("a teacher hears its own encoder only: leave out --mixed-encoders")
        identity = fingerprint(speech_llm, processor)
        if mixed_encoders:
            del identity["encoder"]
        train = merge_clips(FeatureCache(folder, identity) for folder in cache)
        read = _digest([[each.source, clip.id] for each, clip in train])
    lines = [line for line in read_lines(text or []) if line.strip()]
    if text and not lines:
        raise ValueError("--text holds no line of text")
    stage = ConnectorStage(
        speech_llm, processor, config, train, _read(dev, audio_root), loop.seed, lines
    )
    head = speech_llm.ctc_head
    settings: dict[str, Any] = {
        "kind": "connector", "model": model, "parts": str(new), "utterances": read,
        "lines": _digest(lines),
        **config.model_dump(mode="json"),
        "transcript_tokens": None if head is None else head.fingerprint(),
    }  # fmt: skip
    _run(stage, loop, output, settings)


def _speech_llm(
    checkpoint: str | None, new: "Parts", transcripts: list[str], *, trains_ctc: bool
) -> tuple[Any, Any]:
    """The model to train and its processor: a checkpoint's, an adapter merged, or new ones."""
    from model.assembly import assemble, cover_transcripts
    from model.checkpoint import load_model, load_processor

    if checkpoint is None:
        return assemble(new, transcripts)
    import torch

    model = load_model(checkpoint, dtype=torch.float32, merge_lora=True)
    processor = load_processor(checkpoint)
    if trains_ctc:
        cover_transcripts(model, processor, transcripts, new.seed)
    return model, processor


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
@takes("loop", loop_config, learning_rate=1e-3, warmup_steps=200, weight_decay=0.05)
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
    audio_positions: Positions = "sequence",
    batch_tokens: Annotated[int, typer.Option(help="Padded target tokens in a batch.")] = 4096,
    curriculum: Annotated[
        float, typer.Option(help="Share of the first epoch that goes from easy to full reading.")
    ] = 0.0,
    compile_layers: CompileLayers = False,
    *,
    loop: "LoopConfig",
) -> None:
    """Pre-train a small Qwen2 on text, where no published LLM can be had."""
    from model.training.language_model import LanguageModelConfig, LanguageModelStage, read_lines

    config = LanguageModelConfig(
        tokenizer=tokenizer, hidden_size=hidden_size, intermediate_size=intermediate_size,
        layers=layers, heads=heads, key_value_heads=key_value_heads, reading=reading,
        prompt=prompt, audio_positions=audio_positions, batch_tokens=batch_tokens,
        curriculum=curriculum, compile_layers=compile_layers,
    )  # fmt: skip
    lines = read_lines(text)
    stage = LanguageModelStage(config, lines, read_lines(dev_text or []), loop.seed)
    settings = {"kind": "lm", "lines": _digest(lines)}
    _run(stage, loop, output, {**settings, **config.model_dump(mode="json")})


@user_errors
def cache(
    manifest: Manifests,
    output: Annotated[Path, typer.Option(help="Folder of the cache.")],
    encoder: Encoder = "openai/whisper-tiny",
    llm: Annotated[
        str, typer.Option(help="Folder or hub id; its tokenizer makes the targets.")
    ] = "Qwen/Qwen2.5-0.5B-Instruct",
    encoder_mode: EncoderMode = None,
    audio_root: AudioRoot = None,
    plain_copies: Annotated[int, typer.Option(help="0 leaves the plain recordings out.")] = 1,
    augmented_copies: Annotated[int, typer.Option(help="Augmented copies of each clip.")] = 0,
    noise_dir: NoiseDir = None,
    speed_share: Annotated[
        float, typer.Option(help="Share of the augmented copies that play at another speed.")
    ] = 0.5,
    speed_range: Annotated[
        tuple[float, float], typer.Option(help="Slowest and fastest; the voice moves with it.")
    ] = (0.85, 1.18),
    max_batch_audio_s: BatchSeconds = 120.0,
    max_audio_s: MaxAudio = 30.0,
    precision: Annotated[str, typer.Option(help="bf16 (autocast) or fp32.")] = "bf16",
    seed: Annotated[int, typer.Option(help="Of the augmentation.", min=0)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Store encoder outputs and token ids, so that `train connector` need not encode again."""
    from model.assembly import Parts, assemble
    from model.training.caching import CachingConfig, write_cache
    from model.transcription import pick_device

    config = CachingConfig(
        plain_copies=plain_copies, augmented_copies=augmented_copies,
        noise_dir=str(noise_dir) if noise_dir else None, max_batch_audio_s=max_batch_audio_s,
        max_audio_s=max_audio_s, precision=precision, seed=seed, speed_share=speed_share,
        speed_range=speed_range,
    )  # fmt: skip
    utterances = _read(manifest, audio_root)
    model, processor = assemble(Parts(encoder=encoder, llm=llm, encoder_mode=encoder_mode))
    model.encoder.to(pick_device(device))  # the LLM has no part in it
    count = write_cache(model, processor, utterances, config, output)
    typer.echo(f"{count} clips in {output}")
