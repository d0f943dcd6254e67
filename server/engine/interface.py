"""What the rest of the server knows of an engine, and an engine of its model.

    admitted (a ticket is held) -> decoded -> submitted: waiting -> encoding -> prefill -> decoding
    -> done

All times are seconds on the monotonic clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from server.engine.decoding import GREEDY, Candidates, Decoding, FinishReason, Token
from server.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from contextlib import AbstractContextManager

    import numpy as np
    from numpy.typing import NDArray

    from server.engine.admission import Ticket
    from server.transcription import Hypothesis, Word

EndReason = FinishReason | Literal["failed"]
"""How a request left the engine; `failed`: it was refused, or the model failed on it."""


def refill(used: int, freed: Collection[int]) -> list[tuple[int, int]]:
    """Close the gaps that freed rows leave among the `used` first ones.

    Returns:
        Rows that were freed, each with the one that takes its place: the last ones, in order.
    """
    gone, left = set(freed), used - len(freed)
    gaps = sorted(row for row in gone if row < left)
    movers = [row for row in range(left, used) if row not in gone]
    return list(zip(gaps, movers, strict=True))


@dataclass(frozen=True, slots=True)
class Piece:
    """A step of a growing answer.

    Attributes:
        text: that is new and final; empty while a character is incomplete.
        token: that was generated, the end token included.
        finish_reason: None while the answer goes on.
    """

    text: str
    token: Token
    finish_reason: FinishReason | None


@dataclass(frozen=True)  # no slots: with them, Python's own code pickles it, field by field
class EngineRequest:
    """One clip to transcribe.

    Attributes:
        id: names it in logs.
        waveform: (N,) float32, mono, 16 kHz.
        audio_s: its length, seconds.
        deadline_s: when its answer is no longer wanted; None for never.
        prompt: replaces the checkpoint's own.
        hotwords: words that are likely to be said; those that are heard stand before the audio.
        previous_text: what was said just before; its end stands before the audio.
        decoding: how to choose its tokens.
        on_piece: told of every token, on the event loop. An answer that somebody listens to is
            not begun again when it loops.
        with_words: also find out when each word was said, if the checkpoint can.

    Raises:
        InvalidRequestError: somebody listens to a beam search, whose best beginning may change
            with every token.
    """

    id: str
    waveform: NDArray[np.float32]
    audio_s: float
    deadline_s: float | None = None
    prompt: str | None = None
    hotwords: tuple[str, ...] = ()
    previous_text: str = ""
    decoding: Decoding = GREEDY
    on_piece: Callable[[Piece], None] | None = None
    with_words: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be streamed."""
        if self.on_piece is not None and self.decoding.num_beams > 1:
            raise InvalidRequestError(
                "beam search cannot be streamed: its answer is known at its end", param="num_beams"
            )


@dataclass(frozen=True)  # no slots: with them, Python's own code pickles it, field by field
class EngineResult:
    """A clip's transcript.

    Attributes:
        text: what was said; empty where nothing was.
        language: ISO 639-1 code, None where the model does not tell.
        finish_reason: stop, length or loop.
        token_ids: generated, without the end token.
        queue_s: from submission until its batch began.
        encode_s: its batch's time from waveforms to audio embeddings.
        prefill_s: its batch's time from audio embeddings to a filled KV slot.
        generate_s: from its audio embeddings to its text, prefill included.
        first_token_s: from submission to its first token.
        batch_size: clips it was encoded with; 0 for silence, which the model did not see.
        logprobs: of the tokens, natural logarithms; None where they were not asked for.
        token_bytes: what each token adds to the text, in UTF-8; None where `logprobs` is.
        hypotheses: the n best answers of a beam search, the best, which is `text`, first; empty
            where no more than one was asked for.
        words: of the text, placed in the clip; None where they were not asked for, or cannot be.
    """

    text: str
    language: str | None
    finish_reason: FinishReason
    token_ids: tuple[int, ...]
    queue_s: float
    encode_s: float
    prefill_s: float
    generate_s: float
    first_token_s: float
    batch_size: int
    logprobs: tuple[float, ...] | None = None
    token_bytes: tuple[bytes, ...] | None = None
    hypotheses: tuple[Hypothesis, ...] = ()
    words: tuple[Word, ...] | None = None


@dataclass(frozen=True, slots=True)
class EngineStats:
    """An engine at this moment.

    Attributes:
        alive: it takes requests.
        admitted: requests that hold a ticket.
        admitted_audio_s: their audio, seconds.
        queued: submitted, and not yet started.
        running: started, and not yet done.
        running_audio_s: their audio, seconds.
        slots: that there are for running requests; a beam search takes one for every beam.
        kv_cache_bytes: memory of these.
        rtfx: seconds of audio finished in a second of work; None before the first.
    """

    alive: bool
    admitted: int
    admitted_audio_s: float
    queued: int
    running: int
    running_audio_s: float
    slots: int
    kv_cache_bytes: int
    rtfx: float | None


