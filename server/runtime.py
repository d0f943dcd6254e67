"""What one server process holds, and its life: loading, ready, draining or failed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from server.audio.limits import AudioLimits
from server.audio.pool import DecodePool
from server.board import Seat
from server.errors import ModelUnknownError, NotReadyError, QueueFullError, ShuttingDownError
from server.keys import KeyLimits, KeyRing
from server.log import structured
from server.longform import LongRecordings
from server.realtime import OpenSessions
from server.turnstile import Turnstile

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from server.engine.interface import Engine
    from server.metrics import Metrics
    from server.settings import Settings

_log = logging.getLogger(__name__)

_UPLOAD_RETRY_S = 1.0

State = Literal["loading", "ready", "draining", "failed"]


@dataclass(frozen=True, slots=True)
class Shared:
    """What a process that serves with others has in common with them.

    Attributes:
        metrics: its own.
        seat: where it counts what is limited.
        collect: gathers the metrics of all processes.
    """

    metrics: Metrics
    seat: Seat
    collect: Callable[[], Awaitable[bytes]]


class Runtime:
    """The engine, the decoding processes and the metrics of one application."""

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        metrics: Metrics,
        *,
        shared: Shared | None = None,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        """Prepare; `start` begins to load.

        Args:
            settings: the server's options.
            engine: not started yet.
            metrics: shared with the engine.
            shared: what it has in common with other processes, if there are any.
            on_failure: called when loading has failed or the engine has died, to end the process.

        Raises:
            SettingError: an API key is malformed, or the file of API keys cannot be read.
        """
        self.settings = settings
        self.engine = engine
        self.metrics = metrics
        self.keys = KeyRing.from_settings(
            settings.api_keys.get_secret_value(), settings.api_keys_file
        )
        seat = shared.seat if shared else Seat()
        owners = self.keys.owners
        self.key_limits = KeyLimits(
            max_concurrency=settings.key_max_concurrency,
            audio_s_per_minute=settings.key_audio_s_per_minute,
            use_of=lambda owner: seat.key_use(owner, owners),
        )
        # The engine can always fill its next batch from these, and decode beside it.
        self.turnstile = Turnstile(
            places=2 * settings.max_batch_size, max_waiting=settings.max_queue_size
        )
        self.created_s = int(time.time())
        self.decode_pool = DecodePool(settings.decode_workers, settings.decode_timeout_s)
        self.long_recordings = LongRecordings(
            settings.max_long_recordings, seat.tally("long_recordings")
        )
        self.open_sessions = OpenSessions(settings.realtime_max_sessions, seat.tally("sessions"))
        self.failure: Exception | None = None
        self._uploads = seat.tally("uploads")
        self._shared = shared
        self._on_failure = on_failure
        self._state: State = "loading"
        self._loading: asyncio.Task[None] | None = None
        self._draining: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        metrics.watch(engine.stats, lambda: self.state == "ready")
        metrics.watch_held(lambda: self.turnstile.waiting)

    @property
    def state(self) -> State:
        """Where in its life the process is; an engine that does not run counts as failed."""
        if self._state == "ready" and not self.engine.stats().alive:
            return "failed"
        return self._state

    def require_ready(self) -> None:
        """Raise NotReadyError or ShuttingDownError unless requests are taken."""
        if self.state == "loading":
            raise NotReadyError("the model is still loading")
        if self.state == "failed":
            raise NotReadyError("the model has failed")
        if self.state == "draining":
            raise ShuttingDownError("the server is shutting down")

    def require_model(self, name: str) -> None:
        """Raise ModelUnknownError unless the loaded model goes by this name."""
        names = [self.settings.served_name, *self.settings.aliases]
        if name not in names:
            raise ModelUnknownError(
                f"no model {name!r} here; there is {', '.join(names)}", param="model"
            )

    @property
    def audio_limits(self) -> AudioLimits:
        """What an upload may hold; what is longer than the model takes is cut."""
        return AudioLimits(
            max_audio_s=self.settings.max_audio_s,
            max_channels=self.settings.max_channels,
            min_rate_hz=self.settings.min_sample_rate_hz,
            max_rate_hz=self.settings.max_sample_rate_hz,
        )

    @contextlib.contextmanager
    def receiving(self) -> Iterator[None]:
        """Count an upload while it comes in.

        Raises:
            QueueFullError: too many come in already.
        """
        if self._uploads.total >= self.settings.max_uploads:
            reason = f"{self._uploads.total:g} uploads are being received already"
            raise QueueFullError(reason, retry_after_s=_UPLOAD_RETRY_S)
        self._uploads.add(1)
        try:
            yield
        finally:
            self._uploads.add(-1)

    async def render_metrics(self) -> bytes:
        """All series of the server in Prometheus' text format.

        Raises:
            NotReadyError: the other processes cannot be asked.
        """
        return await self._shared.collect() if self._shared else self.metrics.render()

    def start(self) -> None:
        """Begin to load; answers are given meanwhile, and readiness is off."""
        self._loading = asyncio.create_task(self._load())

    async def loaded(self) -> Exception | None:
        """Wait until loading has ended, and return why it has failed if it has."""
        if self._loading is not None:
            await asyncio.wait([self._loading])
        return self.failure

    async def _load(self) -> None:
        started_s = time.monotonic()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.decode_pool.start())
                group.create_task(self.engine.start())
        except* Exception as errors:  # noqa: BLE001 - a loader may raise anything
            self._fail(_first(errors))
        else:
            seconds = round(time.monotonic() - started_s, 3)
            _log.info("ready", extra=structured(model=self.settings.model, seconds=seconds))
            if self._state == "loading":
                self._state = "ready"
            self._watching = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        self._fail(await self.engine.failed())

    def _fail(self, error: Exception) -> None:
        self.failure = error
        self._state = "failed"
        _log.debug("the model failed", exc_info=error)
        self._on_failure()

    def begin_drain(self) -> asyncio.Task[None]:
        """Take no more requests; those in flight get `drain_timeout_s`.

        Returns:
            What is done once nothing is in flight any more.
        """
        if self._draining is None:
            self._state = "draining"
            self._draining = asyncio.create_task(self._drain())
        return self._draining

    async def _drain(self) -> None:
        """Let live sessions finish what they have heard, while the engine still takes it."""
        began_s = time.monotonic()
        await self.open_sessions.drain(self.settings.drain_timeout_s)
        left_s = self.settings.drain_timeout_s - (time.monotonic() - began_s)
        await self.engine.drain(max(0.0, left_s))

    async def stop(self) -> None:
        """Drain, then end the engine and the decoding processes."""
        if self._loading is not None and not self._loading.done():
            self._loading.cancel()
            await asyncio.wait([self._loading])
        await self.begin_drain()
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])
        await self.engine.stop()
        await self.decode_pool.stop()


def _first(errors: BaseExceptionGroup[Exception]) -> Exception:
    """Return the first plain exception of a group of groups."""
    first = errors.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
