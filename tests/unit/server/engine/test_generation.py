import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.decoding import Token
from server.engine.generation import Generation, RepetitionDetector, TextStream

STOP = 0


def generation(**options):
    return Generation(**{"max_tokens": 1000, "stop_ids": frozenset({STOP}), **options})


def push_all(answer, ids):
    """Push until it ends; returns how often it asked to begin again."""
    restarts = 0
    for token_id in ids:
        restarts += answer.push(Token(token_id, logprob=-1.0))
        if answer.finish_reason is not None:
            break
    return restarts


def test_an_end_token_stops_and_is_not_part_of_the_answer():
    answer = generation()
    push_all(answer, [5, 6, STOP, 7])
    assert (answer.token_ids, answer.logprobs) == ([5, 6], [-1.0, -1.0])
    assert answer.finish_reason == "stop"


def test_the_cap_ends_with_length():
    answer = generation(max_tokens=3)
    push_all(answer, [5, 6, 7, 8])
    assert (answer.token_ids, answer.finish_reason) == ([5, 6, 7], "length")


@pytest.mark.parametrize("unit", [[7], [7, 8], [7, 8, 9, 7], list(range(10, 26))])
def test_a_loop_is_retried_once_and_then_cut_to_one_copy(unit):
    answer = generation()
    spoken = [1, 2, 3]
    assert push_all(answer, spoken + unit * 40 + spoken + unit * 40) == 1
    assert answer.retried
    assert answer.finish_reason == "loop"
    # The first loop was noticed within its copies; what was left of them came before the text.
    assert answer.token_ids[-len(unit) :] == unit
    assert answer.token_ids.count(unit[-1]) <= 24 // len(unit) + 40
    assert len(answer.logprobs) == len(answer.token_ids)


def test_a_loop_that_may_not_be_retried_is_cut_at_once():
    answer = generation(may_retry=False)
    assert push_all(answer, [1, 2, *[7, 8] * 40]) == 0
    assert (answer.token_ids, answer.finish_reason) == ([1, 2, 7, 8], "loop")


def test_without_a_guard_repetition_is_an_answer_like_any():
    answer = generation(guards_loops=False, max_tokens=50)
    push_all(answer, [7] * 60)
    assert (len(answer.token_ids), answer.finish_reason) == (50, "length")


def test_what_people_say_again_is_no_loop():
    answer = generation()
    push_all(answer, [*[7] * 20, 8, *[1, 2, 3, 4, 5, 6, 7, 8, 9] * 3, STOP])
    assert answer.finish_reason == "stop"
    assert not answer.retried


@given(st.lists(st.integers(0, 3), max_size=80))
def test_a_loop_is_told_exactly_when_the_tail_is_one_unit_often_enough(ids):
    detector = RepetitionDetector()
    for end, token in enumerate(ids, start=1):
        repeated = detector.push(token, ids[: end - 1])
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
