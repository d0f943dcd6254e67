"""A recording of any length through the engine: a few excerpts at a time, joined in order.

Never more than `in_flight` excerpts of a recording wait or run, so that a long one leaves room for
others and the decoder is not asked for more than can be worked on. What a recording holds in this
process is these excerpts, one more that is decoded ahead, and its text.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from server.audio.clip import SAMPLE_RATE_HZ, Excerpt, Progress
from server.board import Tally
from server.errors import DeadlineExceededError, QueueFullError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator

    from server.engine.admission import Ticket
    from server.engine.interface import Engine, EngineRequest, EngineResult, Piece

_RETRY_LONG_S = 30.0  # nobody knows how long the recordings under way will take


class LongRecordings:
    """Bounds how many recordings that need several excerpts are under way."""

    def __init__(self, most: int, under_way: Tally | None = None) -> None:
        """Begin without any; `under_way` is where they are counted."""
        self._most = most
        self._under_way = under_way or Tally()

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """Hold one of the places.

        Raises:
            QueueFullError: they are all taken.
        """
        if self._under_way.total >= self._most:
            raise QueueFullError(
                f"{self._under_way.total:g} long recordings are being transcribed already",
                retry_after_s=_RETRY_LONG_S,
            )
        self._under_way.add(1)
        try:
            yield
        finally:
            self._under_way.add(-1)


@dataclass(frozen=True, slots=True)
class Deadline:
    """When answers are no longer wanted; seconds on the monotonic clock.

    Attributes:
        begin_s: when the server's own limit for a recording's first second ends. Each further
            second of the recording may take a second longer.
        latest_s: the client's limit for all of it; None without one.
    """

    begin_s: float
    latest_s: float | None = None

    def at(self, position_s: float) -> float:
        """For what lies `position_s` seconds into the recording."""
        own_s = self.begin_s + position_s
        return own_s if self.latest_s is None else min(own_s, self.latest_s)


@dataclass(frozen=True, slots=True)
class Transcribed:
    """What the engine says of an excerpt, whose waveform is gone.

    Attributes:
        start: where the excerpt begins in the recording, samples at 16 kHz.
        speech_start: where its speech begins.
        speech_end: where its speech ends.
        result: of the engine.
    """

    start: int
    speech_start: int
    speech_end: int
    result: EngineResult


@dataclass(frozen=True, slots=True)
class Advance:
    """How far the transcription of a long recording has come.

    Attributes:
        processed_s: seconds up to which all is transcribed.
        total_s: of the recording; None until its decoding tells.
    """

    processed_s: float
    total_s: float | None


@dataclass(frozen=True, slots=True)
class Listener:
    """Who is told, on the event loop, of a transcription under way.

    Attributes:
        on_text: told of new and final text, in order; the pieces make up the whole text. An answer
            that somebody listens to is not begun again when it loops.
        on_advance: told how far a recording of several excerpts is done.
    """

    on_text: Callable[[str], None] | None = None
    on_advance: Callable[[Advance], None] | None = None


NOBODY = Listener()


@dataclass(frozen=True, slots=True)
class Recording:
    """A whole recording.

    Attributes:
        duration_s: of its audio.
        parts: its excerpts in order.
        decode_s: how long the engine had nothing of it to do but wait for its decoding.
    """

    duration_s: float
    parts: list[Transcribed]
    decode_s: float


class RecordingTranscriber:
    """Takes one recording through the engine."""

    def __init__(  # noqa: PLR0913 - what one recording needs
        self,
        engine: Engine,
        template: EngineRequest,
        deadline: Deadline,
        *,
        in_flight: int,
        conditioned: bool = False,
        ticket: Ticket,
        long_recordings: LongRecordings,
        on_text: Callable[[str], None] | None = None,
        on_advance: Callable[[Advance], None] | None = None,
        claimed_s: float | None = None,
    ) -> None:
        """Begin before the first excerpt.

        Args:
            engine: that runs.
            template: the requests, but for their audio.
            deadline: of the recording.
            in_flight: most excerpts that wait or run.
            conditioned: whether an excerpt's prompt has the text of the one before, which it then
                waits for.
            ticket: the recording's; it is kept at what is in flight.
            long_recordings: where one that needs several excerpts takes a place.
            on_text: told of new and final text, in order; the pieces make up the whole text.
            on_advance: told of each excerpt of several that is done, as are all before it.
            claimed_s: the recording's length by its header, if it says.
        """
        self._engine = engine
        self._template = template
        self._deadline = deadline
        self._conditioned = conditioned
        self._room = asyncio.Semaphore(1 if conditioned else in_flight)
        self._ticket = ticket
        self._long_recordings = long_recordings
        self._text = TextInOrder(on_text) if on_text is not None else None
        self._parts: dict[int, Transcribed] = {}
        self._audio_in_flight_s: dict[int, float] = {}
        self._decode_s = 0.0
        self._decoded_s = 0.0
        self._on_advance = on_advance
        self._total_s = claimed_s
        self._is_long = False
        self._n_done = 0  # excerpts, without a gap from the first

    async def run(self, decoding: AsyncGenerator[Excerpt | Progress, None]) -> Recording:
        """Transcribe what comes; cancelled, or after an error, all its excerpts are cancelled.

        Raises:
            ServerError: of the decoding or of an excerpt.
        """
        try:
            async with (
                contextlib.aclosing(decoding),
                asyncio.TaskGroup() as group,
                contextlib.AsyncExitStack() as places,
            ):
                while (found := await self._next(decoding)) is not None:
                    if isinstance(found, Progress):
                        self._decoded_s = found.decoded_s
                        if found.is_done:
                            self._total_s = found.decoded_s
                        if found.is_long and not self._is_long:
                            self._is_long = True
                            places.enter_context(self._long_recordings.place())
                        continue
                    await self._room.acquire()
                    index = len(self._parts) + len(self._audio_in_flight_s)
                    self._hold(index, found.duration_s)
                    group.create_task(self._transcribe(index, found))
        except ExceptionGroup as errors:
            raise _first(errors) from None
        parts = [self._parts[index] for index in sorted(self._parts)]
        return Recording(self._decoded_s, parts, self._decode_s)

    async def _next(
        self, decoding: AsyncGenerator[Excerpt | Progress, None]
    ) -> Excerpt | Progress | None:
        began_s = time.monotonic()
        try:
            async with asyncio.timeout(self._deadline.at(self._decoded_s) - began_s):
                return await anext(decoding, None)
        except TimeoutError as error:
            raise DeadlineExceededError("the upload was not decoded at its deadline") from error
        finally:
            self._decode_s += time.monotonic() - began_s

    async def _transcribe(self, index: int, excerpt: Excerpt) -> None:
        position_s = excerpt.start / SAMPLE_RATE_HZ
        text = self._text
        request = replace(
            self._template,
            id=f"{self._template.id}/{index}" if index else self._template.id,
            waveform=excerpt.waveform,
            audio_s=excerpt.duration_s,
            previous_text=self._text_before(index),
            deadline_s=self._deadline.at(position_s),
            on_piece=None if text is None else partial(text.push, index),
        )
        try:
            result = await self._engine.submit(request)
        finally:
            self._release(index)
        self._parts[index] = Transcribed(
            excerpt.start, excerpt.speech_start, excerpt.speech_end, result
        )
        if text is not None:
            text.end(index)
        self._advance()

    def _advance(self) -> None:
        """Say how far the recording is done, if this excerpt was what it waited for."""
        n_before = self._n_done
        while self._n_done in self._parts:
            self._n_done += 1
        if self._on_advance is not None and self._is_long and self._n_done > n_before:
            end_s = self._parts[self._n_done - 1].speech_end / SAMPLE_RATE_HZ
            self._on_advance(Advance(end_s, self._total_s))

    def _text_before(self, index: int) -> str:
        """What conditions an excerpt; nothing behind one that looped or was cut off."""
        if not index:
            return self._template.previous_text
        if not self._conditioned:
            return ""
        before = self._parts[index - 1].result
        return before.text if before.finish_reason == "stop" else ""

    def _hold(self, index: int, audio_s: float) -> None:
        self._audio_in_flight_s[index] = audio_s
        self._measure()

    def _release(self, index: int) -> None:
        del self._audio_in_flight_s[index]
        self._measure()
        self._room.release()

    def _measure(self) -> None:
        in_flight = self._audio_in_flight_s.values()
        self._ticket.measure(sum(in_flight), clips=max(1, len(in_flight)))


class TextInOrder:
    """Hands on the texts of excerpts that run side by side as if they ran one after the other."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        """Begin before the first excerpt; `tell` is given the pieces of the joined text."""
        self._tell = tell
        self._head = 0  # the excerpt that is told as it comes
        self._held: dict[int, list[str]] = {}
        self._ended: set[int] = set()
        self._is_empty = True
        self._separator = ""  # what parts the next piece from those before

    def push(self, index: int, piece: Piece) -> None:
        """Take a step of an excerpt's answer."""
        if not piece.text:
            return
        if index == self._head:
            self._say(piece.text)
        else:
            self._held.setdefault(index, []).append(piece.text)

    def end(self, index: int) -> None:
        """No more comes of an excerpt."""
        self._ended.add(index)
        while self._head in self._ended:
            self._head += 1
            self._separator = "" if self._is_empty else " "
            for text in self._held.pop(self._head, []):
                self._say(text)

    def _say(self, text: str) -> None:
        self._tell(self._separator + text)
        self._separator, self._is_empty = "", False


def _first(errors: BaseExceptionGroup[Exception]) -> Exception:
    """Return the first plain exception of a group of groups."""
    first = errors.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
