"""The engine's iterations on small real models, one thread, a clock that the test moves."""

import copy
import functools
import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.transcription import Transcriber
from server.engine.core import EngineCore
from server.engine.decoding import Decoding, Token
from server.engine.generation import LOOP_RETRY_PENALTY, RepetitionDetector
from server.engine.interface import (
    ALL_GUARDS,
    NO_GUARDS,
    EngineRequest,
    EngineResult,
    Guards,
)
from server.engine.recordings import CudaGraphs
from server.engine.runner import SpeechRunner
from server.engine.scheduler import ScheduleLimits
from server.errors import DeadlineExceededError, InferenceFailedError, InvalidRequestError
from tests.conftest import REPOSITORY, make_tiny_checkpoint
from tests.faulty_runner import START_POISON, STEP_POISON, FaultyRunner, poisoned
from tests.speech_models import (
    FAMILIES,
    JOINTLY,
    generate_alone,
    make_speech_model,
    noise,
    search_alone,
)

NO_LOOP_GUARD = Guards(loops=False, silence=True)
LIMITS = ScheduleLimits(max_batch_size=4, max_batch_audio_s=12.0)
CLIPS = [noise(seconds, seed) for seed, seconds in enumerate((0.3, 2.9, 1.1, 4.0, 0.7))]


class Clock:
    now_s = 100.0

    def __call__(self):
        return self.now_s


class Bench:
    """A core, its clock, and the answers it gave so far."""

    def __init__(self, runner, limits=LIMITS, **options):
        self.clock = Clock()
        self.reports = []
        options = {"guards": NO_LOOP_GUARD, "on_iteration": self.reports.append, **options}
        self.core = EngineCore(runner, limits, clock=self.clock, **options)
        self.keys = itertools.count()
        self.answers = {}
        self.pieces = {}

    def submit(self, waveform, **fields):
        key = next(self.keys)
        request = EngineRequest(str(key), waveform, waveform.size / 16_000, **fields)
        self.core.submit(key, request, self.clock.now_s)
        return key

    def iterate(self):
        outcome = self.core.iterate()
        for key, piece in outcome.pieces:
            assert key not in self.answers
            self.pieces.setdefault(key, []).append(piece)
        for key, answer in outcome.answers:
            assert key not in self.answers, "answered twice"
            self.answers[key] = answer

    def finish(self):
        for _ in range(1000):
            idle_s = self.core.idle_s()
            if idle_s is None:
                return
            self.clock.now_s += idle_s  # as the thread sleeps
            self.iterate()
        pytest.fail("the engine does not come to an end")

    def ended(self):
        counts = {}
        for report in self.reports:
            for reason, count in report.ended.items():
                counts[reason] = counts.get(reason, 0) + count
        return counts


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint):
    return Transcriber.from_pretrained(tiny_checkpoint, device="cpu")


def warmed_up(run):
    """Records as CUDA graphs are: after running what is recorded."""
    run()
    run()
    return run


@pytest.fixture(params=[False, True], ids=["step by step", "a step ahead"])
def runner(request, tiny):
    return SpeechRunner(tiny, max_slots=4, runs_ahead=request.param)


@pytest.fixture(scope="module", params=["qwen2", "llama", "gpt2", "gemma", JOINTLY])
def family(request, tmp_path_factory):
    transcriber = make_speech_model(tmp_path_factory.mktemp("family") / "model", request.param)
    runner = SpeechRunner(transcriber, max_slots=4)
    # From recordings, too, whose tensors one step leaves to the next.
    ahead = SpeechRunner(transcriber, max_slots=4, record=warmed_up, runs_ahead=True)

    @functools.cache
    def expected(clip, prompt, decoding):
        """What the request says alone: by `generate` if it is greedy, else by an engine of one."""
        options = {
            "prompt": prompt,
            "max_tokens": decoding.max_tokens,
            "penalty": decoding.repetition_penalty,
        }
        if decoding.num_beams > 1:
            return search_alone(transcriber, CLIPS[clip], decoding.num_beams, **options)[0][0]
        if decoding.temperature == 0:
            return generate_alone(transcriber, CLIPS[clip], **options)
        bench = Bench(runner)
        key = bench.submit(CLIPS[clip], prompt=prompt, decoding=decoding)
        bench.finish()
        return list(bench.answers[key].token_ids)

    return {False: runner, True: ahead}, expected, transcriber


