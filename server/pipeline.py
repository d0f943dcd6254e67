"""One upload from bytes to transcript: admission, probe, decoding, engine. Knows no HTTP."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

from server.audio.limits import check_header
from server.audio.probe import probe
from server.engine.interface import EngineRequest
from server.errors import DeadlineExceededError
from server.transcription import Segment, StageTimings, Transcription

if TYPE_CHECKING:
    from collections.abc import Callable

    from server.audio.clip import Clip
    from server.engine.interface import EngineResult, Piece
    from server.options import TranscribeOptions
    from server.runtime import Runtime


async def transcribe_upload(  # noqa: PLR0913 - what one request consists of
    runtime: Runtime,
    data: bytes,
    *,
    request_id: str,
    started_s: float,
    options: TranscribeOptions,
    on_event: Callable[[str], None] | None = None,
) -> Transcription:
    """Transcribe an uploaded file.

    Args:
        runtime: of the server.
        data: the file.
        request_id: names the request in logs.
        started_s: monotonic time at which the request began.
        options: what the client asks for.
        on_event: told of each piece of text that is new and final, on the event loop.

    Raises:
        ServerError: which of its kinds says why.
    """
    uploaded_s = time.monotonic()
    timeout_s = runtime.settings.request_timeout_s
    deadline_s = uploaded_s + min(timeout_s, options.deadline_s or timeout_s)
    limits = runtime.audio_limits
    header = probe(data)
    check_header(header, limits)
    # A header that does not tell its length may hold as much as is taken.
    with runtime.engine.admit(header.duration_s or limits.max_audio_s) as ticket:
        clip = await _decode(runtime, data, deadline_s)
        ticket.measure(clip.duration_s)
        decoded_s = time.monotonic()
        request = EngineRequest(
            id=request_id,
            waveform=clip.waveform,
            audio_s=clip.duration_s,
            deadline_s=deadline_s,
            prompt=options.prompt,
            decoding=options.decoding,
            on_piece=None if on_event is None else partial(_hand_on, on_event),
        )
        result = await runtime.engine.submit(request)
    timings = StageTimings(
        decode=decoded_s - uploaded_s,
        queue=result.queue_s,
        encode=result.encode_s,
        generate=result.generate_s,
        total=time.monotonic() - started_s,
    )
    stages_s = {
        **asdict(timings),
        "prefill": result.prefill_s,
        "first_token": result.first_token_s,
    }
    runtime.metrics.transcribed(clip.duration_s, result, stages_s)
    return Transcription(
        text=result.text,
        language=options.language or result.language,
        duration_s=clip.duration_s,
        segments=_segments(result, clip.duration_s),
        alignment="segment",
        timings=timings,
    )


def _segments(result: EngineResult, duration_s: float) -> tuple[Segment, ...]:
    """One for the whole clip, or none where nothing was said."""
    if not result.text:
        return ()
    segment = Segment(
        start_s=0.0,
        end_s=duration_s,
        text=result.text,
        words=None,
        token_ids=result.token_ids,
        logprobs=result.logprobs,
        finish_reason=result.finish_reason,
        hypotheses=result.hypotheses,
    )
    return (segment,)


def _hand_on(on_event: Callable[[str], None], piece: Piece) -> None:
    if piece.text:
        on_event(piece.text)


async def _decode(runtime: Runtime, data: bytes, deadline_s: float) -> Clip:
    try:
        async with asyncio.timeout(deadline_s - time.monotonic()):
            return await runtime.decode_pool.decode(data, runtime.audio_limits)
    except TimeoutError as error:
        raise DeadlineExceededError("the upload still waited to be decoded") from error