@dataclass(frozen=True, slots=True)
class StartReport:
    """What starting some sequences took.

    Attributes:
        encode_s: from waveforms to audio embeddings.
        prefill_s: from there to filled KV slots.
        padded_audio_s: length of what the encoder worked on, padding included.
    """

    encode_s: float = 0.0
    prefill_s: float = 0.0
    padded_audio_s: float = 0.0


@dataclass(slots=True)
class IterationReport:
    """One iteration of the engine.

    Attributes:
        start_sizes: clips of each batch whose start is done since the last report.
        audio_s: their length together.
        padded_audio_s: length of what the encoder worked on, padding included.
        encode_s: up to their audio embeddings.
        prefill_s: from there to filled KV slots.
        decoded_rows: sequences in the decode step; 0 without one.
        decode_s: time of that step.
        failures: calls into the model that raised.
        retries: answers that looped and were begun again.
        busy_s: time that the device worked.
        ended: how many requests left since the last report, by how.
    """

    start_sizes: list[int] = field(default_factory=list)
    audio_s: float = 0.0
    padded_audio_s: float = 0.0
    encode_s: float = 0.0
    prefill_s: float = 0.0
    decoded_rows: int = 0
    decode_s: float = 0.0
    failures: int = 0
    retries: int = 0
    busy_s: float = 0.0
    ended: Mapping[EndReason, int] = field(default_factory=dict)

    @property
    def has_run(self) -> bool:
        """Whether the device did anything."""
        return bool(self.start_sizes or self.decoded_rows or self.failures)

    def add_start(self, *, clips: int, audio_s: float, report: StartReport) -> None:
        """Count a started batch."""
        self.start_sizes.append(clips)
        self.audio_s += audio_s
        self.padded_audio_s += report.padded_audio_s
        self.encode_s += report.encode_s
        self.prefill_s += report.prefill_s


@dataclass(frozen=True, slots=True)
class Guards:
    """What is done against the bad habits of LLM decoders.

    Attributes:
        loops: answers that repeat themselves are tried again under a penalty, then broken off.
        silence: a clip without any sound gets an empty answer, without the model.
    """

    loops: bool
    silence: bool


ALL_GUARDS = Guards(loops=True, silence=True)
NO_GUARDS = Guards(loops=False, silence=False)
"""The model's own answers, as `generate` gives them."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a checkpoint can be asked for.

    Attributes:
        max_audio_s: longest clip, seconds.
        languages: ISO 639-1 codes that it names; empty where it names none.
        context_templates: what it was trained to read before the audio: `hotwords`,
            `previous_text`.
        takes_prompt: whether it was trained with a question behind the audio, and may be asked
            another.
        num_beams: of the search for an answer whose request does not say; 1 for none.
    """

    max_audio_s: float
    languages: tuple[str, ...] = ()
    context_templates: frozenset[str] = frozenset()
    takes_prompt: bool = True
    num_beams: int = 1


class Engine(Protocol):
    """Turns waveforms into transcripts, many at a time. Methods run on one event loop."""

    @property
    def capabilities(self) -> Capabilities:
        """What the checkpoint can be asked for.

        Raises:
            NotReadyError: it is not loaded yet.
        """

    async def start(self) -> None:
        """Load and warm up; the loop stays free meanwhile."""

    def admit(self, audio_s: float) -> AbstractContextManager[Ticket]:
        """Hold a ticket for a request, from before its decoding until its answer.

        Args:
            audio_s: its length as its header claims it, or the longest there may be.

        Raises:
            QueueFullError: as many wait as may, or as much audio.
            ShuttingDownError: the engine drains.
        """

    async def submit(self, request: EngineRequest) -> EngineResult:
        """Transcribe a clip; cancelled, it leaves the queue or its slot within one step.

        Raises:
            DeadlineExceededError: it was not done at its deadline.
            InferenceFailedError: the model failed on this clip alone, or the engine died.
            InvalidRequestError: its prompt is too long.
            ShuttingDownError: the engine stopped before it was done.
        """

    async def drain(self, timeout_s: float) -> None:
        """Admit no more, wait for what is admitted; after `timeout_s`, refuse the rest."""

    async def stop(self) -> None:
        """End at once and free the device."""

    async def failed(self) -> Exception:
        """Wait until the engine has died for good, and return why."""

    def stats(self) -> EngineStats:
        """Return what is where."""


