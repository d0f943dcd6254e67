"""One upload from bytes to transcript: admission, probe, decoding, engine. Knows no HTTP."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from server.audio.limits import check_header
from server.audio.probe import probe
from server.engine.interface import EngineRequest
from server.errors import DeadlineExceededError

if TYPE_CHECKING:
    from server.audio.clip import Clip
    from server.runtime import Runtime


@dataclass(frozen=True, slots=True)
class StageTimings:
    """Seconds an upload spent in each stage.

    Attributes:
        decode: waiting for a decoding process, and decoding.
        queue: waiting for its turn.
        encode: its batch's time from waveforms to audio embeddings.
        generate: from its audio embeddings to its text.
        total: from the request's first byte to the answer, the upload included.
    """

    decode: float
    queue: float
    encode: float
    generate: float
    total: float


@dataclass(frozen=True, slots=True)
class Transcription:
    """An upload's transcript.

    Attributes:
        text: what was said; empty where nothing was.
        language: ISO 639-1 code, None where the model does not tell.
        duration_s: of the audio.
        timings: seconds by stage.
    """

    text: str
    language: str | None
    duration_s: float
    timings: StageTimings


async def transcribe_upload(
    runtime: Runtime,
    data: bytes,
    *,
    request_id: str,
    started_s: float,
    prompt: str | None = None,
) -> Transcription:
    """Transcribe an uploaded file.

    Args:
        runtime: of the server.
        data: the file.
        request_id: names the request in logs.
        started_s: monotonic time at which the request began.
        prompt: replaces the checkpoint's own.

    Raises:
        ServerError: which of its kinds says why.
    """
    uploaded_s = time.monotonic()
    deadline_s = uploaded_s + runtime.settings.request_timeout_s
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
            prompt=prompt,
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
    return Transcription(result.text, result.language, clip.duration_s, timings)


async def _decode(runtime: Runtime, data: bytes, deadline_s: float) -> Clip:
    try:
        async with asyncio.timeout(deadline_s - time.monotonic()):
            return await runtime.decode_pool.decode(data, runtime.audio_limits)
    except TimeoutError as error:
        raise DeadlineExceededError("the upload still waited to be decoded") from error
