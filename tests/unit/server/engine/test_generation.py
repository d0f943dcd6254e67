import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.generation import Answers, RepetitionDetector, TextStream

STOP = 0


class Answer:
    """One answer among many lanes."""

    def __init__(self, **options):
        self.answers = Answers(3, {STOP})
        self.answers.open(max_tokens=1000)
        self.lane = self.answers.open(**{"max_tokens": 1000, **options})
        self.restarts = 0
        self.finish_reason = None

    def push(self, ids):
        """Push until it ends."""
        for now_s, token_id in enumerate(ids):
            grown = self.answers.push(np.array([self.lane]), np.array([token_id]), float(now_s))
            self.restarts += grown.again == [self.lane]
            self.finish_reason = grown.ended.get(self.lane)
            if self.finish_reason is not None:
                break

    @property
    def token_ids(self):
        return self.answers.token_ids(self.lane)


def test_an_end_token_stops_and_is_not_part_of_the_answer():
    answer = Answer()
    answer.push([5, 6, STOP, 7])
    assert (answer.token_ids, answer.finish_reason) == ([5, 6], "stop")


def test_the_cap_ends_with_length():
    answer = Answer(max_tokens=3)
    answer.push([5, 6, 7, 8])
    assert (answer.token_ids, answer.finish_reason) == ([5, 6, 7], "length")


def test_an_answer_may_be_longer_than_there_was_room_for():
    answer = Answer()
    ids = [*range(1, 301)]
    answer.push([*ids, STOP])
    assert (answer.token_ids, answer.finish_reason) == (ids, "stop")


@pytest.mark.parametrize("unit", [[7], [7, 8], [7, 8, 9, 7], list(range(10, 26))])
def test_a_loop_is_retried_once_and_then_cut_to_one_copy(unit):
    answer = Answer()
    spoken = [1, 2, 3]
    answer.push(spoken + unit * 40 + spoken + unit * 40)
    assert answer.restarts == 1
    assert answer.finish_reason == "loop"
    # The first loop was noticed within its copies; what was left of them came before the text.
    assert answer.token_ids[-len(unit) :] == unit
    assert answer.token_ids.count(unit[-1]) <= 24 // len(unit) + 40
    assert answer.answers.first_token_s(answer.lane) == 0.0  # before it began again


def test_a_loop_that_may_not_be_retried_is_cut_at_once():
    answer = Answer(may_retry=False)
    answer.push([1, 2, *[7, 8] * 40])
    assert answer.restarts == 0
    assert (answer.token_ids, answer.finish_reason) == ([1, 2, 7, 8], "loop")


def test_without_a_guard_repetition_is_an_answer_like_any():
    answer = Answer(guards_loops=False, max_tokens=50)
    answer.push([7] * 60)
    assert (len(answer.token_ids), answer.finish_reason) == (50, "length")


def test_what_people_say_again_is_no_loop():
    answer = Answer()
    answer.push([*[7] * 20, 8, *[1, 2, 3, 4, 5, 6, 7, 8, 9] * 3, STOP])
    assert (answer.finish_reason, answer.restarts) == ("stop", 0)


@given(st.lists(st.integers(0, 3), max_size=80))
def test_a_loop_is_told_exactly_when_the_tail_is_one_unit_often_enough(ids):
    detector = RepetitionDetector()
    for end, token in enumerate(ids, start=1):
        repeated = detector.push(token, ids[: end - 1], end - 1)
        tail_loops = [
            n
            for n in range(1, 17)
            for size in [max(4 * n, 24)]
            if end >= size and all(ids[i] == ids[i - n] for i in range(end - size + n, end))
        ]
        assert bool(repeated) == bool(tail_loops)
        if repeated:
            n = tail_loops[0]
            assert ids[end - repeated : end] == ids[end - repeated - n : end - n]


class Alone:
    """What `Answers` does, for one answer and in plain words."""

    def __init__(self, max_tokens, guards_loops, may_retry):
        self.max_tokens, self.guards_loops, self.may_retry = max_tokens, guards_loops, may_retry
        self.begin()

    def begin(self):
        self.ids, self.detector = [], RepetitionDetector()

    def push(self, token):
        """Take a token; returns how it ended, "again", or None."""
        if token == STOP:
            return "stop"
        repeated = self.detector.push(token, self.ids, len(self.ids)) if self.guards_loops else 0
        self.ids.append(token)
        if repeated and self.may_retry:
            self.may_retry = False
            self.begin()
            return "again"
        if repeated:
            del self.ids[-repeated:]
            return "loop"
        return "length" if len(self.ids) == self.max_tokens else None


@given(st.data())
def test_many_answers_grow_beside_each_other_as_each_would_alone(data):
    answers = Answers(4, {STOP, 9})
    open_: dict[int, Alone] = {}
    for _ in range(data.draw(st.integers(1, 120))):
        if len(open_) < 4 and data.draw(st.booleans()):
            options = {
                "max_tokens": data.draw(st.integers(1, 90)),
                "guards_loops": data.draw(st.booleans()),
                "may_retry": data.draw(st.booleans()),
            }
            open_[answers.open(**options)] = Alone(**options)
        growing = [lane for lane in open_ if data.draw(st.integers(0, 5))]
        # Seldom a stop: loops take 24 tokens.
        tokens = [data.draw(st.sampled_from([7] * 30 + [8, STOP])) for _ in growing]
        epochs = answers.epochs.copy()
        grown = answers.push(np.array(growing, np.int64), np.array(tokens, np.int64), 1.0)
        for lane, token in zip(growing, tokens, strict=True):
            came_to = open_[lane].push(token)
            told = "again" if lane in grown.again else grown.ended.get(lane)
            assert told == came_to
            assert answers.token_ids(lane) == open_[lane].ids
            assert (answers.epochs[lane] != epochs[lane]) == (came_to == "again")
            if lane in grown.ended:
                answers.close(lane)
                assert answers.epochs[lane] != epochs[lane]
                del open_[lane]
    for lane, alone in open_.items():
        assert answers.token_ids(lane) == alone.ids


LETTERS = {1: b"a", 2: b" b", 3: "ө".encode()[:1], 4: "ө".encode()[1:], 5: b" "}


def decode(ids):
    return b"".join(LETTERS[i] for i in ids).decode(errors="replace").strip()


def test_text_comes_in_final_pieces_that_add_up():
    stream = TextStream(decode)
    ids = [1, 3, 4, 5, 2]
    pieces = [stream.push(ids[:end]) for end in range(1, len(ids) + 1)]
    assert pieces == ["a", "", "ө", "", "  b"]


@given(st.lists(st.sampled_from(sorted(LETTERS)), max_size=20))
def test_the_pieces_of_any_text_are_the_text(ids):
    stream = TextStream(decode)
    pieces = [stream.push(ids[:end]) for end in range(1, len(ids) + 1)]
    assert "".join(pieces) + stream.push(ids, is_last=True) == decode(ids)
