"""Transcribe a corpus: long clips first, in batches under a budget of padded audio."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from model.evaluation.errors import EvaluationError, UnreadableClipError
from model.evaluation.results import UtteranceResult

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    import torch
    from numpy.typing import NDArray

    from model.transcription import TranscriptBatch

_SAMPLE_RATE_HZ = 16_000


class SpeechTranscriber(Protocol):
    """What the evaluation needs of a model; the speech LLM and plain Whisper both have it."""

    @property
    def max_audio_s(self) -> float:
        """Longest clip it takes, in seconds."""

    @property
    def device(self) -> torch.device:
        """Where it runs."""

    @property
    def num_beams(self) -> int:
        """Of the search that its checkpoint asks for; 1 for none."""

    def transcribe(
        self,
        waveforms: Sequence[NDArray[np.float32]],
        *,
        with_ctc: bool = False,
        num_beams: int = 1,
    ) -> TranscriptBatch:
        """Transcribe float32 mono 16 kHz waveforms as one batch.

        Raises:
            ValueError: it cannot search with so many beams.
        """


@dataclass(frozen=True, slots=True)
class Clip:
    """One utterance to transcribe.

    Attributes:
        id: of the utterance.
        reference: what is said; "" for non-speech.
        language: tag that chooses the normaliser; None when not known.
        speaker: None when not known.
        duration_s: as the manifest has it; only sorts the clips.
        load: reads the waveform, float32 mono 16 kHz; raises UnreadableClipError.
    """

    id: str
    reference: str
    language: str | None
    speaker: str | None
    duration_s: float
    load: Callable[[], NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """What bounds the memory of a batch.

    Attributes:
        max_clips: most clips in a batch; bounds encoders that pad every clip to their window.
        max_audio_s: most audio in a batch, padding included; a longer single clip still makes a
            batch of its own.
    """

    max_clips: int = 16
    max_audio_s: float = 240.0


@dataclass(frozen=True, slots=True)
class FailedClip:
    """A clip that could not be transcribed, and why."""

    id: str
    reason: str


@dataclass(slots=True)
class Decoding:
    """Outcome of transcribing a corpus.

    Attributes:
        results: in the order of the clips.
        failed: in the order of the clips.
        audio_s: audio transcribed.
        transcribe_s: wall time in the model, reading of audio files left out.
        encode_s: part of it up to the audio embeddings.
        generate_s: part of it in the LLM.
    """

    results: list[UtteranceResult] = field(default_factory=list)
    failed: list[FailedClip] = field(default_factory=list)
    audio_s: float = 0.0
    transcribe_s: float = 0.0
    encode_s: float = 0.0
    generate_s: float = 0.0

    @property
    def rtfx(self) -> float:
        """Seconds of audio transcribed in a second."""
        return self.audio_s / self.transcribe_s if self.transcribe_s else 0.0


def load_transcriber(path: Path, device: str, dtype: str = "auto") -> SpeechTranscriber:
    """Load a speech LLM or a plain Whisper baseline, whichever the folder holds.

    Args:
        path: checkpoint folder.
        device: "auto", "cpu", "cuda" or "cuda:N".
        dtype: "auto", "fp32", "bf16" or "fp16".

    Raises:
        EvaluationError: no config.json there, or it is that of another kind of model.
    """
    config_path = path / "config.json"
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise EvaluationError(f"{path}: not a checkpoint folder: no config.json in it") from error
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{config_path}: cannot be read: {error}") from error
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if model_type == "speech_llm":
        from model.transcription import Transcriber  # noqa: PLC0415 - only the kind needed

        return Transcriber.from_pretrained(path, device=device, dtype=dtype)
    if model_type == "whisper":
        from model.whisper_baseline import WhisperTranscriber  # noqa: PLC0415 - as above

        return WhisperTranscriber.from_pretrained(path, device=device, dtype=dtype)
    raise EvaluationError(
        f"{config_path}: model_type is {model_type!r}, expected 'speech_llm' or 'whisper'"
    )


def transcribe_clips(  # noqa: PLR0913 - what a corpus is decoded with
    transcriber: SpeechTranscriber,
    clips: Sequence[Clip],
    limits: BatchLimits,
    *,
    with_ctc: bool = False,
    num_beams: int = 1,
    on_progress: Callable[[int, Decoding], None] | None = None,
) -> Decoding:
    """Transcribe clips of any order and number.

    Args:
        transcriber: the model.
        clips: with distinct ids.
        limits: of a batch.
        with_ctc: also take the CTC head's text.
        num_beams: of beam search; 1 for greedy search.
        on_progress: called after each batch with the clips done and the state so far.

    Raises:
        EvaluationError: `with_ctc` for a model without a CTC head.
        ValueError: the model cannot search with so many beams.
    """
    decoding = Decoding()
    longest_first = sorted(clips, key=lambda clip: (-clip.duration_s, clip.id))
    for batch in _batches(longest_first, transcriber.max_audio_s, limits, decoding.failed):
        _transcribe_batch(transcriber, batch, decoding, with_ctc=with_ctc, num_beams=num_beams)
        if on_progress:
            on_progress(len(decoding.results) + len(decoding.failed), decoding)
    order = {clip.id: i for i, clip in enumerate(clips)}
    decoding.results.sort(key=lambda result: order[result.id])
    decoding.failed.sort(key=lambda failed: order[failed.id])
    return decoding


def _batches(
    clips: Sequence[Clip],
    max_audio_s: float,
    limits: BatchLimits,
    failed: list[FailedClip],
) -> Iterator[list[tuple[Clip, NDArray[np.float32]]]]:
    """Read clips and fill batches by their decoded length, for a manifest may be wrong."""
    batch: list[tuple[Clip, NDArray[np.float32]]] = []
    longest_s = 0.0
    for clip in clips:
        try:
            waveform = _checked_waveform(clip, max_audio_s)
        except UnreadableClipError as error:
            failed.append(FailedClip(clip.id, str(error)))
            continue
        duration_s = len(waveform) / _SAMPLE_RATE_HZ
        padded_s = max(longest_s, duration_s) * (len(batch) + 1)
        if batch and (len(batch) == limits.max_clips or padded_s > limits.max_audio_s):
            yield batch
            batch, longest_s = [], 0.0
        batch.append((clip, waveform))
        longest_s = max(longest_s, duration_s)
    if batch:
        yield batch


def _checked_waveform(clip: Clip, max_audio_s: float) -> NDArray[np.float32]:
    waveform = clip.load()
    if waveform.size == 0:
        raise UnreadableClipError("the audio has no samples")
    if not np.isfinite(waveform).all():
        raise UnreadableClipError("the audio has samples that are not finite numbers")
    duration_s = len(waveform) / _SAMPLE_RATE_HZ
    if duration_s > max_audio_s:
        raise UnreadableClipError(
            f"the audio is {duration_s:.1f} s long, the model takes {max_audio_s:.1f} s"
        )
    return waveform


def _transcribe_batch(
    transcriber: SpeechTranscriber,
    batch: Sequence[tuple[Clip, NDArray[np.float32]]],
    decoding: Decoding,
    *,
    with_ctc: bool,
    num_beams: int,
) -> None:
    started = time.perf_counter()
    waveforms = [waveform for _, waveform in batch]
    output = transcriber.transcribe(waveforms, with_ctc=with_ctc, num_beams=num_beams)
    decoding.transcribe_s += time.perf_counter() - started
    decoding.encode_s += output.encode_s
    decoding.generate_s += output.generate_s
    for (clip, waveform), transcript in zip(batch, output.transcripts, strict=True):
        if with_ctc and transcript.ctc_text is None:
            raise EvaluationError("the model has no CTC head to score")
        duration_s = len(waveform) / _SAMPLE_RATE_HZ
        decoding.audio_s += duration_s
        decoding.results.append(
            UtteranceResult(
                id=clip.id,
                reference=clip.reference,
                hypothesis=transcript.text,
                ctc_hypothesis=transcript.ctc_text if with_ctc else None,
                language=clip.language,
                speaker=clip.speaker,
                duration_s=duration_s,
                finish_reason=transcript.finish_reason,
            )
        )
