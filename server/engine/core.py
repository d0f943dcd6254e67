"""One iteration after another: schedule, encode and prefill, one decode step, answer what ended.

Owned by one thread; knows no asyncio. A call into the model that fails is tried again on halves of
its batch until the guilty request stands alone and fails; then a probe tells a guilty request from
a broken device, whose error ends the engine.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from server.engine.generation import LOOP_RETRY_PENALTY, Generation, TextStream
from server.engine.interface import EngineResult, IterationReport, Piece
from server.engine.scheduler import Decision, Running, Waiting, decide
from server.errors import (
    DeadlineExceededError,
    InferenceFailedError,
    InvalidRequestError,
    ServerError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from server.engine.decoding import Token
    from server.engine.interface import EndReason, EngineRequest, Plan, Runner, StartReport
    from server.engine.scheduler import ScheduleLimits
    from server.transcription import Word

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Queued:
    """A request that has not started."""

    key: int
    request: EngineRequest
    arrived_s: float


@dataclass(slots=True, eq=False)
class _Active:
    """A request that runs; its place in the list is its row.

    Attributes:
        queued: what it was before.
        plan: its sequence.
        generation: its answer.
        stream: cuts its text into pieces; None where nobody listens.
        started_s: when its batch began to be encoded.
        batch_size: clips in that batch.
        report: what starting them took.
        first_token_s: when its first token came.
    """

    queued: _Queued
    plan: Plan
    generation: Generation
    stream: TextStream | None
    started_s: float = 0.0
    batch_size: int = 0
    report: StartReport | None = None
    first_token_s: float | None = None


@dataclass(slots=True)
class Outcome:
    """What has come of the requests since the last time.

    Attributes:
        pieces: new tokens of requests that listen, by key and in order.
        answers: results and errors, by key; none comes after these.
        busy_s: time that the device worked.
    """

    pieces: list[tuple[int, Piece]] = field(default_factory=list)
    answers: list[tuple[int, EngineResult | ServerError]] = field(default_factory=list)
    busy_s: float = 0.0

    def __bool__(self) -> bool:
        """Whether anybody wants to know."""
        return bool(self.pieces or self.answers)


class EngineCore:
    """The requests, waiting and running, and the runner that they run on."""

    def __init__(
        self,
        runner: Runner,
        limits: ScheduleLimits,
        *,
        guards_loops: bool = True,
        on_iteration: Callable[[IterationReport], None] = lambda _report: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin empty.

        Args:
            runner: warm, with all its slots free.
            limits: of an iteration; its size is bounded by the runner's slots besides.
            guards_loops: whether answers that repeat themselves are broken off.
            on_iteration: told of each, in this thread.
            clock: monotonic seconds; the requests' deadlines are on it.
        """
        self.runner = runner
        self._limits = replace(
            limits,
            max_batch_size=min(limits.max_batch_size, runner.n_slots),
            window_s=runner.window_s,
        )
        self._guards_loops = guards_loops
        self._on_iteration = on_iteration
        self._clock = clock
        self._waiting: dict[int, _Queued] = {}
        self._running: list[_Active] = []
        self._wake_s: float | None = None
        self._outcome = Outcome()
        self._report = IterationReport()
        self._ended: Counter[EndReason] = Counter()

    @property
    def waiting(self) -> int:
        """Requests that have not started."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that run."""
        return len(self._running)

    @property
    def running_audio_s(self) -> float:
        """Their audio, seconds."""
        return sum(each.queued.request.audio_s for each in self._running)

    def idle_s(self) -> float | None:
        """How long nothing is to be done if nothing arrives; None for until something does."""
        if self._running or self._ended:  # who left is still to be reported
            return 0.0
        if not self._waiting:
            return None
        return 0.0 if self._wake_s is None else max(0.0, self._wake_s - self._clock())

    def submit(self, key: int, request: EngineRequest, arrived_s: float) -> None:
        """Queue a request; its answer will come under `key`."""
        self._waiting[key] = _Queued(key, request, arrived_s)
        self._wake_s = None

    def cancel(self, key: int) -> None:
        """Drop a request, wherever it is; nobody waits for its answer."""
        if self._waiting.pop(key, None) is not None:
            self._ended["cancelled"] += 1
        elif (row := self._row_of(key)) is not None:
            self._leave(row, "cancelled")

    def hurry(self) -> None:
        """Wait for fuller batches no more: nothing is to come that could fill them."""
        self._limits = replace(self._limits, max_wait_s=0.0)
        self._wake_s = None

    def iterate(self) -> Outcome:
        """Run one iteration.

        Raises:
            Exception: the device is broken; nothing can be done with this core any more.
        """
        began_s = time.perf_counter()
        self._report = IterationReport()
        decision = self._decide()
        for key in decision.expired:
            self._expire(key)
        if decision.start:
            self._start([self._waiting.pop(key) for key in decision.start])
        if self._running:
            self._step()
        busy_s = time.perf_counter() - began_s if self._report.has_run else 0.0
        self._outcome.busy_s += busy_s
        self._on_iteration(replace(self._report, busy_s=busy_s, ended=dict(self._ended)))
        self._ended.clear()
        return self._take_outcome()

    def _take_outcome(self) -> Outcome:
        if not self._outcome:
            return Outcome()  # its busy time is told with the next answer
        outcome, self._outcome = self._outcome, Outcome()
        return outcome

    def _decide(self) -> Decision:
        waiting = [
            Waiting(each.key, each.arrived_s, each.request.audio_s, each.request.deadline_s)
            for each in self._waiting.values()
        ]
        running = [
            Running(each.queued.key, each.queued.request.deadline_s) for each in self._running
        ]
        decision = decide(waiting, running, self._clock(), self._limits)
        self._wake_s = decision.wake_s
        return decision

    def _expire(self, key: int) -> None:
        row = self._row_of(key)
        if row is not None:
            self._leave(row, "deadline")
            error = DeadlineExceededError("the answer was not complete at the request's deadline")
        else:
            del self._waiting[key]
            self._ended["deadline"] += 1
            error = DeadlineExceededError("the request still waited at its deadline")
        self._outcome.answers.append((key, error))

    def _row_of(self, key: int) -> int | None:
        return next((i for i, each in enumerate(self._running) if each.queued.key == key), None)

    def _leave(self, row: int, reason: EndReason) -> None:
        """Free a row; the last one takes its place, in the runner as here."""
        self.runner.release(row, failed=reason == "failed")
        self._ended[reason] += 1
        self._wake_s = None  # there is room for what waits
        last = self._running.pop()
        if row < len(self._running):
            self._running[row] = last

    def _start(self, batch: Sequence[_Queued]) -> None:
        planned = [active for each in batch if (active := self._plan(each)) is not None]
        if planned and not self._start_or_halve(planned):
            self.runner.probe()

    def _plan(self, queued: _Queued) -> _Active | None:
        request = queued.request
        try:
            plan = self.runner.plan(
                request.waveform, request.prompt, request.decoding, with_words=request.with_words
            )
        except InvalidRequestError as error:
            self._refuse(queued, error)
            return None
        except Exception:  # noqa: BLE001 - a tokenizer may raise anything; logged
            self._note_failure("lay out", [queued])
            self._refuse(queued, _guilty())
            return None
        listens = request.on_piece is not None
        generation = Generation(
            max_tokens=plan.max_tokens,
            stop_ids=self.runner.stop_ids,
            guards_loops=self._guards_loops,
            may_retry=not listens,  # what was told cannot be taken back
        )
        stream = TextStream(self.runner.text) if listens else None
        return _Active(queued, plan, generation, stream)

    def _start_or_halve(self, batch: list[_Active]) -> bool:
        """Start a batch, or what of it can be; returns whether nobody had to be refused."""
        started_s = self._clock()
        try:
            report = self.runner.start([each.plan for each in batch])
        except Exception:  # noqa: BLE001 - a model may raise anything; logged
            self._note_failure("start", [each.queued for each in batch])
        else:
            self._join(batch, started_s, report)
            return True
        # Outside of the handler: the error's frames hold the memory that a retry may need.
        self.runner.recover()
        if len(batch) == 1:
            self._refuse(batch[0].queued, _guilty())
            return False
        middle = len(batch) // 2
        halves = [self._start_or_halve(half) for half in (batch[:middle], batch[middle:])]
        return all(halves)

    def _join(self, batch: list[_Active], started_s: float, report: StartReport) -> None:
        for each in batch:
            each.started_s, each.batch_size, each.report = started_s, len(batch), report
        self._running += batch
        durations_s = [each.queued.request.audio_s for each in batch]
        padded_s = len(batch) * max(*durations_s, self._limits.window_s)
        self._report.add_start(
            clips=len(batch), audio_s=sum(durations_s), padded_audio_s=padded_s, report=report
        )

    def _refuse(self, queued: _Queued, error: ServerError) -> None:
        self._ended["failed"] += 1
        self._outcome.answers.append((queued.key, error))

    def _step(self) -> None:
        began_s = time.perf_counter()
        self._report.decoded_rows = len(self._running)
        tokens = self._tokens_of(slice(0, len(self._running)))
        self._report.decode_s = time.perf_counter() - began_s
        now_s = self._clock()
        # From the last row on, so that the one that takes a freed row's place is done already.
        for row in reversed(range(len(tokens))):
            self._take_token(row, tokens[row], now_s)
        if None in tokens:
            self.runner.probe()

    def _tokens_of(self, rows: slice) -> list[Token | None]:
        """One token for each row; None for those that the model fails on even alone."""
        try:
            return self.runner.step(rows)
        except Exception:  # noqa: BLE001 - a model may raise anything; logged
            self._note_failure("step", [each.queued for each in self._running[rows]])
        self.runner.recover()
        if rows.stop - rows.start == 1:
            return [None]
        middle = (rows.start + rows.stop) // 2
        return [
            *self._tokens_of(slice(rows.start, middle)),
            *self._tokens_of(slice(middle, rows.stop)),
        ]

    def _note_failure(self, call: str, batch: Sequence[_Queued]) -> None:
        self._report.failures += 1
        ids = " ".join(each.request.id for each in batch)
        _log.exception("the model failed to %s a batch of %d: %s", call, len(batch), ids)

    def _take_token(self, row: int, token: Token | None, now_s: float) -> None:
        active = self._running[row]
        if token is None:
            self._leave(row, "failed")
            self._outcome.answers.append((active.queued.key, _guilty()))
            return
        if active.first_token_s is None:
            active.first_token_s = now_s
        generation = active.generation
        if generation.push(token):
            self._report.retries += 1
            self.runner.restart(row, LOOP_RETRY_PENALTY)
        if active.stream is not None:
            self._tell(active, active.stream, token)
        if generation.finish_reason is not None:
            self._leave(row, generation.finish_reason)
            self._outcome.answers.append((active.queued.key, self._result(active, now_s)))

    def _tell(self, active: _Active, stream: TextStream, token: Token) -> None:
        is_last = active.generation.finish_reason is not None
        text = stream.push(active.generation.token_ids, is_last=is_last)
        piece = Piece(text, token, active.generation.finish_reason)
        self._outcome.pieces.append((active.queued.key, piece))

    def _result(self, active: _Active, now_s: float) -> EngineResult:
        generation, report = active.generation, active.report
        if generation.finish_reason is None or report is None or active.first_token_s is None:
            raise RuntimeError(f"request {active.queued.request.id} has not ended")
        text = self.runner.text(generation.token_ids)
        return EngineResult(
            text=text,
            language=self.runner.language(text),
            finish_reason=generation.finish_reason,
            token_ids=tuple(generation.token_ids),
            logprobs=tuple(generation.logprobs) if active.plan.decoding.logprobs else None,
            queue_s=active.started_s - active.queued.arrived_s,
            encode_s=report.encode_s,
            prefill_s=report.prefill_s,
            generate_s=max(0.0, now_s - active.started_s - report.encode_s),
            first_token_s=active.first_token_s - active.queued.arrived_s,
            batch_size=active.batch_size,
            words=self._words(active, text),
        )

    def _words(self, active: _Active, text: str) -> tuple[Word, ...] | None:
        try:
            return self.runner.words(active.plan, text)
        except Exception:  # noqa: BLE001 - a device may raise anything; logged
            self._note_failure("align", [active.queued])
        self.runner.recover()
        return None  # the text is good without


def _guilty() -> InferenceFailedError:
    return InferenceFailedError("the model failed on this audio")