@dataclass(slots=True, eq=False)
class Heard:
    """What a runner keeps of a clip until its words are placed in time; its own business."""

    encoder_frames: object = None


@dataclass(frozen=True, slots=True)
class Plan:
    """A clip's sequence, laid out.

    Attributes:
        waveform: (N,) float32, mono, 16 kHz.
        input_ids: of its prompt, audio positions included.
        max_tokens: cap of the answer.
        decoding: how to choose its tokens.
        heard: where the runner keeps what `words` needs; None where that is not wanted.
        prompt: replaces the checkpoint's own.
        context: what stands before the audio, as far as it is known before the clip is encoded.
        hotwords: to choose from once the clip is encoded; `input_ids` are without them.
    """

    waveform: NDArray[np.float32]
    input_ids: tuple[int, ...]
    max_tokens: int
    decoding: Decoding
    heard: Heard | None = None
    prompt: str | None = None
    context: str = ""
    hotwords: tuple[str, ...] = ()


class Runner(Protocol):
    """The model on its device, with slots for running sequences. Called from one thread only.

    Sequences run in rows 0 to n - 1, in the order in which they were started. A beam search starts
    in one row, and `branch` gives it more.
    """

    @property
    def capabilities(self) -> Capabilities:
        """What the checkpoint can be asked for."""

    def token_bytes(self, token_ids: Sequence[int]) -> list[bytes]:
        """What each token adds to a text, in UTF-8; a character may need several tokens."""

    @property
    def window_s(self) -> float:
        """What the encoder pads every clip to, seconds; 0 where it does not."""

    @property
    def start_audio_s(self) -> float:
        """What it should encode at most while those that run wait, padding included, seconds."""

    @property
    def n_slots(self) -> int:
        """Sequences that can run together."""

    @property
    def kv_cache_bytes(self) -> int:
        """Memory of all slots."""

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""

    def plan(  # noqa: PLR0913 - what a sequence is made of
        self,
        waveform: NDArray[np.float32],
        prompt: str | None,
        decoding: Decoding,
        *,
        with_words: bool = False,
        hotwords: tuple[str, ...] = (),
        previous_text: str = "",
    ) -> Plan:
        """Lay out a clip's sequence.

        Raises:
            InvalidRequestError: it does not fit into a slot.
        """

    def start(self, plans: Sequence[Plan]) -> Callable[[], StartReport]:
        """Encode and prefill into the next free rows; a failure leaves the rows as they were.

        Returns:
            What it took; waits until it is done.
        """

    def step(self, rows: slice) -> list[Token | Candidates | None]:
        """Give each of `rows` its next token, or, in a beam search, the candidates for it.

        A failure leaves the rows as they were. None where the model's output is not finite.
        """

    @property
    def may_run_ahead(self) -> bool:
        """Whether `begin_step` may be called, with the rows as they are."""

    def begin_step(self) -> None:
        """Launch a step of all rows. The one before need not be finished, but the one before that.

        A failure leaves the rows as they were.
        """

    def finish_step(self) -> NDArray[np.int64]:
        """Tokens (R,) that the first step that was begun and not finished gives the rows it had.

        Rows may have come and gone meanwhile. `NO_ID` where the model's output is not finite; what
        is raised means that the device is broken.
        """

    def branch(self, rows: Sequence[int], parents: Sequence[int], token_ids: Sequence[int]) -> None:
        """Let each of `rows` go on as the row `parents[i]` is, with a token.

        Rows behind the used ones, without a gap, are taken into use.
        """

    def restart(self, row: int, repetition_penalty: float) -> None:
        """Begin a row's answer again, under at least this repetition penalty."""

    def release(self, rows: Sequence[int], *, failed: Collection[int] = ()) -> None:
        """Free rows, and let others take their places as `refill` says.

        Args:
            rows: that are used, none twice.
            failed: those of them that may hold what must reach nobody.
        """

    def share(self, samples: NDArray[np.float32]) -> None:
        """Be told of memory (N,) in which many clips will lie, to be read there; twice is once."""

    def forget(self, samples: NDArray[np.float32]) -> None:
        """Read no more clips from `samples`, which may be unmapped then."""

    def recover(self) -> None:
        """Free what a failed call may have left behind."""

    def probe(self) -> None:
        """Find out, in a free row, whether the device still works; raises if it does not."""

    def warm_up(self) -> None:
        """Run once, so that the first request pays for nothing but itself."""

    def text(self, token_ids: Sequence[int]) -> str:
        """Text of an answer."""

    def words(self, plan: Plan, text: str) -> tuple[Word, ...] | None:
        """Place a clip's text in time, if its plan asked for it and the checkpoint can."""

    def language(self, text: str) -> str | None:
        """ISO 639-1 code of a text, None where the model does not tell."""
