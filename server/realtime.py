"""A live session: audio in as it is spoken, text out while it is. Knows no HTTP and no sockets.

    bytes -> samples -> turns -> jobs, one after the other -> engine -> events

A turn that goes on is transcribed again each time it has grown; the end of a turn goes before
that: it cancels such a job, and takes the place of one that waits. A session never has more than
one request in the engine, so that what many of them ask for is bounded by their number.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from server.agreement import GrowingText
from server.audio.clip import SAMPLE_RATE_HZ, Excerpt
from server.audio.pcm import SAMPLE_BYTES, Encoding, PcmStream
from server.audio.segmentation import excerpts
from server.audio.turns import TurnBegan, TurnEnded, TurnFinder, TurnGrew, TurnPiece, VadOptions
from server.audio.vad import SpeechDetector
from server.board import Tally
from server.engine.decoding import GREEDY, Decoding
from server.engine.interface import EngineRequest
from server.errors import (
    BufferEmptyError,
    BufferFullError,
    InvalidRequestError,
    QueueFullError,
    ServerError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractAsyncContextManager

    from numpy.typing import NDArray

    from server.audio.clip import Progress
    from server.audio.turns import TurnEvent
    from server.engine.admission import Ticket
    from server.engine.interface import Engine, EngineResult
    from server.metrics import Metrics

RATES_HZ = (24_000, 16_000, 8_000)
"""What a session's samples may come at; the first unless it says so."""

_WITH_LOGPROBS = Decoding(logprobs=True)
_MIN_COMMIT_S = 0.1
_HEARING_S = 1.0  # of audio that is listened to at once, in a thread
_RETRY_SESSIONS_S = 30.0  # nobody knows how long the open ones will last


class OpenSessions:
    """Bounds how many live sessions are open, and tells them when the server is about to end."""

    def __init__(self, most: int, sessions: Tally | None = None) -> None:
        """Begin without any; `sessions` is where they are counted."""
        self._most = most
        self._open = sessions or Tally()
        self.closing = asyncio.Event()
        self._none = asyncio.Event()
        self._none.set()

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """Hold one of the places.

        Raises:
            QueueFullError: they are all taken.
        """
        if self._open.total >= self._most:
            raise QueueFullError(
                f"{self._open.total:g} live sessions are open already",
                retry_after_s=_RETRY_SESSIONS_S,
            )
        self._open.add(1)
        self._none.clear()
        try:
            yield
        finally:
            self._open.add(-1)
            if not self._open.own:
                self._none.set()

    async def drain(self, timeout_s: float) -> None:
        """Have all sessions finish what they have heard, and wait for that."""
        self.closing.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._none.wait()


@dataclass(frozen=True, slots=True)
class SessionConfig:
    """What the client has set.

    Attributes:
        rate_hz: of its samples; one of RATES_HZ.
        encoding: of its samples.
        vad: how turns are found; None leaves that to its commits.
        prompt: replaces the checkpoint's own.
        language: ISO 639-1 code of what is spoken; None leaves it to the model.
        logprobs: whether it wants to know how sure the model was.
    """

    rate_hz: int = RATES_HZ[0]
    encoding: Encoding = "pcm16"
    vad: VadOptions | None = field(default_factory=VadOptions)
    prompt: str | None = None
    language: str | None = None
    logprobs: bool = False

    @property
    def bytes_per_s(self) -> int:
        """Of its audio."""
        return self.rate_hz * SAMPLE_BYTES[self.encoding]


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """What the server has set.

    Attributes:
        max_buffer_s: most audio that is held untranscribed.
        partial_interval_s: audio between two transcripts of a turn that goes on; 0 for none.
        request_timeout_s: until a piece of a turn is given up.
        max_piece_s: longest piece of a turn, if the engine takes as much.
    """

    max_buffer_s: float
    partial_interval_s: float
    request_timeout_s: float
    max_piece_s: float


@dataclass(frozen=True, slots=True)
class SpeechStarted:
    """Somebody speaks; milliseconds count from the session's first sample."""

    item_id: str
    start_ms: int


@dataclass(frozen=True, slots=True)
class SpeechStopped:
    """The turn is over."""

    item_id: str
    end_ms: int


@dataclass(frozen=True, slots=True)
class Committed:
    """The turn's audio is complete."""

    item_id: str
    previous_item_id: str | None


@dataclass(frozen=True, slots=True)
class Cleared:
    """What had not been committed is forgotten."""


@dataclass(frozen=True, slots=True)
class Delta:
    """Text of a turn that is new and final."""

    item_id: str
    text: str


