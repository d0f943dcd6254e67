"""An engine in another process: a front end holds a `RemoteEngine`, an `EngineHost` serves it.

    front end ── admit, submit, cancel ──> engine's process
              <── pieces, answers, death ──

Messages go as a pickle of some of them, behind its length. Both ends are processes of this program
that were started with one end of a socket pair each; nobody else can write to it. Samples lie in
memory that both share, and every clip that was submitted is answered, cancelled ones too: then the
front end uses their place again. (The device's thread may still read that of a cancelled one, of
which nobody sees anything.) What admission looks at lies in the shared board, so that a refusal
asks nobody.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import pickle
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from server.engine.intake import Gate, Pending, end_all
from server.engine.interface import EngineRequest, EngineStats
from server.errors import (
    DeadlineExceededError,
    InferenceFailedError,
    NotReadyError,
    ServerError,
    ShuttingDownError,
)

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence
    from contextlib import AbstractContextManager

    import numpy as np
    from numpy.typing import NDArray

    from server.board import Board
    from server.engine.admission import Admission, Ticket
    from server.engine.continuous import ContinuousEngine
    from server.engine.interface import Capabilities, EngineResult
    from server.engine.shared_samples import Place, SharedSamples

_LENGTH = struct.Struct(">Q")  # bytes of the pickle
_BUFFER_BYTES = 1 << 20
_DEADLINE_GRACE_S = 10.0  # for the engine to say itself that it is over
_POST_INTERVAL_S = 0.05  # of the engine's numbers on the board
_METRICS_TIMEOUT_S = 2.0

_Message = tuple[str, int, Any]  # kind, key, value
_Hear = Callable[[str, int, Any], None]


class _Channel(asyncio.BufferedProtocol):
    """One end of the socket pair. What is sent within one turn of the event loop goes as one."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._early: list[_Message] = []
        self._hear: _Hear = self._keep
        self._outbox: list[_Message] = []
        self._can_write = asyncio.Event()
        self._closed = asyncio.Event()
        self._error: Exception | None = None
        self._parts = self._receive_parts()
        self._unfilled = next(self._parts)

    @classmethod
    async def over(cls, end: socket.socket) -> _Channel:
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            end.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
        _, channel = await asyncio.get_running_loop().create_unix_connection(cls, sock=end)
        return channel

    def send(self, kind: str, key: int, value: object = None) -> None:
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outbox.append((kind, key, value))

    async def drain(self) -> None:
        """Wait for room to send more; raises OSError where the other process is gone."""
        await self._can_write.wait()
        if self._closed.is_set():
            raise ConnectionResetError

    async def listen(self, hear: _Hear) -> None:
        """Have `hear` called with each message until the other process is gone.

        Raises:
            Exception: what was received is no message, or what is to be sent cannot be; or `hear`
                raised it. The channel is closed then.
        """
        self._hear = hear
        try:
            for message in self._early:
                hear(*message)
        except Exception as error:  # noqa: BLE001 - handed on
            self._give_up(error)
        self._early.clear()
        await self._closed.wait()
        if self._error is not None:
            raise self._error

    async def close(self) -> None:
        if self._transport is not None:
            self._flush()
            self._transport.close()
            await self._closed.wait()

    def _flush(self) -> None:
        transport, messages = self._transport, self._outbox
        self._outbox = []
        if not messages or transport is None or transport.is_closing():
            return
        try:
            message = pickle.dumps(messages)
        except Exception as error:  # noqa: BLE001 - better no channel than one that loses messages
            self._give_up(error)
        else:
            transport.write(_LENGTH.pack(len(message)) + message)

    def _receive_parts(self) -> Generator[memoryview]:
        """Yield what is to be filled next; messages are complete in between."""
        length = bytearray(_LENGTH.size)
        while True:
            yield memoryview(length)
            messages = bytearray(*_LENGTH.unpack(length))
            yield memoryview(messages)
            for message in pickle.loads(messages):  # noqa: S301 - from our own process
                self._hear(*message)

    def _keep(self, kind: str, key: int, value: object) -> None:
        """Until somebody listens."""
        self._early.append((kind, key, value))

    def _give_up(self, error: Exception) -> None:
        self._error = error
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: Any) -> None:  # noqa: ANN401 - of a socket
        self._transport = transport
        self._can_write.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self._closed.set()
        self._can_write.set()

    def pause_writing(self) -> None:
        self._can_write.clear()

    def resume_writing(self) -> None:
        self._can_write.set()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._unfilled

    def buffer_updated(self, nbytes: int) -> None:
        if nbytes < len(self._unfilled):
            self._unfilled = self._unfilled[nbytes:]
            return
        try:
            self._unfilled = next(self._parts)
        except Exception as error:  # noqa: BLE001 - handed on
            self._give_up(error)