decodings = st.one_of(
    st.just(Decoding()),
    st.builds(
        Decoding,
        max_tokens=st.none() | st.integers(1, 6),
        repetition_penalty=st.sampled_from([1.0, 1.5]),
        logprobs=st.booleans(),
    ),
    st.builds(
        Decoding,
        temperature=st.sampled_from([0.5, 1.0]),
        top_p=st.sampled_from([1.0, 0.8]),
        seed=st.integers(0, 2),
    ),
    st.builds(
        Decoding,
        num_beams=st.integers(2, 4),
        max_tokens=st.none() | st.integers(1, 6),
        repetition_penalty=st.sampled_from([1.0, 1.5]),
    ),
)
events = st.lists(
    st.one_of(
        st.tuples(
            st.just("submit"),
            st.integers(0, len(CLIPS) - 1),
            st.sampled_from([None, "zero one two"]),
            decodings,
        ),
        st.tuples(st.just("cancel"), st.integers(0, 20)),
        st.tuples(st.just("iterate"), st.integers(1, 4)),
    ),
    min_size=4,
    max_size=24,
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(events, st.booleans())
def test_every_request_says_what_it_says_alone_whatever_comes_and_goes(family, drawn, runs_ahead):
    runners, expected, _ = family
    bench = Bench(runners[runs_ahead])
    wanted, cancelled = {}, set()
    for event, *details in drawn:
        if event == "submit":
            clip, prompt, decoding = details
            key = bench.submit(CLIPS[clip], prompt=prompt, decoding=decoding)
            wanted[key] = (clip, prompt, decoding)
        elif event == "cancel":
            if details[0] in wanted and details[0] not in bench.answers:
                bench.core.cancel(details[0])
                cancelled.add(details[0])
        else:
            for _ in range(details[0]):
                bench.iterate()
    bench.finish()
    assert bench.answers.keys() == wanted.keys() - cancelled
    for key, answer in bench.answers.items():
        assert list(answer.token_ids) == expected(*wanted[key])
        decoding = wanted[key][2]
        assert (answer.logprobs is None) == (not decoding.logprobs)
    assert bench.core.running == 0
    assert bench.ended().get("cancelled", 0) == len(cancelled)


@pytest.mark.slow
def test_the_default_checkpoint_says_what_generate_says(shared_data):
    from model.data.audio import load_audio
    from model.data.manifest import read_manifest

    transcriber = Transcriber.from_pretrained(REPOSITORY / "weights" / "default", device="cpu")
    manifests = sorted((shared_data / "manifests").glob("*.jsonl"))
    clips = [
        load_audio(utterance.audio)
        for path in manifests[:3]
        for utterance in read_manifest(path, shared_data)[:4]
        if utterance.duration < transcriber.max_audio_s
    ]
    bench = Bench(SpeechRunner(transcriber, max_slots=3))
    keys = []
    for clip in clips:
        keys.append(bench.submit(clip))
        bench.iterate()
    bench.finish()
    beams = Decoding(num_beams=3, n_best=3)
    searches = [bench.submit(clip, decoding=beams) for clip in clips[:4]]
    bench.finish()
    for key, clip in zip(keys, clips, strict=True):
        assert list(bench.answers[key].token_ids) == generate_alone(transcriber, clip)
    for key, clip in zip(searches, clips, strict=False):
        expected = search_alone(transcriber, clip, 3)
        assert list(bench.answers[key].token_ids) == expected[0][0]
        assert [each.score for each in bench.answers[key].hypotheses] == pytest.approx(
            [score for _, score in expected], abs=1e-4
        )


@pytest.mark.parametrize(
    ("pads_batches", "limit_s", "sizes"),
    [(False, None, [2, 2]), (True, None, [4]), (True, 12.0, [1] * 4)],
)
def test_those_that_run_wait_for_as_much_encoding_as_the_device_does_at_once(
    tiny, pads_batches, limit_s, sizes
):
    runner = SpeechRunner(tiny, max_slots=4, pads_batches=pads_batches)
    bench = Bench(runner, ScheduleLimits(4, max_batch_audio_s=limit_s))
    for seed in range(4):
        bench.submit(noise(12.0, seed))
    for _ in sizes:
        bench.iterate()
    assert [report.start_sizes for report in bench.reports] == [[size] for size in sizes]
    assert all(report.decoded_rows for report in bench.reports)
    bench.finish()


def test_a_result_tells_how_it_came_about(runner):
    bench = Bench(runner)
    keys = [bench.submit(clip) for clip in CLIPS[:2]]
    bench.clock.now_s += 0.5
    bench.iterate()
    bench.clock.now_s += 2.0
    bench.finish()
    result = bench.answers[keys[1]]
    assert (result.queue_s, result.first_token_s, result.batch_size) == (0.5, 0.5, 2)
    assert result.encode_s > 0
    assert result.prefill_s > 0
    assert result.finish_reason in {"stop", "length"}
    assert result.text == runner.text(result.token_ids)


def test_new_requests_join_those_that_run(runner):
    bench = Bench(runner)
    bench.submit(CLIPS[3])
    bench.iterate()
    bench.submit(CLIPS[1])
    bench.iterate()
    bench.iterate()  # where a step was ahead, only the next has both
    assert bench.core.running == 2
    assert [report.decoded_rows for report in bench.reports] in ([1, 2, 2], [1, 1, 2])


def test_a_cancelled_request_frees_its_slot_before_the_next_step(runner):
    bench = Bench(runner, ScheduleLimits(max_batch_size=1))
    held, waiting = bench.submit(CLIPS[3]), bench.submit(CLIPS[3])
    bench.iterate()
    bench.core.cancel(held)
    bench.iterate()
    assert (bench.core.running, bench.core.waiting) == (1, 0)
    bench.finish()
    assert bench.answers.keys() == {waiting}


def test_a_deadline_ends_what_waits_and_what_runs(runner):
    bench = Bench(runner, ScheduleLimits(max_batch_size=1))
    runs = bench.submit(CLIPS[3], deadline_s=101.0)
    waits = bench.submit(CLIPS[3], deadline_s=101.0)
    bench.iterate()
    bench.clock.now_s = 101.0
    bench.iterate()
    assert isinstance(bench.answers[runs], DeadlineExceededError)
    assert isinstance(bench.answers[waits], DeadlineExceededError)
    assert "not complete" in str(bench.answers[runs])
    assert "still waited" in str(bench.answers[waits])
    assert bench.core.idle_s() is None


@pytest.mark.parametrize("leaves", ["finished", "cancelled"])
def test_what_waits_for_a_slot_starts_as_soon_as_one_is_free(runner, leaves):
    bench = Bench(runner, ScheduleLimits(max_batch_size=1))
    first, second = (bench.submit(CLIPS[0], deadline_s=160.0) for _ in range(2))
    bench.iterate()
    if leaves == "cancelled":
        bench.core.cancel(first)
    bench.finish()
    assert isinstance(bench.answers[second], EngineResult)
    assert bench.clock.now_s == 100.0


def test_a_wait_for_fuller_batches_ends_with_the_hurry(runner):
    bench = Bench(runner, ScheduleLimits(max_batch_size=4, max_wait_s=30.0))
    bench.submit(CLIPS[0])
    bench.iterate()
    assert (bench.core.running, bench.core.idle_s()) == (0, 30.0)
    bench.core.hurry()
    bench.iterate()
    assert bench.core.running == 1 or bench.answers


def test_a_prompt_that_is_too_long_fails_alone(runner):
    bench = Bench(runner)
    good, bad = bench.submit(CLIPS[0]), bench.submit(CLIPS[0], prompt="zero one " * 400)
    bench.finish()
    assert isinstance(bench.answers[good], EngineResult)
    assert isinstance(bench.answers[bad], InvalidRequestError)
    assert bench.ended()["failed"] == 1


def test_a_prompt_that_breaks_the_tokenizer_fails_alone(runner):
    bench = Bench(runner)
    bad, good = bench.submit(CLIPS[0], prompt="\ud800"), bench.submit(CLIPS[0])
    bench.finish()
    assert isinstance(bench.answers[bad], InferenceFailedError)
    assert isinstance(bench.answers[good], EngineResult)


@pytest.mark.parametrize("mark", [START_POISON, STEP_POISON, np.nan])
@pytest.mark.parametrize("guilty", range(4))
def test_only_the_guilty_request_of_a_batch_fails(tiny, runner, mark, guilty):
    bench = Bench(FaultyRunner(runner))
    clips = [CLIPS[1], CLIPS[3], CLIPS[2], CLIPS[1]]
    clips[guilty] = poisoned(clips[guilty], mark)
    keys = [bench.submit(clip) for clip in clips]
    bench.finish()
    for index, key in enumerate(keys):
        if index == guilty:
            assert isinstance(bench.answers[key], InferenceFailedError)
        else:
            assert list(bench.answers[key].token_ids) == generate_alone(tiny, clips[index])
    assert bench.core.running == 0
    again = bench.submit(CLIPS[3])
    bench.finish()
    assert list(bench.answers[again].token_ids) == generate_alone(tiny, CLIPS[3])


def test_an_answer_is_not_held_back_by_the_step_that_was_launched_ahead(tiny):
    iterations = []
    for runs_ahead in (False, True):
        bench = Bench(SpeechRunner(tiny, max_slots=1, runs_ahead=runs_ahead))
        bench.submit(CLIPS[3])
        while not bench.answers:
            bench.iterate()
        iterations.append(len(bench.reports))
        if runs_ahead:
            assert bench.core.idle_s() == 0  # a step is under way
            bench.iterate()
        assert bench.core.idle_s() is None
    assert iterations[0] == iterations[1]


def test_what_the_model_failed_on_outlives_no_slot(tiny):
    """Its slot is given to a shorter clip, which attends past its own end through a mask."""
    bench = Bench(SpeechRunner(tiny, max_slots=1, runs_ahead=False))
    guilty = bench.submit(np.full(64_000, np.nan, np.float32))
    bench.iterate()
    innocent = bench.submit(CLIPS[1])  # longer than what probes the device in between
    bench.finish()
    assert isinstance(bench.answers[guilty], InferenceFailedError)
    assert list(bench.answers[innocent].token_ids) == generate_alone(tiny, CLIPS[1])


def test_a_nan_that_nobody_heard_of_outlives_no_slot(tiny):
    runner = SpeechRunner(tiny, max_slots=2, runs_ahead=True)
    bench = Bench(runner)
    kept = bench.submit(CLIPS[3])
    bench.iterate()
    gone = bench.submit(np.full(64_000, np.nan, np.float32))
    bench.iterate()
    bench.core.cancel(gone)
    after = bench.submit(CLIPS[4])  # which does not overwrite all of it
    bench.finish()
    for key, clip in ((kept, CLIPS[3]), (after, CLIPS[4])):
        assert list(bench.answers[key].token_ids) == generate_alone(tiny, clip)


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_every_start_is_reported_once(tiny, runs_ahead):
    bench = Bench(SpeechRunner(tiny, max_slots=4, runs_ahead=runs_ahead))
    for clip in CLIPS:
        bench.submit(clip)
        bench.iterate()
    bench.finish()
    sizes = [size for report in bench.reports for size in report.start_sizes]
    assert sum(sizes) == len(CLIPS)
    audio_s = sum(report.audio_s for report in bench.reports)
    assert audio_s == pytest.approx(sum(clip.size for clip in CLIPS) / 16_000)
    for report in bench.reports:
        assert (report.encode_s > 0) == (report.prefill_s > 0) == bool(report.start_sizes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_a_step_ahead_and_recorded_answers_are_those_of_generate(tiny_checkpoint):
    on_gpu = Transcriber.from_pretrained(tiny_checkpoint, device="cuda", dtype="fp32")
    bench = Bench(SpeechRunner(on_gpu, max_slots=4, record=CudaGraphs()))
    keys = []
    for clip in CLIPS * 3:
        keys.append(bench.submit(clip))
        bench.iterate()
    bench.finish()
    on_cpu = Transcriber.from_pretrained(tiny_checkpoint, device="cpu")
    for key, clip in zip(keys, CLIPS * 3, strict=True):
        assert list(bench.answers[key].token_ids) == generate_alone(on_cpu, clip)


def test_a_third_step_is_not_launched_before_the_first_is_looked_at(tiny):
    runner = SpeechRunner(tiny, max_slots=1, runs_ahead=True)
    runner.start([runner.plan(CLIPS[3])])
    runner.begin_step()
    runner.begin_step()
    with pytest.raises(RuntimeError, match="not been asked for"):
        runner.begin_step()
    said = [*(int(runner.finish_step()[0]) for _ in range(2)), runner.step(slice(0, 1))[0].id]
    assert said == generate_alone(tiny, CLIPS[3])[:3]


def test_a_failing_start_is_halved_not_repeated_one_by_one(runner):
    faulty = FaultyRunner(runner)
    bench = Bench(faulty)
    for clip in (poisoned(CLIPS[0], START_POISON), CLIPS[0], CLIPS[0], CLIPS[0]):
        bench.submit(clip)
    bench.iterate()
    assert faulty.started == [4, 2, 1, 1, 2]
    assert bench.reports[0].failures == 3


def test_an_answer_that_cannot_be_spelt_fails_alone(runner, monkeypatch):
    bench = Bench(runner)
    shorter, longer = bench.submit(CLIPS[0]), bench.submit(CLIPS[3])
    spell, asked = runner.text, []

    def fail_once(token_ids):
        asked.append(token_ids)
        if len(asked) == 1:
            raise TypeError("no token")
        return spell(token_ids)

    monkeypatch.setattr(runner, "text", fail_once)
    bench.finish()
    assert isinstance(bench.answers[shorter], InferenceFailedError)
    assert bench.answers[longer].token_ids
    assert runner._slots.used == 0
    ended = sum((Counter(report.ended) for report in bench.reports), Counter())
    assert ended["failed"] == 1
    assert ended.total() == 2


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_a_stream_that_cannot_be_spelt_fails_alone(tiny, monkeypatch, runs_ahead):
    runner = SpeechRunner(tiny, max_slots=4, runs_ahead=runs_ahead)
    bench = Bench(runner)
    streamed = bench.submit(CLIPS[3], on_piece=lambda _piece: None)
    plain = bench.submit(CLIPS[1])
    spell = runner.text

    def fail_early(token_ids):
        if len(token_ids) == 3:
            raise TypeError("no token")
        return spell(token_ids)

    monkeypatch.setattr(runner, "text", fail_early)
    bench.finish()
    assert isinstance(bench.answers[streamed], InferenceFailedError)
    assert len(bench.pieces[streamed]) == 2
    assert list(bench.answers[plain].token_ids) == generate_alone(tiny, CLIPS[1])
    assert runner._slots.used == 0


def test_a_broken_device_ends_the_engine_and_is_not_blamed_on_a_request(runner):
    faulty = FaultyRunner(runner)
    bench = Bench(faulty)
    bench.submit(CLIPS[0])
    faulty.is_broken = True
    with pytest.raises(RuntimeError, match="the device is gone"):
        bench.iterate()


def test_pieces_come_token_by_token_and_add_up_to_the_text(runner):
    bench = Bench(runner)
    heard = bench.submit(CLIPS[3], on_piece=lambda _piece: None, decoding=Decoding(logprobs=True))
    silent = bench.submit(CLIPS[1])
    bench.finish()
    pieces, result = bench.pieces[heard], bench.answers[heard]
    assert silent not in bench.pieces
    assert "".join(piece.text for piece in pieces) == result.text
    told = [piece.token for piece in pieces][: len(result.token_ids)]
    assert told == [Token(*pair) for pair in zip(result.token_ids, result.logprobs, strict=True)]
    assert [piece.finish_reason for piece in pieces] == [
        *[None] * (len(pieces) - 1), result.finish_reason,
    ]  # fmt: skip


def make_talkative(folder, initializer_range):
    """A model that may say much and, with embeddings tied and layers faint, repeats itself."""
    llm = copy.deepcopy(FAMILIES["qwen2"])
    llm.initializer_range = initializer_range
    make_tiny_checkpoint(folder, llm_config=llm, max_tokens_per_audio_s=30.0)
    return Transcriber.from_pretrained(folder, device="cpu")


def cut_at_loop(ids):
    """`ids` up to one copy of the loop that they run into, and whether they do."""
    detector = RepetitionDetector()
    for place, token in enumerate(ids):
        if repeated := detector.push(token, ids[:place], place):
            return ids[: place + 1 - repeated], True
    return ids, False


@pytest.mark.parametrize(("initializer_range", "helps"), [(0.05, False), (0.14, True)])
def test_a_loop_is_retried_under_a_penalty_and_cut_where_that_does_not_help(
    tmp_path, initializer_range, helps
):
    model = make_talkative(tmp_path, initializer_range)
    clips = [noise(2.0, seed) for seed in range(3)]
    assert all(cut_at_loop(generate_alone(model, clip))[1] for clip in clips)
    expected = [
        cut_at_loop(generate_alone(model, clip, penalty=LOOP_RETRY_PENALTY)) for clip in clips
    ]
    assert any(not loops for _, loops in expected) == helps
    for runs_ahead in (False, True):
        runner = SpeechRunner(model, max_slots=2, runs_ahead=runs_ahead)
        bench = Bench(runner, guards=ALL_GUARDS)
        keys = [bench.submit(clip) for clip in clips]
        bench.finish()
        for key, (ids, loops) in zip(keys, expected, strict=True):
            assert list(bench.answers[key].token_ids) == ids
            assert (bench.answers[key].finish_reason == "loop") == loops
        assert sum(report.retries for report in bench.reports) == len(clips)


def test_an_answer_that_somebody_listens_to_is_cut_at_its_first_loop(tmp_path):
    model = make_talkative(tmp_path, 0.05)
    bench = Bench(SpeechRunner(model, max_slots=1), guards=ALL_GUARDS)
    key = bench.submit(noise(2.0), on_piece=lambda _piece: None)
    bench.finish()
    assert bench.answers[key].finish_reason == "loop"
    assert list(bench.answers[key].token_ids) == cut_at_loop(generate_alone(model, noise(2.0)))[0]
    assert bench.pieces[key][-1].finish_reason == "loop"


@pytest.mark.parametrize("penalty", [1.0, 1.5])
@pytest.mark.parametrize("num_beams", [2, 3, 4])
def test_beam_search_gives_generate_s_answers_and_scores_beside_others(family, num_beams, penalty):
    runners, _, transcriber = family
    runner = runners[num_beams == 3]
    bench = Bench(runner)
    greedy = bench.submit(CLIPS[4])
    bench.iterate()
    decoding = Decoding(num_beams=num_beams, n_best=num_beams, repetition_penalty=penalty)
    keys = [bench.submit(clip, decoding=decoding) for clip in CLIPS[:4]]
    bench.finish()
    assert list(bench.answers[greedy].token_ids) == generate_alone(transcriber, CLIPS[4])
    for key, clip in zip(keys, CLIPS, strict=False):
        expected = search_alone(transcriber, clip, num_beams, penalty=penalty)
        result = bench.answers[key]
        assert list(result.token_ids) == expected[0][0]
        assert [each.text for each in result.hypotheses] == [runner.text(i) for i, _ in expected]
        assert [each.score for each in result.hypotheses] == pytest.approx(
            [score for _, score in expected], abs=1e-4
        )
        assert result.hypotheses[0].text == result.text


def test_silence_is_answered_at_once_with_nothing_and_without_the_model(runner):
    faulty = FaultyRunner(runner)
    faulty.is_broken = True
    bench = Bench(faulty)
    silence = np.zeros(16_000, np.float32)
    plain = bench.submit(silence)
    heard = bench.submit(silence, on_piece=lambda _piece: None, decoding=Decoding(logprobs=True))
    searched = bench.submit(silence, decoding=Decoding(num_beams=2, n_best=2))
    bench.iterate()
    for key in (plain, heard, searched):
        result = bench.answers[key]
        assert (result.text, result.finish_reason, result.token_ids) == ("", "stop", ())
    assert bench.answers[heard].logprobs == ()
    assert [each.text for each in bench.answers[searched].hypotheses] == [""]
    assert not bench.pieces
    assert bench.ended() == {"stop": 3}
    assert bench.core.idle_s() is None


def test_without_the_gate_silence_goes_through_the_model(tiny, runner):
    bench = Bench(runner, guards=NO_GUARDS)
    silence = np.zeros(16_000, np.float32)
    key = bench.submit(silence)
    bench.finish()
    assert list(bench.answers[key].token_ids) == generate_alone(tiny, silence)


def test_the_end_of_a_beam_search_is_told_by_its_best_answer(tiny, runner):
    bench = Bench(runner)
    capped = bench.submit(CLIPS[3], decoding=Decoding(num_beams=2, max_tokens=2, logprobs=True))
    bench.finish()
    result = bench.answers[capped]
    (ids, score), _ = search_alone(tiny, CLIPS[3], 2, max_tokens=2)
    assert (result.finish_reason, list(result.token_ids)) == ("length", ids)
    assert sum(result.logprobs) / 2 == pytest.approx(score, abs=1e-4)
    assert result.hypotheses == ()


def test_beams_hold_their_slots_from_start_to_end(runner):
    bench = Bench(runner)
    search = bench.submit(CLIPS[3], decoding=Decoding(num_beams=3))
    bench.iterate()
    held = [bench.submit(CLIPS[3]) for _ in range(2)]
    for _ in range(3):
        bench.iterate()
    assert (bench.core.running, bench.core.waiting) == (2, 1)
    assert [report.decoded_rows for report in bench.reports] == [1, 4, 4, 4]
    bench.core.cancel(search)
    bench.iterate()
    assert (bench.core.running, bench.core.waiting) == (2, 0)
    bench.finish()
    assert bench.answers.keys() == set(held)


def test_more_beams_than_slots_are_refused_at_once(runner):
    bench = Bench(runner)
    key = bench.submit(CLIPS[3], decoding=Decoding(num_beams=5))
    assert bench.core.idle_s() == 0
    bench.iterate()
    assert isinstance(bench.answers[key], InvalidRequestError)
    assert bench.answers[key].param == "num_beams"
    assert bench.core.idle_s() is None


def test_a_beam_search_is_not_streamed():
    with pytest.raises(InvalidRequestError, match="cannot be streamed") as refusal:
        EngineRequest("0", CLIPS[0], 1.0, decoding=Decoding(num_beams=2), on_piece=print)
    assert refusal.value.param == "num_beams"


@pytest.mark.parametrize("mark", [START_POISON, STEP_POISON, np.nan])
def test_a_beam_search_that_the_model_fails_on_fails_alone(tiny, runner, mark):
    bench = Bench(FaultyRunner(runner))
    beams = Decoding(num_beams=2)
    guilty = bench.submit(poisoned(CLIPS[1], mark), decoding=beams)
    other = bench.submit(CLIPS[3], decoding=beams)
    bench.finish()
    assert isinstance(bench.answers[guilty], InferenceFailedError)
    assert list(bench.answers[other].token_ids) == search_alone(tiny, CLIPS[3], 2)[0][0]
    assert (bench.core.running, bench.ended()["failed"]) == (0, 1)


def test_a_beam_search_that_loops_is_repeated_under_the_penalty_and_cut(tmp_path):
    model = make_talkative(tmp_path, 0.05)
    clip = noise(2.0)
    assert cut_at_loop(search_alone(model, clip, 2)[0][0])[1]
    expected, loops = cut_at_loop(search_alone(model, clip, 2, penalty=LOOP_RETRY_PENALTY)[0][0])
    bench = Bench(SpeechRunner(model, max_slots=3), guards=ALL_GUARDS)
    other = bench.submit(clip)
    key = bench.submit(clip, decoding=Decoding(num_beams=2))
    bench.finish()
    assert list(bench.answers[key].token_ids) == expected
    assert (bench.answers[key].finish_reason == "loop") == loops
    assert isinstance(bench.answers[other], EngineResult)