@dataclass(frozen=True, slots=True)
class Completed:
    """A turn's whole text, which is all its deltas one after the other.

    Attributes:
        item_id: of the turn.
        previous_item_id: of the turn before.
        text: the deltas put together.
        audio_s: seconds.
        language: ISO 639-1 code, None where the model does not tell.
        logprobs: UTF-8 and log-probability of each token of the last transcripts of its pieces,
            which the text may not follow where they contradict what was told; None if not wanted.
    """

    item_id: str
    previous_item_id: str | None
    text: str
    audio_s: float
    language: str | None
    logprobs: tuple[tuple[bytes, float], ...] | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """A turn whose transcription failed."""

    item_id: str
    error: ServerError


SessionEvent = SpeechStarted | SpeechStopped | Committed | Cleared | Delta | Completed | Failed


@dataclass(slots=True, eq=False)
class _Item:
    """A turn.

    Attributes:
        id: names it to the client.
        began_s: monotonic time at which it was noticed.
        config: what the client had set when it ended, or now while it goes on.
        text: what it says, as far as that is known.
        audio_s: of its complete pieces.
        results: of these.
        previous_id: of the turn before it, once it is committed.
        ended_s: monotonic time of its end.
        is_dropped: nobody wants its text: cleared, or failed.
        has_spoken: a delta of it is out.
    """

    id: str
    began_s: float
    config: SessionConfig
    text: GrowingText = field(default_factory=GrowingText)
    audio_s: float = 0.0
    results: list[EngineResult] = field(default_factory=list)
    previous_id: str | None = None
    ended_s: float = 0.0
    is_dropped: bool = False
    has_spoken: bool = False


@dataclass(frozen=True, slots=True)
class _Grown:
    """Transcribe what an open piece has grown to."""

    item: _Item
    waveform: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class _Piece:
    """Transcribe a piece for good; `is_cut`: its turn goes on behind it."""

    item: _Item
    waveform: NDArray[np.float32]
    is_cut: bool


@dataclass(frozen=True, slots=True)
class _Whole:
    """Transcribe what a client has committed, of whatever length."""

    item: _Item
    waveform: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class _End:
    """Say that an item is complete."""

    item: _Item


_Job = _Grown | _Piece | _Whole | _End