class RemoteEngine:
    """Implements `Engine` in a front end."""

    def __init__(
        self,
        end: socket.socket,
        board: Board,
        samples: SharedSamples,
        admission: Admission,
        *,
        own_metrics: Callable[[], bytes],
    ) -> None:
        """Prepare; `start` waits for the model.

        Args:
            end: of the socket pair; the engine's host holds the other.
            board: shared with it and the other front ends.
            samples: shared with it.
            admission: counts on the board.
            own_metrics: of this process, in Prometheus' text format.
        """
        self._end = end
        self._board = board
        self._samples = samples
        self._admission = admission
        self._own_metrics = own_metrics
        self._channel: _Channel | None = None
        self._listening: asyncio.Task[None] | None = None
        self._capabilities: Capabilities | None = None
        self._loaded = asyncio.Event()
        self._death: asyncio.Future[Exception] | None = None
        self._waiting: dict[int, Pending] = {}
        self._lent: dict[int, Place] = {}
        self._has_room = asyncio.Event()
        self._keys = itertools.count()
        self._gate = Gate(admission)

    @property
    def capabilities(self) -> Capabilities:
        """What the checkpoint can be asked for."""
        if self._capabilities is None:
            raise NotReadyError("the model is not loaded")
        return self._capabilities

    async def start(self) -> None:
        """Wait until the model is loaded in its process."""
        self._death = asyncio.get_running_loop().create_future()
        self._channel = await _Channel.over(self._end)
        self._listening = asyncio.create_task(self._listen(self._channel))
        loaded = asyncio.ensure_future(self._loaded.wait())
        ends: list[asyncio.Future[Any]] = [loaded, self._death]
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            loaded.cancel()
        if self._death.done():
            raise self._death.result()

    def admit(self, audio_s: float) -> AbstractContextManager[Ticket]:
        """Hold a ticket."""
        posted = _Posted.read(self._board)
        self._admission.rate.assume(posted.rtfx)
        return self._gate.admit(
            audio_s, running=posted.running, running_audio_s=posted.running_audio_s
        )

    async def submit(self, request: EngineRequest) -> EngineResult:
        """Hand a clip over and wait for its transcript."""
        channel = self._channel
        if channel is None or not self.stats().alive:
            raise NotReadyError("the engine is not running")
        key = next(self._keys)
        waiting = self._waiting[key] = Pending(request.on_piece)
        patience_s = None
        if request.deadline_s is not None:
            patience_s = max(0.0, request.deadline_s - time.monotonic()) + _DEADLINE_GRACE_S
        try:
            async with asyncio.timeout(patience_s):
                place = self._lent[key] = await self._put(request.waveform)
                streams = request.on_piece is not None
                told = vars(request) | {"waveform": place, "on_piece": streams}
                channel.send("submit", key, told)
                await channel.drain()
                result: EngineResult = await waiting.answer
        except TimeoutError as error:
            raise DeadlineExceededError("the engine did not answer in time") from error
        except OSError as error:
            raise InferenceFailedError("the engine has died") from error
        finally:
            # Still there: the client left, or it was refused from here.
            if self._waiting.pop(key, None) is not None:
                channel.send("cancel", key)
        return result

    async def _put(self, waveform: NDArray[np.float32]) -> Place:
        """Put samples where the engine sees them, as soon as there is room; raises OSError."""
        while (place := self._samples.put(waveform)) is None:
            self._has_room.clear()
            await self._has_room.wait()
            if self._death is None or self._death.done():
                raise ConnectionResetError
        return place

    async def metrics(self) -> bytes:
        """Series of all processes together, in Prometheus' text format.

        Raises:
            NotReadyError: the engine's process does not answer.
        """
        channel = self._channel
        if channel is None:
            return self._own_metrics()
        key = next(self._keys)
        waiting = self._waiting[key] = Pending()
        channel.send("collect", key)
        try:
            async with asyncio.timeout(2 * _METRICS_TIMEOUT_S):
                text: bytes = await waiting.answer
        except TimeoutError as error:
            raise NotReadyError("the engine's process does not answer") from error
        finally:
            self._waiting.pop(key, None)
        return text

    async def drain(self, timeout_s: float) -> None:
        """Finish what is admitted here; after `timeout_s`, refuse the rest."""
        self._gate.close()
        await self._gate.wait_until_empty(timeout_s)
        end_all(
            self._waiting.values(),
            ShuttingDownError("the server shut down before this request was done"),
        )

    async def stop(self) -> None:
        """Let go of the engine; it lives on."""
        self._gate.close()
        end_all(self._waiting.values(), ShuttingDownError("the server is shutting down"))
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.wait([self._listening])
        if self._channel is not None:
            await self._channel.close()

    async def failed(self) -> Exception:
        """Wait until the engine has died for good, and return why."""
        if self._death is None:
            raise NotReadyError("the engine has not been started")
        return await asyncio.shield(self._death)

    def stats(self) -> EngineStats:
        """Return what is where, for all front ends together."""
        posted = _Posted.read(self._board)
        is_dead = self._death is None or self._death.done()
        return EngineStats(
            alive=posted.is_alive and not is_dead,
            admitted=self._admission.requests,
            admitted_audio_s=self._admission.audio_s,
            queued=posted.queued,
            running=posted.running,
            running_audio_s=posted.running_audio_s,
            slots=posted.slots,
            kv_cache_bytes=posted.kv_cache_bytes,
            rtfx=posted.rtfx,
        )

    async def _listen(self, channel: _Channel) -> None:
        try:
            await channel.listen(partial(self._hear, channel))
        except Exception as error:  # noqa: BLE001 - nobody would hear the answers any more
            self._die(error)
        else:
            self._die(RuntimeError("the engine's process has ended"))

    def _hear(
        self,
        channel: _Channel,
        kind: str,
        key: int,
        value: Any,  # noqa: ANN401 - of another type in each kind of message
    ) -> None:
        if kind == "loaded":
            self._capabilities = value
            self._loaded.set()
        elif kind == "died":
            self._die(RuntimeError(value))
        elif kind == "collect":
            channel.send("collected", key, self._own_metrics())
        elif kind == "piece":
            if (waiting := self._waiting.get(key)) is not None:
                waiting.tell(value)
        else:
            if (place := self._lent.pop(key, None)) is not None:
                self._samples.give_back(place)
                self._has_room.set()
            # Else gone: its client has left meanwhile.
            if (waiting := self._waiting.pop(key, None)) is not None:
                waiting.end(value)

    def _die(self, error: Exception) -> None:
        if self._death is not None and not self._death.done():
            self._death.set_result(error)
        self._has_room.set()
        end_all(self._waiting.values(), InferenceFailedError("the engine has died"))


