"""The search on a made-up language model."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.beams import BeamSearch, candidates_per_beam, place
from server.engine.decoding import Candidates

STOP = 0
VOCABULARY = 9


def logprobs_after(ids, seed):
    """Of every token, as a function of those before."""
    weights = [
        1 + hash((seed, tuple(ids), token)) % 97 * (1 + token % 2) for token in range(VOCABULARY)
    ]
    return [math.log(weight / sum(weights)) for weight in weights]


def candidates_after(ids, seed, count):
    logprobs = logprobs_after(ids, seed)
    best = sorted(range(VOCABULARY), key=lambda token: -logprobs[token])[:count]
    values = tuple(logprobs[token] for token in best)
    return Candidates(tuple(best), values, values)


def run(search, seed, count=VOCABULARY):
    beams, steps = [()], 0
    while search.finish_reason is None:
        branches = search.push([candidates_after(ids, seed, count) for ids in beams])
        beams = [(*beams[branch.parent], branch.token_id) for branch in branches]
        assert len(set(beams)) == len(beams)
        steps += 1
    return steps


def mean(ids, seed, *, ended):
    tokens = (*ids, STOP) if ended else ids
    total = sum(logprobs_after(tokens[:i], seed)[token] for i, token in enumerate(tokens))
    return total / len(tokens)


def make_search(num_beams, max_tokens, **options):
    return BeamSearch(
        num_beams=num_beams, max_tokens=max_tokens, stop_ids=frozenset({STOP}), **options
    )


@given(st.integers(0, 10**6), st.integers(2, 4), st.integers(1, 5))
def test_answers_are_distinct_sorted_and_scored_by_the_mean_of_their_tokens(
    seed, num_beams, max_tokens
):
    search = make_search(num_beams, max_tokens, guards_loops=False)
    steps = run(search, seed)
    answers = search.answers
    assert steps <= max_tokens
    assert 1 <= len(answers) <= num_beams
    scores = [answer.score for answer in answers]
    assert scores == sorted(scores, reverse=True)
    for answer in answers:
        ended = len(answer.logprobs) < max_tokens and math.isclose(
            answer.score, mean(answer.token_ids, seed, ended=True)
        )
        assert ended or math.isclose(answer.score, mean(answer.token_ids, seed, ended=False))
        assert len(answer.token_ids) == len(answer.logprobs) <= max_tokens
        assert STOP not in answer.token_ids
    assert search.token_ids == answers[0].token_ids
    assert search.finish_reason in {"stop", "length"}


@given(st.integers(0, 10**6), st.integers(2, 3))
def test_tokens_that_are_no_candidates_could_not_have_mattered(seed, num_beams):
    whole, cut = make_search(num_beams, 4), make_search(num_beams, 4)
    run(whole, seed)
    run(cut, seed, min(VOCABULARY, candidates_per_beam(num_beams, 1)))
    assert whole.answers == cut.answers


@given(st.data())
def test_beams_are_placed_in_their_rows_and_the_free_ones_each_once(data):
    rows = data.draw(st.lists(st.integers(0, 20), unique=True, min_size=1, max_size=5))
    fresh = list(range(21, 21 + data.draw(st.integers(0, 3))))
    beams = st.integers(0, len(rows) - 1)
    count = len(rows) + len(fresh)
    parents = data.draw(st.lists(beams, min_size=count, max_size=count))
    placed = place(rows, parents, fresh)
    assert sorted(placed) == sorted([*rows, *fresh])
    for parent in set(parents):
        assert rows[parent] in [row for row, p in zip(placed, parents, strict=True) if p == parent]


@pytest.mark.parametrize("count", [1, 3])
def test_there_are_enough_candidates_for_every_beam_to_end_in_every_way(count):
    assert candidates_per_beam(4, count) == 4 * (1 + count)