class RealtimeSession:
    """One client's session; `run` works beside the methods that take its audio."""

    def __init__(  # noqa: PLR0913 - what one session needs
        self,
        engine: Engine,
        ticket: Ticket,
        limits: SessionLimits,
        metrics: Metrics,
        *,
        id_: str,
        emit: Callable[[SessionEvent], None],
        charge: Callable[[float], AbstractAsyncContextManager[None]],
    ) -> None:
        """Begin before the first sample.

        Args:
            engine: that runs.
            ticket: the session's, held for as long as it is open; it counts while it has work.
            limits: the server's.
            metrics: told of turns.
            id_: names the session in logs.
            emit: takes what the client is to be told; what it raises ends the session.
            charge: holds seconds of audio against the client's share while they are transcribed.
        """
        self._engine = engine
        self._ticket = ticket
        self._limits = limits
        self._metrics = metrics
        self._id = id_
        self._emit = emit
        self._charge = charge
        self._n_requests = 0
        self._heard = 0  # samples at 16 kHz
        self._item: _Item | None = None  # the open turn
        self._last_id: str | None = None  # of the turn committed last
        self._jobs: deque[_Job] = deque()
        self._growing: asyncio.Task[EngineResult] | None = None
        self._hearing = asyncio.Lock()  # while a thread listens
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._running_samples = 0
        self.config = SessionConfig()
        self._begin_hearing()

    @property
    def audio_s(self) -> float:
        """Seconds that were heard."""
        return self._heard / SAMPLE_RATE_HZ

    @property
    def _held_s(self) -> float:
        """Audio in memory that is still to be transcribed, seconds."""
        waiting = sum(len(job.waveform) for job in self._jobs if isinstance(job, _Piece | _Whole))
        finder = self._finder.held_samples if self._finder is not None else 0
        committable = sum(map(len, self._buffer))
        return (waiting + self._running_samples + finder + committable) / SAMPLE_RATE_HZ

    def configure(self, config: SessionConfig) -> None:
        """Take a new configuration.

        Raises:
            InvalidRequestError: it would change how audio is heard, and there is some that was not
                committed.
        """
        now = self.config
        hears_anew = (config.rate_hz, config.encoding, config.vad) != (
            now.rate_hz,
            now.encoding,
            now.vad,
        )
        if hears_anew and (self._item is not None or self._buffer):
            raise InvalidRequestError(
                "the format and turn_detection cannot change while audio waits to be committed: "
                "commit or clear it before"
            )
        self.config = config
        if hears_anew:
            self._begin_hearing()

    def _begin_hearing(self) -> None:
        self._pcm = PcmStream(self.config.rate_hz, self.config.encoding)
        self._buffer: list[NDArray[np.float32]] = []  # of a client that commits by itself
        self._finder: TurnFinder | None = None
        if self.config.vad is not None:
            self._finder = TurnFinder(
                SpeechDetector(),
                self.config.vad,
                max_samples=self._piece_samples,
                growth_samples=round(self._limits.partial_interval_s * SAMPLE_RATE_HZ),
                position=self._heard,
            )

    async def append(self, data: bytes) -> None:
        """Take the next samples, in the configured encoding and at the configured rate.

        Raises:
            BufferFullError: too much is held already; nothing of `data` was taken.
        """
        bytes_per_s = self.config.bytes_per_s
        if self._held_s + len(data) / bytes_per_s > self._limits.max_buffer_s:
            raise BufferFullError(
                f"{self._held_s:.1f} s of audio wait to be transcribed, and at most "
                f"{self._limits.max_buffer_s:g} s may: send it no faster than it is spoken"
            )
        block_bytes = round(_HEARING_S * bytes_per_s)
        async with self._hearing:
            for start in range(0, len(data), block_bytes):
                block = data[start : start + block_bytes]
                for event in await asyncio.to_thread(self._hear, block):
                    self._follow(event)

    def _hear(self, block: bytes) -> list[TurnEvent]:
        return self._listen(self._pcm.push(block))

    def _listen(self, samples: NDArray[np.float32]) -> list[TurnEvent]:
        self._heard += len(samples)
        if self._finder is not None:
            return self._finder.push(samples)
        if len(samples):
            self._buffer.append(samples)
        return []

    async def commit(self) -> None:
        """End the open turn here.

        Raises:
            BufferEmptyError: there is none, or next to nothing of one.
        """
        async with self._hearing:
            if self._finder is None:
                self._commit_buffer()
                return
            if self._item is None:
                raise BufferEmptyError("nobody speaks in the audio that was not committed yet")
            tail = self._pcm.finish()
            self._heard += len(tail)
            for event in await asyncio.to_thread(self._finder.commit, tail):
                self._follow(event, says_stopped=False)

    def _commit_buffer(self) -> None:
        held_s = sum(map(len, self._buffer)) / SAMPLE_RATE_HZ
        if held_s < _MIN_COMMIT_S:
            raise BufferEmptyError(
                f"{1000 * held_s:.0f} ms of audio were not committed yet, and at least "
                f"{1000 * _MIN_COMMIT_S:.0f} ms are needed"
            )
        self._listen(self._pcm.finish())
        waveform, self._buffer = np.concatenate(self._buffer), []
        item = self._new_item()
        self._commit(item)
        self._enqueue(_Whole(item, waveform))
        self._enqueue(_End(item))

    def clear(self) -> None:
        """Forget what was not committed."""
        tail_samples = len(self._pcm.finish())
        self._heard += tail_samples
        self._buffer = []
        if self._finder is not None:
            self._finder.clear(tail_samples)
        if self._item is not None:
            self._item.is_dropped = True
            self._item = None
        self._emit(Cleared())

    async def finish(self) -> None:
        """Commit what there is, and wait until all is transcribed."""
        with contextlib.suppress(BufferEmptyError):
            await self.commit()
        await self._idle.wait()

    def _follow(self, event: TurnEvent, *, says_stopped: bool = True) -> None:
        """Take note of what has become of a turn."""
        if isinstance(event, TurnBegan):
            self._item = self._new_item()
            self._emit(SpeechStarted(self._item.id, _milliseconds(event.start)))
            return
        item = self._item
        if item is None:  # cleared meanwhile
            return
        if isinstance(event, TurnEnded):
            self._item = None
            if says_stopped:
                self._emit(SpeechStopped(item.id, _milliseconds(event.end)))
            self._commit(item)
            self._enqueue(_End(item))
        elif isinstance(event, TurnGrew):
            self._enqueue(_Grown(item, event.waveform))
        elif isinstance(event, TurnPiece):
            self._enqueue(_Piece(item, event.waveform, event.is_cut))

    def _new_item(self) -> _Item:
        return _Item(f"item_{uuid.uuid4().hex[:20]}", time.monotonic(), self.config)

    def _commit(self, item: _Item) -> None:
        item.previous_id, self._last_id = self._last_id, item.id
        item.ended_s = time.monotonic()
        item.config = self.config
        self._emit(Committed(item.id, item.previous_id))

    def _enqueue(self, job: _Job) -> None:
        if self._jobs and isinstance(self._jobs[-1], _Grown):
            self._jobs.pop()
        if self._growing is not None and not isinstance(job, _Grown):
            self._growing.cancel()
        self._jobs.append(job)
        self._idle.clear()
        self._wake.set()

    async def run(self) -> None:
        """Work until it is cancelled."""
        while True:
            while not self._jobs:
                self._idle.set()
                self._wake.clear()
                await self._wake.wait()
            await self._work(self._jobs.popleft())

    async def _work(self, job: _Job) -> None:
        item = job.item
        if item.is_dropped:
            return
        if isinstance(job, _Grown):
            await self._grow(item, job.waveform)
            return
        try:
            if isinstance(job, _Piece):
                await self._transcribe(item, job.waveform, is_cut=job.is_cut)
            elif isinstance(job, _Whole):
                await self._transcribe_whole(item, job.waveform)
            else:
                self._complete(item)
        except ServerError as error:
            item.is_dropped = True
            self._emit(Failed(item.id, error))
        finally:
            self._running_samples = 0

    async def _grow(self, item: _Item, waveform: NDArray[np.float32]) -> None:
        """Transcribe an open piece; without an answer, its next length will do."""
        request = self._request(item, waveform)
        try:
            with self._engine.admit(request.audio_s):
                self._growing = asyncio.create_task(self._engine.submit(request))
                result = await self._growing
        except ServerError:
            return
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            return  # the piece is complete
        finally:
            self._growing = None
        self._tell(item, item.text.grow(result.text))

    async def _transcribe_whole(self, item: _Item, waveform: NDArray[np.float32]) -> None:
        self._running_samples = len(waveform)
        for found in await asyncio.to_thread(self._cut, waveform):
            if isinstance(found, Excerpt):
                await self._transcribe(item, found.waveform)

    def _cut(self, waveform: NDArray[np.float32]) -> list[Excerpt | Progress]:
        """Cut as an upload is cut."""
        whole_samples = int(self._engine.capabilities.max_audio_s * SAMPLE_RATE_HZ)
        return list(
            excerpts([waveform], whole_samples=whole_samples, max_samples=self._piece_samples)
        )

    @property
    def _piece_samples(self) -> int:
        """Longest piece of what is cut."""
        return int(
            min(self._engine.capabilities.max_audio_s, self._limits.max_piece_s) * SAMPLE_RATE_HZ
        )

    async def _transcribe(
        self, item: _Item, waveform: NDArray[np.float32], *, is_cut: bool = False
    ) -> None:
        self._running_samples = max(self._running_samples, len(waveform))
        request = self._request(item, waveform)
        async with self._charge(request.audio_s):
            self._ticket.measure(request.audio_s)
            try:
                result = await self._engine.submit(request)
            finally:
                self._ticket.measure(0.0, clips=0)
        item.audio_s += request.audio_s
        item.results.append(result)
        self._tell(item, item.text.finish(result.text, is_cut=is_cut))

    def _request(self, item: _Item, waveform: NDArray[np.float32]) -> EngineRequest:
        self._n_requests += 1
        return EngineRequest(
            id=f"{self._id}/{self._n_requests}",
            waveform=waveform,
            audio_s=len(waveform) / SAMPLE_RATE_HZ,
            deadline_s=time.monotonic() + self._limits.request_timeout_s,
            prompt=item.config.prompt,
            decoding=_WITH_LOGPROBS if item.config.logprobs else GREEDY,
        )

    def _tell(self, item: _Item, text: str) -> None:
        if not text or item.is_dropped:
            return
        if not item.has_spoken:
            item.has_spoken = True
            self._metrics.turn_first_delta(time.monotonic() - item.began_s)
        self._emit(Delta(item.id, text))

    def _complete(self, item: _Item) -> None:
        self._metrics.turn_finalised(time.monotonic() - item.ended_s, item.text.contradictions)
        stages_s = {
            "queue": sum(result.queue_s for result in item.results),
            "encode": sum(result.encode_s for result in item.results),
            "generate": sum(result.generate_s for result in item.results),
            "prefill": sum(result.prefill_s for result in item.results),
        }
        self._metrics.transcribed(item.audio_s, item.results, stages_s)
        heard = Counter(each.language for each in item.results if each.language is not None)
        language = item.config.language or next((name for name, _ in heard.most_common(1)), None)
        text = item.text.text
        logprobs = self._logprobs(item) if item.config.logprobs else None
        self._emit(Completed(item.id, item.previous_id, text, item.audio_s, language, logprobs))

    def _logprobs(self, item: _Item) -> tuple[tuple[bytes, float], ...]:
        told: list[tuple[bytes, float]] = []
        for result in item.results:
            told += zip(result.token_bytes or (), result.logprobs or (), strict=False)
        return tuple(each for each in told if each[0])  # special tokens are no text


def _milliseconds(samples: int) -> int:
    return round(1000 * samples / SAMPLE_RATE_HZ)