class EngineHost:
    """Serves one engine to front ends."""

    def __init__(
        self,
        engine: ContinuousEngine,
        board: Board,
        *,
        own_metrics: Callable[[], bytes],
        merge_metrics: Callable[[Sequence[bytes], Sequence[bytes]], bytes],
    ) -> None:
        """Prepare; `start` loads.

        Args:
            engine: not started yet.
            board: shared with the front ends.
            own_metrics: of this process, in Prometheus' text format.
            merge_metrics: makes one text of those of processes that live and of some that ended.
        """
        self._engine = engine
        self._board = board
        self._own_metrics = own_metrics
        self._merge_metrics = merge_metrics
        self._channels: dict[_Channel, bytes] = {}
        """Of the front ends, and the metrics that each was last seen with."""
        self._ended: list[bytes] = []
        self._capabilities: Capabilities | None = None
        self._replies: dict[int, asyncio.Future[bytes]] = {}
        self._keys = itertools.count()
        self._posting: asyncio.Task[None] | None = None
        self._collecting: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Load the model, and tell the front ends of it, or of why it cannot be."""
        self._posting = asyncio.create_task(self._post())
        try:
            await self._engine.start()
        except Exception as error:
            self.die(error)
            raise
        self._capabilities = self._engine.capabilities
        self._post_once()
        for channel in self._channels:
            channel.send("loaded", 0, self._capabilities)

    def die(self, error: Exception) -> None:
        """Tell the front ends that there will be no engine any more."""
        for channel in self._channels:
            channel.send("died", 0, str(error))

    async def stop(self) -> None:
        """End the engine."""
        if self._posting is not None:
            self._posting.cancel()
            await asyncio.wait([self._posting])
        await self._engine.stop()

    async def serve(self, end: socket.socket, samples: SharedSamples) -> None:
        """Serve one front end until it goes; what it waited for is cancelled then.

        Args:
            end: of the socket pair; the front end holds the other.
            samples: shared with it.

        Raises:
            Exception: what it sent is no message.
        """
        channel = await _Channel.over(end)
        self._channels[channel] = b""
        if self._capabilities is not None:
            channel.send("loaded", 0, self._capabilities)
        clips = _Clips(self._engine, channel, samples)

        def hear(kind: str, key: int, value: Any) -> None:  # noqa: ANN401 - likewise
            if kind == "submit":
                clips.submit(key, value)
            elif kind == "cancel":
                clips.cancel(key)
            elif kind == "collected":
                if (reply := self._replies.get(key)) is not None and not reply.done():
                    reply.set_result(value)
            else:
                collecting = asyncio.create_task(self._collect(channel, key))
                self._collecting.add(collecting)
                collecting.add_done_callback(self._collecting.discard)

        self._engine.share(samples.memory)
        try:
            await channel.listen(hear)
        finally:
            clips.cancel_all()
            self._engine.forget(samples.memory)
            # What it counted stays counted, or sums over all processes would go down.
            self._ended = [self._merge_metrics([], [*self._ended, self._channels.pop(channel)])]
            await channel.close()

    async def _collect(self, channel: _Channel, key: int) -> None:
        """Gather the metrics of all processes; one that does not answer in time is as last seen."""
        asked: dict[_Channel, asyncio.Future[bytes]] = {}
        numbers = []
        for each in self._channels:
            number = next(self._keys)
            numbers.append(number)
            asked[each] = self._replies[number] = asyncio.get_running_loop().create_future()
            each.send("collect", number)
        try:
            await asyncio.wait(asked.values(), timeout=_METRICS_TIMEOUT_S)
        finally:
            for number in numbers:
                del self._replies[number]
        for each, reply in asked.items():
            if reply.done() and each in self._channels:
                self._channels[each] = reply.result()
        living = [self._own_metrics(), *self._channels.values()]
        channel.send("answer", key, self._merge_metrics(living, self._ended))

    async def _post(self) -> None:
        while True:
            self._post_once()
            await asyncio.sleep(_POST_INTERVAL_S)

    def _post_once(self) -> None:
        _Posted.of(self._engine.stats()).write(self._board)


class _Clips:
    """What one front end has in the engine. Each of its clips is answered once, come what may."""

    def __init__(self, engine: ContinuousEngine, channel: _Channel, samples: SharedSamples) -> None:
        self._engine = engine
        self._channel = channel
        self._samples = samples
        self._keys: dict[int, int] = {}  # the engine's, by the front end's

    def submit(self, key: int, told: dict[str, Any]) -> None:
        """Begin a clip, of which the front end has told all but its samples and its listener."""
        waveform = self._samples.view(told["waveform"])
        tell = partial(self._channel.send, "piece", key) if told["on_piece"] else None
        request = EngineRequest(**told | {"waveform": waveform, "on_piece": tell})
        try:
            self._keys[key] = self._engine.begin(request, partial(self._answer, key))
        except ServerError as error:
            self._answer(key, error)

    def cancel(self, key: int) -> None:
        """Drop a clip, if it is not answered yet; nobody may wait for more than its place."""
        if (begun := self._keys.get(key)) is not None:
            self._engine.cancel(begun)
            self._answer(key, InferenceFailedError("the engine has dropped this audio"))

    def cancel_all(self) -> None:
        """Drop them all: nobody is there to be answered."""
        for begun in self._keys.values():
            self._engine.cancel(begun)
        self._keys.clear()

    def _answer(self, key: int, answer: EngineResult | ServerError) -> None:
        self._keys.pop(key, None)
        self._channel.send("answer", key, answer)


@dataclass(frozen=True, slots=True)
class _Posted:
    """The engine's numbers on the board."""

    is_alive: bool
    queued: int
    running: int
    running_audio_s: float
    slots: int
    kv_cache_bytes: int
    rtfx: float | None

    @classmethod
    def of(cls, stats: EngineStats) -> _Posted:
        return cls(
            stats.alive, stats.queued, stats.running, stats.running_audio_s, stats.slots,
            stats.kv_cache_bytes, stats.rtfx,
        )  # fmt: skip

    def write(self, board: Board) -> None:
        rtfx = math.nan if self.rtfx is None else self.rtfx
        board.engine[:7] = (
            self.is_alive, self.queued, self.running, self.running_audio_s, self.slots,
            self.kv_cache_bytes, rtfx,
        )  # fmt: skip

    @classmethod
    def read(cls, board: Board) -> _Posted:
        alive, queued, running, running_audio_s, slots, kv, rtfx = board.engine[:7].tolist()
        return cls(
            bool(alive), int(queued), int(running), running_audio_s, int(slots), int(kv),
            None if math.isnan(rtfx) else rtfx,
        )  # fmt: skip
