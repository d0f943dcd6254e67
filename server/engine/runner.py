"""The model on its device: starts sequences in KV slots and steps them.

A prompt's last position is not prefilled: it goes through the next decode step with everything
that runs, which gives its first token. To begin an answer again is then to rewind its row.

Axis legend: B clips, R rows of a step, L prompt positions, N audio embeddings, D width.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections import deque
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers.utils.logging import disable_progress_bar

from model.alignment import ENCODER_FRAME_S, align_words
from model.ctc import ctc_greedy
from model.ctc_prefix import clip_posteriors
from model.encoder import encoder_frame_lens
from model.hotwords import MAX_LIST_BYTES, heard_hotwords, list_hotwords
from model.log_mel import HOP_SAMPLES, SAMPLE_RATE_HZ, WINDOW_FRAMES, WINDOW_S, to_device
from model.processing import previous_text_tail, token_budget
from model.token_bytes import TokenBytes
from model.transcription import Transcriber, identify_language
from server.engine.audio_encoder import AudioEncoder, RecordedAudioEncoder
from server.engine.decode_step import HELD, NO_SOURCE, DecodeStep, RecordedStep, StepInputs
from server.engine.decoder_pass import choose_pass
from server.engine.decoding import GREEDY, MAX_BEAMS, Decoding, Token
from server.engine.direct_memory import cuda_memory
from server.engine.interface import Capabilities, Heard, Plan, StartReport
from server.engine.kv_slots import KVSlots, layer_shapes, plan_slots
from server.engine.packed_linear import pack_linear_layers
from server.engine.recordings import CudaGraphs
from server.engine.sampling import TokenSampler, branch_samplers, choose_tokens, plain_ids
from server.engine.stopwatch import Stopwatch
from server.errors import InvalidRequestError
from server.log import structured
from server.transcription import Word

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    from model.ctc_prefix import ClipPosteriors
    from model.modeling import EmbeddedAudio
    from model.processing import SpeechLLMProcessor
    from server.engine.decode_step import Launched
    from server.engine.decoder_pass import DecoderPass
    from server.engine.decoding import Candidates
    from server.engine.direct_memory import DirectMemory
    from server.engine.recordings import Run

_log = logging.getLogger(__name__)

PROMPT_ROOM_TOKENS = 512
"""What a request's own prompt may take in a slot beyond the checkpoint's."""

_KEPT_PROMPTS = 64  # most requests have the checkpoint's own, which takes 0.5 ms to tokenise
_CPU_KV_BYTES = 2 << 30
_CUDA_KV_SHARE = 0.6  # of what the weights leave; activations need the rest
_PADDED_START_S = 240.0
_START_S = 30.0
_WARM_UP_S = (1.0, 3.0)  # clips of different length, so that padding is exercised too
_WARM_UP_STEPS = 2
_MOST_LAUNCHED = 2  # one runs, one waits for it: the host has a step's time for its work


def use_cpu_threads(count: int) -> None:
    """Let torch compute with so many threads in the calling one; 0 takes all cores there are.

    Only one thread of a process should compute, loading included: each that does brings up OpenMP
    workers of its own, and where there are more of these than cores, GNU's OpenMP lets them sleep
    between any two operations instead of spin, which halves the speed of a small model.
    """
    torch.set_num_threads(count or len(os.sched_getaffinity(0)))


@dataclass(slots=True, eq=False)
class _Row:
    """What a used slot decodes.

    Attributes:
        prompt_tokens: length of its prompt.
        position_offset: of its answer's position ids from its length in the slot.
        sampler: chooses its tokens.
    """

    prompt_tokens: int
    position_offset: int
    sampler: TokenSampler


class SpeechRunner:
    """Implements `Runner` on a transcriber's model. Called from one thread."""

    def __init__(  # noqa: PLR0913 - what one runner needs
        self,
        transcriber: Transcriber,
        *,
        max_slots: int,
        kv_cache_bytes: int | None = None,
        pads_batches: bool | None = None,
        make_pass: Callable[[PreTrainedModel], DecoderPass] = choose_pass,
        record: Callable[[Run], Run] | None = None,
        runs_ahead: bool | None = None,
        num_beams: int | None = None,
        direct_memory: DirectMemory | None = None,
    ) -> None:
        """Allocate the KV slots.

        Args:
            transcriber: a loaded checkpoint, whose linear layers may be packed: it says the same
                as before, but cannot be saved or moved any more.
            max_slots: most sequences that will run together.
            kv_cache_bytes: memory for keys and values; None takes 60 % of what is free on a CUDA
                device, and up to 2 GiB on a CPU.
            pads_batches: encode and prefill clips that start together as one padded batch, not one
                after another; None does on a CUDA device. A CPU gains nothing from a batch, and
                would compute its padding.
            make_pass: how its decode steps go through the LLM.
            record: makes recordings of the encoder, and of decode steps where the pass can be
                recorded; None runs everything anew.
            runs_ahead: let steps be launched before the tokens of the last are known, so that the
                host works beside the device; None does on a CUDA device. A CPU gains nothing, and
                computes a token more for each answer that has ended meanwhile.
            num_beams: of the search for an answer whose request does not say; None takes the
                checkpoint's own. No more than there are slots.
            direct_memory: from which the device fetches clips by itself; None makes one for a CUDA
                device.

        Raises:
            ValueError: the LLM is none that the engine can run, or not one slot fits.
        """
        self._model, self._processor = transcriber.model, transcriber.processor
        self._config, self._device = transcriber.config, transcriber.device
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
            # cuDNN's attention makes a plan for each new shape, on the host, and shapes never end.
            torch.backends.cuda.enable_cudnn_sdp(False)
            direct_memory = direct_memory or cuda_memory(self._device)
        self._direct_memory = direct_memory
        self._pads_batches = self._device.type == "cuda" if pads_batches is None else pads_batches
        self._runs_ahead = self._device.type == "cuda" if runs_ahead is None else runs_ahead
        self._llm: PreTrainedModel = self._model.llm
        _require_arguments(self._llm)
        pack_linear_layers(self._llm)
        decoder_pass = make_pass(self._llm)
        self._reads_own_lengths = decoder_pass.reads_own_lengths
        self._embed = self._llm.get_input_embeddings()
        self._audio_token_id = self._processor.audio_token_id
        self._pad_token_id = self._processor.tokenizer.pad_token_id  # which is slow to look up
        self._prompt_ids = lru_cache(_KEPT_PROMPTS)(self._processor.prompt_ids)
        self._audio_len = lru_cache(None)(partial(_count_audio, self._processor))
        self._token_bytes = cache(TokenBytes(self._processor.tokenizer))
        plan = plan_slots(
            layer_shapes(self._llm),
            self._llm.dtype,
            slot_tokens=self._slot_tokens(),
            max_slots=max_slots,
            budget_bytes=kv_cache_bytes or _default_kv_bytes(self._device),
        )
        self._slots = KVSlots(plan, self._device)
        wanted = num_beams or transcriber.num_beams
        self._num_beams = min(wanted, plan.n_slots, MAX_BEAMS)
        if self._num_beams < wanted:
            _log.warning(
                "fewer beams than asked for: each takes a slot",
                extra=structured(beams=self._num_beams, asked_for=wanted, slots=plan.n_slots),
            )
        if record is not None and decoder_pass.is_recordable:
            self._decode: DecodeStep = RecordedStep(self._embed, decoder_pass, self._slots, record)
        else:
            self._decode = DecodeStep(self._embed, decoder_pass, self._slots)
        parts = self._model, self._processor
        self._encode = (
            AudioEncoder(*parts)
            if record is None
            else RecordedAudioEncoder(*parts, record, most_clips=plan.n_slots)
        )
        self._rows: list[_Row] = []
        # By row: what it feeds next, its `position_offset`, where the launched step leaves its
        # token, if it is in that one, and whether its sampler is plain.
        self._next_ids = np.full(plan.n_slots, HELD)
        self._offsets = np.zeros(plan.n_slots, np.int64)
        self._sources = np.full(plan.n_slots, NO_SOURCE)
        self._is_plain = np.zeros(plan.n_slots, bool)
        self._launched: deque[Launched] = deque()
        self.stop_ids = self._stop_ids()
        _log.info(
            "KV slots",
            extra=structured(
                slots=plan.n_slots, slot_tokens=plan.slot_tokens, bytes=plan.total_bytes
            ),
        )

    @classmethod
    def load(  # noqa: PLR0913 - what one runner needs
        cls,
        model: str,
        device: str,
        dtype: str,
        *,
        max_slots: int,
        kv_cache_bytes: int | None = None,
        cuda_graphs: bool = False,
        num_beams: int | None = None,
    ) -> SpeechRunner:
        """Load a checkpoint.

        Raises:
            ValueError: the checkpoint, device or dtype cannot be used; the message says why.
        """
        disable_progress_bar()  # a server's stderr is a log
        transcriber = Transcriber.from_pretrained(model, device, dtype)
        record = CudaGraphs() if cuda_graphs and transcriber.device.type == "cuda" else None
        return cls(
            transcriber,
            max_slots=max_slots,
            kv_cache_bytes=kv_cache_bytes,
            record=record,
            num_beams=num_beams,
        )

    @property
    def capabilities(self) -> Capabilities:
        """What the checkpoint can be asked for; hotwords need a CTC head."""
        deaf = {"hotwords"} if self._model.ctc_head is None else set()
        return Capabilities(
            max_audio_s=float(self._config.max_audio_s),
            languages=tuple(self._config.languages or ()),
            context_templates=frozenset(self._processor.context_templates) - deaf,
            takes_prompt=bool(self._processor.prompt.strip()),
            num_beams=self._num_beams,
        )

    def token_bytes(self, token_ids: Sequence[int]) -> list[bytes]:
        """What each token adds to a text, in UTF-8."""
        return [self._token_bytes(token_id) for token_id in token_ids]

    @property
    def window_s(self) -> float:
        """What the encoder pads every clip to, seconds; 0 where it does not."""
        return float(WINDOW_S) if self._config.encoder_mode == "padded" else 0.0

    @property
    def start_audio_s(self) -> float:
        """What it should encode at most while those that run wait, padding included, seconds.

        About a second's work of two cores; large batches gain nothing but where they are padded.
        """
        return _PADDED_START_S if self._pads_batches else _START_S

    @property
    def n_slots(self) -> int:
        """Sequences that can run together."""
        return self._slots.plan.n_slots

    @property
    def kv_cache_bytes(self) -> int:
        """Memory of all slots."""
        return self._slots.plan.total_bytes

    def _stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer: the tokenizer's, and those that `generate` ends at."""
        ends = self._model.generation_config.eos_token_id
        more = ends if isinstance(ends, list) else [ends] if ends is not None else []
        return frozenset({int(self._processor.tokenizer.eos_token_id), *more})

    def plan(  # noqa: PLR0913 - what a sequence is made of
        self,
        waveform: NDArray[np.float32],
        prompt: str | None = None,
        decoding: Decoding = GREEDY,
        *,
        with_words: bool = False,
        hotwords: tuple[str, ...] = (),
        previous_text: str = "",
    ) -> Plan:
        """Lay out a clip's sequence; nothing touches the device.

        Args:
            waveform: (N,) float32, mono, 16 kHz.
            prompt: replaces the checkpoint's own.
            decoding: how to choose its tokens.
            with_words: keep what places its text in time, if the checkpoint has a CTC head.
            hotwords: those that are heard stand before the audio when the clip is encoded; for
                checkpoints whose `capabilities` say so.
            previous_text: of which the end stands before the audio; likewise.

        Raises:
            InvalidRequestError: prompt, audio and the longest answer do not fit into a slot.
        """
        audio_len = self._audio_len(_mel_frames(waveform.size))
        context = ""
        if previous_text:
            context = self._processor.context(previous_text=previous_text_tail(previous_text))
        input_ids = self._input_ids(audio_len, prompt, context)
        max_tokens = token_budget(self._config, waveform.size / SAMPLE_RATE_HZ)
        max_tokens = min(max_tokens, decoding.max_tokens or max_tokens)
        length, room = len(input_ids) + max_tokens, self._slots.plan.slot_tokens
        if hotwords:  # which of them will be prompted is not known yet
            length += len(self._processor.context_templates["hotwords"].encode()) + MAX_LIST_BYTES
        if length > room:
            raise InvalidRequestError(
                f"the prompt, the audio and the longest answer to it take {length} tokens, and "
                f"there is room for {room}",
                param="file" if prompt is None else "prompt",
            )
        heard = Heard() if with_words and self._model.ctc_head is not None else None
        return Plan(waveform, input_ids, max_tokens, decoding, heard, prompt, context, hotwords)

    def _input_ids(self, audio_len: int, prompt: str | None, context: str) -> tuple[int, ...]:
        return tuple(self._processor.sequence(self._prompt_ids(prompt, context), audio_len))

    def _lay_out(self, plans: Sequence[Plan], audio: EmbeddedAudio) -> list[tuple[int, ...]]:
        """The plans' sequences, with the hotwords that the CTC head has heard before the audio."""
        laid_out = [plan.input_ids for plan in plans]
        rows = [row for row, plan in enumerate(plans) if plan.hotwords]
        head = self._model.ctc_head
        if not rows or head is None or audio.ctc_logits is None:
            return laid_out
        paths = ctc_greedy(audio.ctc_logits[rows], audio.frame_lens[rows], head.blank)
        for row, path in zip(rows, paths, strict=True):
            heard = self._processor.decode_transcript(head.to_token_ids(path))
            words = list_hotwords(heard_hotwords(plans[row].hotwords, heard))
            context = plans[row].context + self._processor.context(hotwords=words)
            laid_out[row] = self._input_ids(int(audio.audio_lens[row]), plans[row].prompt, context)
        return laid_out

    @torch.inference_mode()
    def start(self, plans: Sequence[Plan]) -> Callable[[], StartReport]:
        """Encode clips and prefill their prompts into the next free slots, in order.

        A CUDA device is not waited for where a `trimmed` encoder runs from a recording and no CTC
        head is listened to. A failure leaves the slots as they were.

        Returns:
            What it took; waits until it is done.
        """
        batches = [plans] if self._pads_batches else [[plan] for plan in plans]
        padded_audio_s = 0.0
        stopwatch = Stopwatch(self._device)
        rows: list[_Row] = []
        for batch in batches:
            audio = self._embed_audio(batch)
            stopwatch.lap("encode")
            rows += self._prefill(batch, audio, after=len(rows))
            stopwatch.lap("prefill")
            longest_s = max(plan.waveform.size for plan in batch) / SAMPLE_RATE_HZ
            padded_audio_s += len(batch) * max(longest_s, self.window_s)
        joined = slice(self._slots.used, self._slots.used + len(rows))
        self._slots.join([row.prompt_tokens - 1 for row in rows])
        self._next_ids[joined], self._sources[joined] = HELD, NO_SOURCE
        self._offsets[joined] = [row.position_offset for row in rows]
        self._is_plain[joined] = [row.sampler.is_plain for row in rows]
        self._rows += rows

        @cache
        def report() -> StartReport:
            taken_s = stopwatch.seconds()
            return StartReport(taken_s["encode"], taken_s["prefill"], padded_audio_s)

        return report

    def _prefill(self, plans: Sequence[Plan], audio: EmbeddedAudio, *, after: int) -> list[_Row]:
        """Write prompts into free slots, behind `after` others that are not counted yet."""
        laid_out = self._lay_out(plans, audio)
        ends = [len(ids) - 1 for ids in laid_out]
        numbers = np.full((len(plans), max(ends) + 2), self._pad_token_id)
        for row, ids, end in zip(numbers, laid_out, ends, strict=True):
            row[: len(ids)], row[-1] = ids, end
        on_device = to_device(torch.from_numpy(numbers), self._device)
        input_ids = on_device[:, :-1]
        embeds = self._embed(input_ids)  # (B, L, D), right-padded
        is_audio = input_ids == self._audio_token_id
        place = (is_audio.cumsum(1) - 1).clamp(min=0)  # of each audio position in its clip
        spread = audio.audio_embeds.gather(1, place[..., None].expand_as(embeds))
        embeds = torch.where(is_audio[..., None], spread.to(embeds.dtype), embeds)
        # Right-padded: what stands behind a prompt moves none of its positions.
        position_ids = self._model.audio_position_ids(input_ids, None, audio)
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=self._device)
            position_ids, offsets = position_ids.expand_as(input_ids), [0] * len(plans)
        else:
            positions = position_ids.tolist()
            offsets = [row[end] - end for row, end in zip(positions, ends, strict=True)]
        self._slots.begin_prefill(len(plans), after=after)
        if embeds.shape[1] > 1:  # prompts of a single position have no past
            self._decode.prefill(embeds[:, :-1], position_ids[:, :-1], ends)
        first = self._slots.used + after
        last = on_device[:, -1:, None].expand(-1, 1, embeds.shape[-1])
        self._decode.hold(slice(first, first + len(plans)), embeds.gather(1, last)[:, 0])
        posteriors = self._posteriors(plans, audio)
        return [
            _Row(
                prompt_tokens=end + 1,
                position_offset=offset,
                sampler=TokenSampler(plan.decoding, self.stop_ids, posterior),
            )
            for end, offset, plan, posterior in zip(ends, offsets, plans, posteriors, strict=True)
        ]

    def _posteriors(
        self, plans: Sequence[Plan], audio: EmbeddedAudio
    ) -> Sequence[ClipPosteriors | None]:
        """What joint decoding needs of each clip; None where the LLM decodes alone."""
        head, weight = self._model.ctc_head, self._config.ctc_decoding_weight
        if head is None or not weight:
            return [None] * len(audio.audio_lens)
        lexicon = self._model.lexicon
        lexicons = [lexicon and lexicon.with_words(plan.hotwords) for plan in plans]
        return clip_posteriors(audio, head, self.stop_ids, weight, lexicons)

    def _embed_audio(self, plans: Sequence[Plan]) -> EmbeddedAudio:
        mel_frames = [_mel_frames(plan.waveform.size) for plan in plans]
        audio_lens = [self._audio_len(count) for count in mel_frames]
        wanted = [plan.input_ids.count(self._audio_token_id) for plan in plans]
        if audio_lens != wanted:
            raise RuntimeError(f"{wanted} audio positions, {audio_lens} embeddings")
        waveforms = [plan.waveform for plan in plans]
        frames, frame_lens = self._encode(waveforms, fetches=self._can_fetch(waveforms))
        for plan, row, count in zip(plans, frames, mel_frames, strict=True):
            if plan.heard is not None:
                length = int(encoder_frame_lens(torch.tensor(count)))
                plan.heard.encoder_frames = row[:length].clone()  # lets the batch go
        audio = self._model.embed_audio(frames, frame_lens)
        if audio.audio_embeds.shape[1] < max(wanted):
            raise RuntimeError(
                f"{wanted} audio positions, {audio.audio_embeds.shape[1]} embeddings"
            )
        return audio

    def _can_fetch(self, waveforms: Sequence[NDArray[np.float32]]) -> bool:
        direct = self._direct_memory
        return direct is not None and all(direct.holds(waveform) for waveform in waveforms)

    @torch.inference_mode()
    def step(self, rows: slice) -> list[Token | Candidates | None]:
        """Give each of `rows` its next token, or, in a beam search, the candidates for it.

        A failure leaves the rows as they were. None where the model's logits are not finite.
        """
        self._settle()
        launched = self._launch(rows)
        samplers = [row.sampler for row in self._rows[rows]]
        tokens = choose_tokens(launched.logits, launched.best(), samplers)
        self._slots.advance(rows)
        self._next_ids[rows] = [each.id if isinstance(each, Token) else HELD for each in tokens]
        return tokens

    @property
    def may_run_ahead(self) -> bool:
        """Whether no row has to be seen by the host before its next step."""
        return self._runs_ahead and bool(self._is_plain[: len(self._rows)].all())

    @torch.inference_mode()
    def begin_step(self) -> None:
        """Launch a step of all rows, behind one whose tokens are not known yet, at most.

        A failure leaves the rows as they were.
        """
        if len(self._launched) == _MOST_LAUNCHED:
            raise RuntimeError("the tokens of the step before the last have not been asked for")
        rows = slice(0, self._slots.used)
        launched = self._launch(rows)
        self._slots.advance(rows)
        self._sources[rows] = np.arange(rows.stop)
        self._launched.append(launched)

    def finish_step(self) -> NDArray[np.int64]:
        """Wait for the tokens of the first step that was begun and not finished.

        Returns:
            (R,) ids, one for each row that there was when it began; `NO_ID` where its logits are
            not finite. What raises here is no row's fault: the device's work was launched before.
        """
        if len(self._launched) == 1:
            self._settle()
        return plain_ids(self._launched.popleft().best())

    def _launch(self, rows: slice) -> Launched:
        inputs = StepInputs(
            token_ids=self._next_ids[rows],
            columns=self._slots.lens[rows],
            offsets=self._offsets[rows],
            sources=self._sources[rows],
        )
        return self._decode(rows, inputs)

    def _settle(self) -> None:
        """Let the host know what the rows feed next, so that any of them can be stepped."""
        if not self._launched:
            return
        token_ids = [each.best() for each in self._launched][-1][1].astype(np.int64)
        sources = self._sources[: self._slots.used]
        open_rows = np.flatnonzero(sources != NO_SOURCE)
        self._next_ids[open_rows] = token_ids[sources[open_rows]]
        sources[:] = NO_SOURCE

    @torch.inference_mode()
    def branch(self, rows: Sequence[int], parents: Sequence[int], token_ids: Sequence[int]) -> None:
        """Let each of `rows` go on as the row `parents[i]` is, with a token.

        Rows behind the used ones, without a gap, are taken into use.
        """
        self._settle()
        states = [self._rows[parent] for parent in parents]
        self._decode.move(rows, parents)
        self._slots.branch(rows, parents, shared_len=states[0].prompt_tokens)
        self._rows += states[: max(0, max(rows) + 1 - len(self._rows))]
        samplers = branch_samplers([state.sampler for state in states], token_ids)
        for row, state, sampler, token_id in zip(rows, states, samplers, token_ids, strict=True):
            self._rows[row] = replace(state, sampler=sampler)
            self._next_ids[row], self._sources[row] = token_id, NO_SOURCE
            self._offsets[row], self._is_plain[row] = state.position_offset, sampler.is_plain

    def restart(self, row: int, repetition_penalty: float) -> None:
        """Begin a row's answer again, under at least this repetition penalty."""
        state = self._rows[row]
        self._slots.rewind(row, state.prompt_tokens - 1)
        self._next_ids[row], self._sources[row] = HELD, NO_SOURCE
        before = state.sampler
        penalty = max(before.decoding.repetition_penalty, repetition_penalty)
        decoding = replace(before.decoding, repetition_penalty=penalty)
        state.sampler = TokenSampler(decoding, before.stop_ids, before.posteriors)
        self._is_plain[row] = state.sampler.is_plain

    def release(self, rows: Sequence[int], *, failed: Collection[int] = ()) -> None:
        """Free rows; others take their places. What `failed` ones hold is wiped."""
        # What a step under way writes may be a NaN that nobody will hear of.
        is_unknown = bool(self._launched) and not self._reads_own_lengths
        moves = self._slots.release(rows, wipe=rows if is_unknown else failed)
        if moves:
            targets, sources = (list(each) for each in zip(*moves, strict=True))
            if (self._next_ids[sources] == HELD).any():
                self._decode.move(targets, sources)
            for target, source in moves:
                self._rows[target] = self._rows[source]
            for each in (self._next_ids, self._offsets, self._sources, self._is_plain):
                each[targets] = each[sources]
        del self._rows[len(self._rows) - len(rows) :]

    def text(self, token_ids: Sequence[int]) -> str:
        """Text of an answer."""
        return self._processor.decode_transcript(token_ids)

    @torch.inference_mode()
    def words(self, plan: Plan, text: str) -> tuple[Word, ...] | None:
        """Place a clip's text in time by the CTC head.

        Returns:
            Words with seconds from the clip's beginning; None where the plan did not ask, the
            checkpoint has no CTC head, or `align_words` finds no place for the text.
        """
        frames = plan.heard.encoder_frames if plan.heard is not None else None
        head = self._model.ctc_head
        if head is None or not isinstance(frames, torch.Tensor):
            return None
        lens = torch.tensor([len(frames)], device=frames.device)
        adapted = self._model.connector.adapt(frames[None].to(head.weight.dtype), lens)
        spans = align_words(text, self._processor, head, adapted[0])
        if spans is None:
            return None
        return tuple(
            Word(span.text, span.start_frame * ENCODER_FRAME_S, span.end_frame * ENCODER_FRAME_S)
            for span in spans
        )

    def language(self, text: str) -> str | None:
        """ISO 639-1 code of a text where the checkpoint's languages leave no doubt."""
        return identify_language(text, self._config.languages or [])

    def warm_up(self) -> None:
        """Transcribe a little noise, and record what is run from recordings."""
        with torch.inference_mode():
            self._decode.warm_up()
            self._encode.warm_up()
        self._try(_WARM_UP_S[: self.n_slots])

    def share(self, samples: NDArray[np.float32]) -> None:
        """Let a CUDA device fetch clips that lie in samples (N,) by itself; twice is once."""
        if self._direct_memory is not None:
            self._direct_memory.share(samples)

    def forget(self, samples: NDArray[np.float32]) -> None:
        """Fetch no more clips from `samples`, which may be unmapped then."""
        if self._direct_memory is not None:
            self._direct_memory.forget(samples)

    def recover(self) -> None:
        """Free what a failed call may have left behind."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def probe(self) -> None:
        """Find out, in a free slot, whether the device still works; raises if it does not."""
        self._try(_WARM_UP_S[:1])

    def _try(self, lengths_s: Sequence[float]) -> None:
        rng = np.random.default_rng(0)
        sizes = [
            int(min(length_s, self._config.max_audio_s) * SAMPLE_RATE_HZ) for length_s in lengths_s
        ]
        clips = [rng.normal(0, 0.01, size).astype(np.float32) for size in sizes]
        rows = slice(len(self._rows), len(self._rows) + len(clips))
        self.start([self.plan(clip) for clip in clips])
        try:
            for _ in range(_WARM_UP_STEPS):
                self.step(rows)
        finally:
            self.release(range(rows.start, rows.stop))

    def _slot_tokens(self) -> int:
        """Longest sequence: the longest clip's, and room for a request's own prompt."""
        longest = self._audio_len(_mel_frames(int(self._config.max_audio_s * SAMPLE_RATE_HZ)))
        prompt = self._processor.sequences([longest])["input_ids"].shape[1]
        wanted = prompt + token_budget(self._config, self._config.max_audio_s) + PROMPT_ROOM_TOKENS
        limit: int | None = getattr(self._llm.config, "max_position_embeddings", None)
        return wanted if limit is None else min(wanted, limit)


def _mel_frames(n_samples: int) -> int:
    """What `mel_frame_lens` says of one clip, without a tensor."""
    return min(-(-n_samples // HOP_SAMPLES), WINDOW_FRAMES)


def _count_audio(processor: SpeechLLMProcessor, mel_frames: int) -> int:
    """Audio positions of a clip of so many mel frames."""
    return int(processor.audio_lens(torch.tensor([mel_frames])))


def _require_arguments(llm: PreTrainedModel) -> None:
    """Refuse an LLM that cannot be told where each row stands."""
    taken = inspect.signature(llm.forward).parameters
    for name in ("inputs_embeds", "position_ids", "past_key_values"):
        if name not in taken:
            raise ValueError(
                f"the engine cannot serve {llm.config.model_type} models: they take no {name}"
            )


def _default_kv_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return _CPU_KV_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    return int(free * _CUDA_KV_SHARE)
