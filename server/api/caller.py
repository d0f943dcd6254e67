"""A request that wants something transcribed: refused early, received, held to its key's limits."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack, ExitStack
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends, Request

from server.api.auth import OwnerDependency  # noqa: TC001 - FastAPI reads it
from server.api.dependencies import RuntimeDependency  # noqa: TC001 - FastAPI reads it
from server.api.upload import discard_body, receive_upload
from server.audio.probe import probe
from server.errors import AudioError, DeadlineExceededError, ServerError
from server.keys import ANONYMOUS
from server.longform import NOBODY
from server.pipeline import transcribe_upload

if TYPE_CHECKING:
    from server.api.upload import Upload
    from server.longform import Listener
    from server.options import TranscribeOptions
    from server.runtime import Runtime
    from server.transcription import Transcription


@dataclass(frozen=True, slots=True)
class Caller:
    """A request, the server, and whose key it came with."""

    request: Request
    runtime: Runtime
    owner: str

    async def receive(self, *, takes_raw: bool = False) -> Upload:
        """Take in the upload, unless nothing could be done with it.

        Args:
            takes_raw: whether the body may be the recording itself.

        Raises:
            CapacityError: the server is not ready, or full.
            RequestError: the upload is not right.
            ClientDisconnect: the client left.
        """
        settings = self.runtime.settings
        with ExitStack() as held:
            try:
                self.runtime.require_ready()
                with self.runtime.engine.admit(0.0):
                    pass  # there is room now; it is held only once the upload is here
                held.enter_context(self.runtime.receiving())
            except ServerError:
                await discard_body(self.request, settings.max_upload_bytes)
                raise
            upload = await receive_upload(
                self.request,
                settings.max_upload_bytes,
                settings.upload_idle_timeout_s,
                takes_raw=takes_raw,
            )
        self.request.state.received_s = time.monotonic()
        return upload

    async def transcribe(
        self,
        recording: bytes,
        options: TranscribeOptions,
        listener: Listener = NOBODY,
    ) -> Transcription:
        """Transcribe a recording within the key's limits, and note it in the request's log line.

        Args:
            recording: the file.
            options: what the client asks for.
            listener: told of what is done.

        Raises:
            ServerError: which of its kinds says why.
        """
        claimed_s = _claimed_s(recording)
        with self.runtime.key_limits.hold(self.owner, claimed_s) as charge:
            try:
                transcription = await self._take_turn(claimed_s, recording, options, listener)
            except ServerError:
                charge.measure(0.0)
                raise
            charge.measure(transcription.duration_s)
        self._note(transcription)
        return transcription

    async def _take_turn(
        self,
        claimed_s: float,
        recording: bytes,
        options: TranscribeOptions,
        listener: Listener,
    ) -> Transcription:
        """Wait behind other keys' requests, where there are keys, and transcribe."""
        if self.owner == ANONYMOUS:
            return await self._run(recording, options, listener)
        # The server's own limit grows with the recording; only the client's is for all of it.
        timeout_s = self.runtime.settings.request_timeout_s
        left_s = self._left_s(options)
        patience_s = timeout_s if left_s is None else min(timeout_s, left_s)
        async with AsyncExitStack() as inside:
            try:
                async with asyncio.timeout(patience_s):
                    await inside.enter_async_context(
                        self.runtime.turnstile.pass_through(self.owner, claimed_s)
                    )
            except TimeoutError as error:
                raise DeadlineExceededError("the request still waited for its turn") from error
            return await self._run(recording, options, listener)

    def _left_s(self, options: TranscribeOptions) -> float | None:
        """What is left of the client's deadline, which counts from the upload's end."""
        if options.deadline_s is None:
            return None
        received_s: float = self.request.state.received_s
        return options.deadline_s - (time.monotonic() - received_s)

    async def _run(
        self,
        recording: bytes,
        options: TranscribeOptions,
        listener: Listener,
    ) -> Transcription:
        left_s = self._left_s(options)
        if left_s is not None and left_s <= 0:  # others of the request's files took so long
            raise DeadlineExceededError("the recording still waited for its turn")
        return await transcribe_upload(
            self.runtime,
            recording,
            request_id=self.request.state.request_id,
            started_s=self.request.state.started_s,
            options=replace(options, deadline_s=left_s),
            listener=listener,
        )

    def _note(self, transcription: Transcription) -> None:
        fields = getattr(self.request.state, "log_fields", {})
        self.request.state.log_fields = {
            **fields,
            "audio_s": round(fields.get("audio_s", 0.0) + transcription.duration_s, 3),
            **{f"{k}_s": round(v, 4) for k, v in asdict(transcription.timings).items()},
        }


def _claimed_s(recording: bytes) -> float:
    try:
        return probe(recording).duration_s or 0.0
    except AudioError:  # the pipeline says so
        return 0.0


async def _caller(request: Request, runtime: RuntimeDependency, owner: OwnerDependency) -> Caller:
    return Caller(request, runtime, owner)


CallerDependency = Annotated[Caller, Depends(_caller)]
