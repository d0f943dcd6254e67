"""One iteration after another: schedule, encode and prefill, one decode step, answer what ended.

Where the runner can, the next step is launched before the tokens of the last are looked at, so that
the device works meanwhile; what that step says of a request that has ended is dropped.

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

import numpy as np

from server.engine.beams import BeamSearch, place
from server.engine.decoding import NO_ID, Candidates, Token
from server.engine.generation import LOOP_RETRY_PENALTY, Answers, TextStream
from server.engine.interface import ALL_GUARDS, EngineResult, IterationReport, Piece, refill
from server.engine.scheduler import Decision, Running, Waiting, decide
from server.engine.silence import is_silent
from server.errors import (
    DeadlineExceededError,
    InferenceFailedError,
    InvalidRequestError,
    ServerError,
)
from server.transcription import Hypothesis

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from server.engine.decoding import Decoding, FinishReason
    from server.engine.interface import (
        EndReason,
        EngineRequest,
        Guards,
        Plan,
        Runner,
        StartReport,
    )
    from server.engine.scheduler import ScheduleLimits
    from server.transcription import Word

_log = logging.getLogger(__name__)

_NO_LANE = -1


@dataclass(slots=True, eq=False)
class _Queued:
    """A request that has not started.

    Attributes:
        key: of its answer.
        request: what is wanted.
        arrived_s: when it was queued.
        waiting: what it is to the scheduler until it starts.
        running: and from then on.
    """

    key: int
    request: EngineRequest
    arrived_s: float
    waiting: Waiting = field(init=False)
    running: Running = field(init=False)

    def __post_init__(self) -> None:
        request, places = self.request, self.request.decoding.num_beams
        self.waiting = Waiting(
            self.key, self.arrived_s, request.audio_s, request.deadline_s, places
        )
        self.running = Running(self.key, request.deadline_s, places)


@dataclass(slots=True, eq=False)
class _Active:
    """A request that runs.

    Attributes:
        queued: what it was before.
        plan: its sequence.
        search: its beams; None for an answer of one sequence.
        stream: cuts its text into pieces; None where nobody listens.
        lane: of its answer, where there is no search.
        logprobs: of its tokens, where they are asked for and there is no search.
        rows: where it runs, one for each beam.
        started_s: when its batch began to be encoded.
        batch_size: clips in that batch.
        report: asks what starting them took.
        first_token_s: when the first tokens of its search came.
    """

    queued: _Queued
    plan: Plan
    search: BeamSearch | None
    stream: TextStream | None
    lane: int = _NO_LANE
    logprobs: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    started_s: float = 0.0
    batch_size: int = 0
    report: Callable[[], StartReport] | None = None
    first_token_s: float | None = None

    @property
    def needs_tokens(self) -> bool:
        """Whether each of its tokens is wanted, and not only what they come to."""
        return self.stream is not None or self.plan.decoding.logprobs


@dataclass(frozen=True, slots=True)
class _Start:
    """A batch that was started, and what tells how long that took."""

    clips: int
    audio_s: float
    report: Callable[[], StartReport]


@dataclass(frozen=True, slots=True)
class _Stepped:
    """The answers of a step, by row: their lanes, and the epochs that these were in; (R,) each."""

    lanes: NDArray[np.int64]
    epochs: NDArray[np.int64]


_Output = Token | Candidates | None


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
        guards: Guards = ALL_GUARDS,
        on_iteration: Callable[[IterationReport], None] = lambda _report: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin empty.

        Args:
            runner: warm, with all its slots free.
            limits: of an iteration; its size is bounded by the runner's slots besides, and what it
                leaves open by what the runner is made for.
            guards: against what LLM decoders are prone to.
            on_iteration: told of each, in this thread.
            clock: monotonic seconds; the requests' deadlines are on it.
        """
        self.runner = runner
        self._limits = replace(
            limits,
            max_batch_size=min(limits.max_batch_size, runner.n_slots),
            max_batch_audio_s=limits.max_batch_audio_s or runner.start_audio_s,
            window_s=runner.window_s,
        )
        self._guards = guards
        self._on_iteration = on_iteration
        self._clock = clock
        self._waiting: dict[int, _Queued] = {}
        self._running: dict[int, _Active] = {}
        self._rows: list[_Active] = []  # by row
        self._lanes = np.full(runner.n_slots, _NO_LANE)  # likewise
        self._answers = Answers(runner.n_slots, runner.stop_ids)
        self._owners: dict[int, _Active] = {}  # by lane
        self._attentive: dict[int, _Active] = {}  # those of them that need each token
        self._left: list[tuple[_Active, EndReason]] = []  # whose rows are still to be freed
        self._ahead: _Stepped | None = None  # of the step that was begun and not finished
        self._started: list[_Start] = []  # which are still to be reported
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
        # Copied, since the event loop asks as well.
        return sum(each.queued.request.audio_s for each in list(self._running.values()))

    def idle_s(self) -> float | None:
        """How long nothing is to be done if nothing arrives; None for until something does."""
        # Who left is still to be reported, and a step that was begun to be finished.
        if self._running or self._ended or self._ahead is not None:
            return 0.0
        if not self._waiting:
            return None
        return 0.0 if self._wake_s is None else max(0.0, self._wake_s - self._clock())

    def submit(self, key: int, request: EngineRequest, arrived_s: float) -> None:
        """Queue a request, or answer it at once; its answer will come under `key`.

        A silent clip's answer is empty and comes without pieces, to those who listen too.
        """
        queued = _Queued(key, request, arrived_s)
        num_beams, slots = request.decoding.num_beams, self._limits.max_batch_size
        if num_beams > slots:
            message = f"num_beams is out of range: {num_beams}, and the server runs {slots} at most"
            self._refuse(queued, InvalidRequestError(message, param="num_beams"))
            return
        if self._guards.silence and is_silent(request.waveform):
            self._ended["stop"] += 1
            self._outcome.answers.append((key, _nothing_said(request.decoding)))
            return
        self._waiting[key] = queued
        self._wake_s = None

    def cancel(self, key: int) -> None:
        """Drop a request, wherever it is; nobody waits for its answer."""
        if self._waiting.pop(key, None) is not None:
            self._ended["cancelled"] += 1
        elif (active := self._running.get(key)) is not None:
            self._leave(active, "cancelled")
            self._release_left()

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
        were_started = len(self._started)
        decision = self._decide()
        for key in decision.expired:
            self._expire(key)
        self._release_left()
        if decision.start:
            self._start([self._waiting.pop(key) for key in decision.start])
        if self._running or self._ahead is not None:
            self._step()
        # The step that was just finished was launched behind those that were there before.
        self._report_starts(were_started if self._ahead is not None else len(self._started))
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
        waiting = [each.waiting for each in self._waiting.values()]
        running = [each.queued.running for each in self._running.values()]
        decision = decide(waiting, running, self._clock(), self._limits)
        self._wake_s = decision.wake_s
        return decision

    def _expire(self, key: int) -> None:
        active = self._running.get(key)
        if active is not None:
            self._leave(active, "deadline")
            error = DeadlineExceededError("the answer was not complete at the request's deadline")
        else:
            del self._waiting[key]
            self._ended["deadline"] += 1
            error = DeadlineExceededError("the request still waited at its deadline")
        self._outcome.answers.append((key, error))

    def _leave(self, active: _Active, reason: EndReason) -> None:
        """End a request; `_release_left` frees its rows."""
        self._left.append((active, reason))
        del self._running[active.queued.key]
        if active.search is None:
            del self._owners[active.lane]
            self._attentive.pop(active.lane, None)
            self._answers.close(active.lane)
        self._ended[reason] += 1
        self._wake_s = None  # there is room for what waits

    def _release_left(self) -> None:
        """Free the rows of all who have left, together, which is less work for a device."""
        rows = [row for active, _ in self._left for row in active.rows]
        failed = [row for active, reason in self._left if reason == "failed" for row in active.rows]
        self._left.clear()
        if rows:
            self._release(rows, failed)

    def _release(self, rows: Sequence[int], failed: Sequence[int] = ()) -> None:
        """Free rows that nobody calls his own any more; others take their places."""
        self.runner.release(rows, failed=failed)
        for row, mover in refill(len(self._rows), rows):
            active = self._rows[row] = self._rows[mover]
            active.rows[active.rows.index(mover)] = row
            self._lanes[row] = self._lanes[mover]
        del self._rows[len(self._rows) - len(rows) :]

    def _start(self, batch: Sequence[_Queued]) -> None:
        planned = [active for each in batch if (active := self._plan(each)) is not None]
        if planned and not self._start_or_halve(planned):
            self.runner.probe()

    def _plan(self, queued: _Queued) -> _Active | None:
        request = queued.request
        try:
            plan = self.runner.plan(
                request.waveform,
                request.prompt,
                request.decoding,
                with_words=request.with_words,
                hotwords=request.hotwords,
                previous_text=request.previous_text,
            )
        except InvalidRequestError as error:
            self._refuse(queued, error)
            return None
        except Exception:  # noqa: BLE001 - a tokenizer may raise anything; logged
            self._note_failure("lay out", [queued])
            self._refuse(queued, _guilty())
            return None
        stream = None if request.on_piece is None else TextStream(self.runner.text)
        return _Active(queued, plan, self._search(plan), stream)

    def _search(self, plan: Plan) -> BeamSearch | None:
        if plan.decoding.num_beams == 1:
            return None
        return BeamSearch(
            num_beams=plan.decoding.num_beams,
            max_tokens=plan.max_tokens,
            stop_ids=self.runner.stop_ids,
            guards_loops=self._guards.loops,
        )

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

    def _join(
        self, batch: list[_Active], started_s: float, report: Callable[[], StartReport]
    ) -> None:
        for each in batch:
            each.started_s, each.batch_size, each.report = started_s, len(batch), report
            each.rows = [len(self._rows)]
            if each.search is None:
                self._open(each)
            self._lanes[len(self._rows)] = each.lane
            self._rows.append(each)
            self._running[each.queued.key] = each
        audio_s = sum(each.queued.request.audio_s for each in batch)
        self._started.append(_Start(len(batch), audio_s, report))

    def _open(self, active: _Active) -> None:
        active.lane = lane = self._answers.open(
            max_tokens=active.plan.max_tokens,
            guards_loops=self._guards.loops,
            may_retry=active.stream is None,  # what was told cannot be taken back
        )
        self._owners[lane] = active
        if active.needs_tokens:
            self._attentive[lane] = active

    def _report_starts(self, count: int) -> None:
        """Report the first starts, which the device has done with."""
        for start in self._started[:count]:
            self._report.add_start(clips=start.clips, audio_s=start.audio_s, report=start.report())
        del self._started[:count]

    def _refuse(self, queued: _Queued, error: ServerError) -> None:
        self._ended["failed"] += 1
        self._outcome.answers.append((queued.key, error))

    def _step(self) -> None:
        began_s = time.perf_counter()
        stepped, token_ids, outputs = self._next_outputs()
        self._report.decoded_rows = len(token_ids)
        self._report.decode_s = time.perf_counter() - began_s
        now_s = self._clock()
        searches = [
            (active, active.search, [outputs[row] for row in active.rows])
            for active in (self._running.values() if outputs else ())
            if active.search is not None
        ]
        failed = self._grow(stepped, token_ids, outputs, now_s)
        # Behind the others, since they move rows.
        for active, search, beams in searches:
            if not self._push_candidates(active, search, beams, now_s):
                failed.append(active)
        for active in failed:
            self._leave(active, "failed")
            self._outcome.answers.append((active.queued.key, _guilty()))
        self._release_left()
        if failed:
            self.runner.probe()

    def _next_outputs(self) -> tuple[_Stepped, NDArray[np.int64], list[_Output]]:
        """Who was in the next step, and what it says of each row that there was.

        Returns:
            The answers; tokens (R,), `NO_ID` for none; and, where that is not all, the outputs.
        """
        stepped = self._ahead if self._ahead is not None else self._begin_step()
        if stepped is not None:
            self._ahead = self._begin_step()
            return stepped, self.runner.finish_step(), []
        stepped, outputs = self._stepped(), self._outputs_of(slice(0, len(self._rows)))
        ids = [each.id if isinstance(each, Token) else NO_ID for each in outputs]
        return stepped, np.array(ids), outputs

    def _begin_step(self) -> _Stepped | None:
        """Launch a step; None if that cannot be, or nobody needs it."""
        if not self._rows or not self.runner.may_run_ahead:
            return None
        try:
            self.runner.begin_step()
        except Exception:  # noqa: BLE001 - a model may raise anything; logged
            self._note_failure("begin a step of", _requests_of(self._rows))
        else:
            return self._stepped()
        self.runner.recover()
        return None  # once nothing is ahead, it is tried on halves

    def _stepped(self) -> _Stepped:
        lanes = self._lanes[: len(self._rows)].copy()  # since whoever leaves moves rows
        return _Stepped(lanes, self._answers.epochs[lanes])

    def _outputs_of(self, rows: slice) -> list[_Output]:
        """What the model says of each row; None for those that it fails on even alone."""
        try:
            return self.runner.step(rows)
        except Exception:  # noqa: BLE001 - a model may raise anything; logged
            self._note_failure("step", _requests_of(self._rows[rows]))
        self.runner.recover()
        if rows.stop - rows.start == 1:
            return [None]
        middle = (rows.start + rows.stop) // 2
        return [
            *self._outputs_of(slice(rows.start, middle)),
            *self._outputs_of(slice(middle, rows.stop)),
        ]

    def _note_failure(self, call: str, batch: Sequence[_Queued]) -> None:
        self._report.failures += 1
        ids = " ".join(each.request.id for each in batch)
        _log.exception("the model failed to %s a batch of %d: %s", call, len(batch), ids)

    def _grow(
        self,
        stepped: _Stepped,
        token_ids: NDArray[np.int64],
        outputs: Sequence[_Output],
        now_s: float,
    ) -> list[_Active]:
        """Let answers of one sequence grow by a token; returns those that the model failed on."""
        lanes, failed = stepped.lanes, []
        is_current = (stepped.epochs == self._answers.epochs[lanes]) & (lanes != _NO_LANE)
        is_well = is_current & (token_ids != NO_ID)
        rows = is_well.nonzero()[0]
        if rows.size < lanes.size:
            failed = [self._owners[lane] for lane in lanes[is_current & ~is_well].tolist()]
            lanes, token_ids = lanes[rows], token_ids[rows]
        grown = self._answers.push(lanes, token_ids, now_s)
        if self._attentive:
            for lane, row, token_id in zip(
                lanes.tolist(), rows.tolist(), token_ids.tolist(), strict=True
            ):
                if (active := self._attentive.get(lane)) is not None:
                    output = outputs[row] if outputs else None
                    token = output if isinstance(output, Token) else Token(token_id)
                    if not self._tell(active, token, grown.ended.get(lane)):
                        failed.append(active)
                        grown.ended.pop(lane, None)
        for lane in grown.again:
            self._restart(self._owners[lane])
        for lane, reason in grown.ended.items():
            self._finish(self._owners[lane], reason, now_s)
        return failed

    def _push_candidates(
        self, active: _Active, search: BeamSearch, outputs: Sequence[_Output], now_s: float
    ) -> bool:
        """Let a search go on by one output for each beam; returns whether the model did well."""
        if active.first_token_s is None:
            active.first_token_s = now_s
        candidates = [each for each in outputs if isinstance(each, Candidates)]
        did_well = len(candidates) == len(outputs) and self._branch(active, search, candidates)
        if did_well and search.finish_reason is not None:
            self._finish(active, search.finish_reason, now_s)
        return did_well

    def _finish(self, active: _Active, reason: FinishReason, now_s: float) -> None:
        answer = self._answer(active, reason, now_s)
        self._outcome.answers.append((active.queued.key, answer))
        self._leave(active, "failed" if isinstance(answer, ServerError) else reason)

    def _branch(
        self, active: _Active, search: BeamSearch, candidates: Sequence[Candidates]
    ) -> bool:
        branches = search.push(candidates)
        if not branches:
            if search.finish_reason is None:
                self._restart(active)
            return True
        parents = [branch.parent for branch in branches]
        n_fresh = max(0, len(branches) - len(active.rows))
        fresh = range(len(self._rows), len(self._rows) + n_fresh)
        rows = place(active.rows, parents, fresh)
        try:
            self.runner.branch(
                rows,
                [active.rows[parent] for parent in parents],
                [branch.token_id for branch in branches],
            )
        except Exception:  # noqa: BLE001 - a device may raise anything; logged
            self._note_failure("branch", [active.queued])
        else:
            active.rows = rows
            self._lanes[len(self._rows) : len(self._rows) + n_fresh] = _NO_LANE
            self._rows += [active] * n_fresh
            return True
        self.runner.recover()
        return False

    def _restart(self, active: _Active) -> None:
        """Begin an answer again, in one row."""
        self._report.retries += 1
        active.logprobs.clear()
        active.rows, freed = active.rows[:1], active.rows[1:]
        if freed:
            self._release(freed)
        self.runner.restart(active.rows[0], LOOP_RETRY_PENALTY)

    def _tell(self, active: _Active, token: Token, reason: FinishReason | None) -> bool:
        """Hand on a token to whoever wants each; returns whether it could be spelt."""
        if token.logprob is not None and token.id not in self.runner.stop_ids:
            active.logprobs.append(token.logprob)
        if active.stream is not None:
            token_ids = self._answers.token_ids(active.lane)
            try:
                text = active.stream.push(token_ids, is_last=reason is not None)
            except Exception:  # noqa: BLE001 - a tokenizer may raise anything; logged
                self._note_failure("spell", [active.queued])
                return False
            self._outcome.pieces.append((active.queued.key, Piece(text, token, reason)))
        return True

    def _answer(
        self, active: _Active, reason: FinishReason, now_s: float
    ) -> EngineResult | ServerError:
        try:
            return self._result(active, reason, now_s)
        except Exception:  # noqa: BLE001 - a tokenizer may raise anything; logged
            self._note_failure("spell", [active.queued])
            return _guilty()

    def _result(self, active: _Active, reason: FinishReason, now_s: float) -> EngineResult:
        if active.search is None:
            token_ids: Sequence[int] = self._answers.token_ids(active.lane)
            logprobs: Sequence[float] = active.logprobs[
                : len(token_ids)
            ]  # fewer where a loop was cut
            first_token_s: float | None = self._answers.first_token_s(active.lane)
        else:
            token_ids, logprobs = active.search.token_ids, active.search.logprobs
            first_token_s = active.first_token_s
        if active.report is None or first_token_s is None:
            raise RuntimeError(f"request {active.queued.request.id} has not begun")
        report = active.report()
        text = self.runner.text(token_ids)
        asks_for_logprobs = active.plan.decoding.logprobs
        return EngineResult(
            text=text,
            language=self.runner.language(text),
            finish_reason=reason,
            token_ids=tuple(token_ids),
            logprobs=tuple(logprobs) if asks_for_logprobs else None,
            token_bytes=tuple(self.runner.token_bytes(token_ids)) if asks_for_logprobs else None,
            hypotheses=self._hypotheses(active),
            queue_s=active.started_s - active.queued.arrived_s,
            encode_s=report.encode_s,
            prefill_s=report.prefill_s,
            generate_s=max(0.0, now_s - active.started_s - report.encode_s),
            first_token_s=first_token_s - active.queued.arrived_s,
            batch_size=active.batch_size,
            words=self._words(active, text),
        )

    def _words(self, active: _Active, text: str) -> tuple[Word, ...] | None:
        if active.plan.heard is None:
            return None
        try:
            return self.runner.words(active.plan, text)
        except Exception:  # noqa: BLE001 - a device may raise anything; logged
            self._note_failure("align", [active.queued])
        self.runner.recover()
        return None  # the text is good without

    def _hypotheses(self, active: _Active) -> tuple[Hypothesis, ...]:
        search, n_best = active.search, active.plan.decoding.n_best
        if search is None or n_best == 1:
            return ()
        return tuple(
            Hypothesis(self.runner.text(beam.token_ids), beam.score)
            for beam in search.answers[:n_best]
        )


def _requests_of(rows: Sequence[_Active]) -> list[_Queued]:
    """Requests that run in these rows, each once."""
    return list({each.queued.key: each.queued for each in rows}.values())


def _nothing_said(decoding: Decoding) -> EngineResult:
    return EngineResult(
        text="",
        language=None,
        finish_reason="stop",
        token_ids=(),
        queue_s=0.0,
        encode_s=0.0,
        prefill_s=0.0,
        generate_s=0.0,
        first_token_s=0.0,
        batch_size=0,
        logprobs=() if decoding.logprobs else None,
        token_bytes=() if decoding.logprobs else None,
        hypotheses=(Hypothesis("", 0.0),) if decoding.n_best > 1 else (),
    )


def _guilty() -> InferenceFailedError:
    return InferenceFailedError("the model failed on this audio")
