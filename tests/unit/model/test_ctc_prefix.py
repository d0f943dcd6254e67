"""Prefix scores of the CTC head, against the sum over all of its paths."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.ctc import CTCHead
from model.ctc_prefix import CTCPrefix, HeardClip, prefix_scores

VOCABULARY, BLANK, END = 7, 1, 2
SOME = [3, 5]  # what a head over some tokens covers


def make_head(n_tokens: int | None = None) -> CTCHead:
    head = CTCHead(4, VOCABULARY, BLANK, n_tokens)
    if n_tokens is not None:
        head.choose(SOME)
    return head


def listen(seed: int, n_frames: int, head: CTCHead) -> tuple[torch.Tensor, HeardClip]:
    """Posteriors of random frames, and the clip with them."""
    n_outputs = head.out_features
    logits = 2 * torch.randn(n_frames, n_outputs, generator=torch.Generator().manual_seed(seed))
    return logits.double().softmax(-1), HeardClip(logits, head, [END], 0.3)


def scores_of(prefix: CTCPrefix) -> torch.Tensor:
    return prefix_scores([prefix], VOCABULARY)[0]


def sentences(posteriors: torch.Tensor, head: CTCHead) -> dict[tuple[int, ...], float]:
    """Probability of every answer, as the sum over its paths."""
    sums: dict[tuple[int, ...], float] = {}
    n_frames, n_outputs = posteriors.shape
    for path in itertools.product(range(n_outputs), repeat=n_frames):
        probability = math.prod(posteriors[t, k].item() for t, k in enumerate(path))
        merged = [key for key, _ in itertools.groupby(path) if key != head.blank]
        answer = tuple(head.to_token_ids(merged))
        sums[answer] = sums.get(answer, 0.0) + probability
    return sums


def begins(sums: dict[tuple[int, ...], float], prefix: tuple[int, ...]) -> float:
    return sum(p for answer, p in sums.items() if answer[: len(prefix)] == prefix)


@pytest.mark.parametrize("n_tokens", [None, 3])
@pytest.mark.parametrize("seed", range(3))
def test_scores_are_those_of_the_sum_over_all_paths(seed: int, n_tokens: int | None) -> None:
    head = make_head(n_tokens)
    posteriors, clip = listen(seed, 4, head)
    sums = sentences(posteriors, head)
    for answer in [(), (3,), (3, 3), (3, 5), (5, 3, 5), (3, 5, 5)]:
        prefix = CTCPrefix.begin(clip)
        for token in answer:
            prefix = prefix.extend(token)
        so_far = begins(sums, answer)
        if so_far < 1e-12:  # more tokens than frames
            continue
        assert prefix.log_prob == pytest.approx(math.log(so_far), abs=1e-5)
        scores = scores_of(prefix)
        for token in (3, 5):
            share = begins(sums, (*answer, token)) / so_far
            if share > 1e-12:
                assert scores[token].item() == pytest.approx(math.log(share), abs=1e-4)
            else:  # there are no more frames for it
                assert scores[token] < -30
        ended = math.log(sums[answer] / so_far)
        assert scores[END].item() == pytest.approx(ended, abs=1e-4)
        assert scores[BLANK] == -40.0
        if n_tokens is not None:
            assert scores[4] == scores[6] == -40.0


@given(
    seed=st.integers(0, 10_000),
    n_frames=st.integers(1, 60),
    tokens=st.lists(st.sampled_from([0, 3, 4, 5, 6]), max_size=12),
)
def test_whatever_was_said_the_next_token_is_one_of_those_that_are_scored(
    seed: int, n_frames: int, tokens: list[int]
) -> None:
    _, clip = listen(seed, n_frames, make_head())
    prefix = CTCPrefix.begin(clip)
    for token in tokens[:n_frames]:
        longer = prefix.extend(token)
        if longer.log_prob < -30:  # as good as impossible
            break
        assert longer.log_prob <= prefix.log_prob + 1e-6
        prefix = longer
    scores = scores_of(prefix)
    # The end token's own output is taken for the end of the answer.
    as_output = prefix.extend(END).log_prob - prefix.log_prob
    assert scores.exp().sum() + math.exp(as_output) == pytest.approx(1.0, abs=1e-3)


def test_runs_of_silence_change_nothing_but_the_work() -> None:
    head = make_head()
    said = [BLANK] * 50 + [3] + [BLANK] * 80 + [3, 5, 5] + [BLANK] * 30
    logits = 15.0 * torch.nn.functional.one_hot(torch.tensor(said), VOCABULARY)
    clip = HeardClip(logits, head, [END], 0.3)
    assert len(clip.posteriors) == 7
    prefix = CTCPrefix.begin(clip)
    for token in (3, 3, 5):
        assert scores_of(prefix).argmax() == token
        prefix = prefix.extend(token)
    assert scores_of(prefix).argmax() == END


def test_a_token_without_an_output_leaves_the_place_as_it_was() -> None:
    head = make_head(3)
    _, clip = listen(0, 6, head)
    prefix = CTCPrefix.begin(clip).extend(3)
    assert prefix.extend(4) is prefix
    assert prefix.extend(BLANK) is prefix


def test_an_hour_of_nothing_heard_keeps_every_score_finite() -> None:
    logits = torch.full((1500, VOCABULARY), -200.0)
    logits[:, BLANK] = 0.0
    logits[::100, 4] = 0.1
    clip = HeardClip(logits, make_head(), [END], 0.3)
    prefix = CTCPrefix.begin(clip)
    for token in [3, 3, 5, 0, 6] * 8:
        prefix = prefix.extend(token)
        assert scores_of(prefix).isfinite().all()
