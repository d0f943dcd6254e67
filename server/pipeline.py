"""One upload from bytes to transcript: admission, probe, decoding, engine. Knows no HTTP."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np

from server.audio.clip import SAMPLE_RATE_HZ
from server.audio.limits import check_header
from server.audio.probe import probe
from server.engine.interface import EngineRequest
from server.errors import InvalidRequestError
from server.longform import NOBODY, Deadline, RecordingTranscriber
from server.transcription import Segment, StageTimings, Transcription, Word

if TYPE_CHECKING:
    from server.audio.probe import Probe
    from server.engine.interface import Capabilities
    from server.longform import Listener, Recording, Transcribed
    from server.options import TranscribeOptions
    from server.runtime import Runtime
    from server.transcription import Alignment

# What a header that does not tell its length is taken to hold: speech is seldom coded in less.
_BYTES_PER_AUDIO_S = 2_000


async def transcribe_upload(  # noqa: PLR0913 - what one request consists of
    runtime: Runtime,
    data: bytes,
    *,
    request_id: str,
    started_s: float,
    options: TranscribeOptions,
    listener: Listener = NOBODY,
) -> Transcription:
    """Transcribe an uploaded file of any length that is allowed.

    Args:
        runtime: of the server.
        data: the file.
        request_id: names the request in logs.
        started_s: monotonic time at which the request began.
        options: what the client asks for.
        listener: told of what is done.

    Raises:
        ServerError: which of its kinds says why.
    """
    uploaded_s = time.monotonic()
    settings, engine, limits = runtime.settings, runtime.engine, runtime.audio_limits
    capabilities = engine.capabilities
    _check_additions(options, capabilities)
    header = probe(data)
    check_header(header, limits)
    in_flight_s = settings.max_excerpts_in_flight * capabilities.max_audio_s
    template = EngineRequest(
        id=request_id,
        waveform=np.zeros(0, np.float32),
        audio_s=0.0,
        prompt=options.prompt,
        previous_text=options.previous_text,
        hotwords=options.hotwords,
        decoding=options.decoding,
        with_words=options.timestamps == "word",
    )
    latest_s = None if options.deadline_s is None else uploaded_s + options.deadline_s
    with engine.admit(min(_expected_s(header, data), in_flight_s)) as ticket:
        transcriber = RecordingTranscriber(
            engine,
            template,
            Deadline(uploaded_s + settings.request_timeout_s, latest_s),
            in_flight=settings.max_excerpts_in_flight,
            conditioned=options.condition_on_previous_text,
            ticket=ticket,
            long_recordings=runtime.long_recordings,
            on_text=listener.on_text,
            on_advance=listener.on_advance,
            claimed_s=header.duration_s,
        )
        decoding = runtime.decode_pool.stream(
            data,
            limits,
            max_clip_s=capabilities.max_audio_s,
            max_excerpt_s=min(capabilities.max_audio_s, settings.max_excerpt_s),
            finds_speech=options.vad,
            places_speech=options.places_text,
        )
        recording = await transcriber.run(decoding)
    transcription = _transcription(recording, options, started_s)
    _count(runtime, recording, transcription)
    return transcription


def _check_additions(options: TranscribeOptions, capabilities: Capabilities) -> None:
    """Refuse what the LLM was not trained to find around the audio: it would read it out."""
    check_prompt(options.prompt, capabilities)
    taken = capabilities.context_templates
    if options.hotwords and "hotwords" not in taken:
        raise InvalidRequestError(
            "this checkpoint takes no hotwords: that needs a CTC head, and training with such "
            "lists before the audio",
            param="hotwords",
        )
    for param in ("condition_on_previous_text", "previous_text"):
        if getattr(options, param) and "previous_text" not in taken:
            raise InvalidRequestError(
                "this checkpoint takes no previous text: that needs training with it before the "
                "audio",
                param=param,
            )


def check_prompt(prompt: str | None, capabilities: Capabilities) -> None:
    """Raise InvalidRequestError where a checkpoint that knows no questions is asked one."""
    if prompt is not None and not capabilities.takes_prompt:
        raise InvalidRequestError(
            "this checkpoint takes no prompt: it was trained without one", param="prompt"
        )


def _expected_s(header: Probe, data: bytes) -> float:
    return header.duration_s or len(data) / _BYTES_PER_AUDIO_S


def _transcription(
    recording: Recording, options: TranscribeOptions, started_s: float
) -> Transcription:
    results = [part.result for part in recording.parts]
    languages = Counter(result.language for result in results if result.language is not None)
    segments = tuple(_segment(part) for part in recording.parts if part.result.text)
    # A text that does not fit into its audio, which is seldom right, keeps the segment's times.
    is_aligned = any(segment.words is not None for segment in segments)
    alignment: Alignment = "ctc" if is_aligned else "segment"
    return Transcription(
        text=" ".join(segment.text for segment in segments),
        language=options.language or next((name for name, _ in languages.most_common(1)), None),
        duration_s=recording.duration_s,
        segments=segments,
        alignment=alignment,
        timings=StageTimings(
            decode=recording.decode_s,
            queue=sum(result.queue_s for result in results),
            encode=sum(result.encode_s for result in results),
            generate=sum(result.generate_s for result in results),
            total=time.monotonic() - started_s,
        ),
    )


def _segment(part: Transcribed) -> Segment:
    """Place an excerpt's answer in the recording."""
    result = part.result
    words = None
    if result.words is not None:
        begin_s = part.start / SAMPLE_RATE_HZ
        words = tuple(
            Word(word.text, begin_s + word.start_s, begin_s + word.end_s) for word in result.words
        )
    return Segment(
        start_s=words[0].start_s if words else part.speech_start / SAMPLE_RATE_HZ,
        end_s=words[-1].end_s if words else part.speech_end / SAMPLE_RATE_HZ,
        text=result.text,
        words=words,
        token_ids=result.token_ids,
        logprobs=result.logprobs,
        finish_reason=result.finish_reason,
        hypotheses=result.hypotheses,
        token_bytes=result.token_bytes,
    )


def _count(runtime: Runtime, recording: Recording, transcription: Transcription) -> None:
    results = [part.result for part in recording.parts]
    stages_s = {
        **asdict(transcription.timings),
        "prefill": sum(result.prefill_s for result in results),
        "first_token": results[0].first_token_s if results else 0.0,
    }
    runtime.metrics.transcribed(recording.duration_s, results, stages_s)
