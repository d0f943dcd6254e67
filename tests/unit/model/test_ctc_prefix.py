"""Prefix scores of the CTC head, against the sum over all of its paths."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.ctc import CTCHead
from model.ctc_prefix import ClipPosteriors, CTCPrefix, extend_prefixes, joint_scores
from model.lexicon import Lexicon

VOCABULARY, BLANK, END = 7, 1, 2
SOME = [3, 5]  # what a head over some tokens covers


def make_head(n_tokens: int | None = None) -> CTCHead:
    head = CTCHead(4, VOCABULARY, BLANK, n_tokens)
    if n_tokens is not None:
        head.choose(SOME)
    return head


def listen(seed: int, n_frames: int, head: CTCHead) -> tuple[torch.Tensor, ClipPosteriors]:
    """Posteriors of random frames, and the clip with them."""
    n_outputs = head.out_features
    logits = 2 * torch.randn(n_frames, n_outputs, generator=torch.Generator().manual_seed(seed))
    return logits.double().softmax(-1), ClipPosteriors(logits, head, [END], 0.3)


def scores_of(*prefixes: CTCPrefix) -> torch.Tensor:
    """What the head adds to the LLM's scores (R, V)."""
    llm = torch.zeros(len(prefixes), VOCABULARY)
    return joint_scores(llm, prefixes) / prefixes[0].clip.weight


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
        if so_far < 1e-12:  # more tokens than frames: the last is passed over
            assert prefix.last == answer[-2]
            continue
        assert prefix.log_prob == pytest.approx(math.log(so_far), abs=1e-5)
        scores = scores_of(prefix)[0]
        for token in (3, 5):
            share = begins(sums, (*answer, token)) / so_far
            if share > 1e-12:
                assert scores[token].item() == pytest.approx(math.log(share), abs=1e-4)
            else:  # there are no more frames for it
                assert scores[token] < -30
        ended = math.log(sums[answer] / so_far)
        assert scores[END].item() == pytest.approx(ended, abs=1e-4)
        assert scores[BLANK] == pytest.approx(-40.0)
        if n_tokens is not None:  # left to the LLM
            assert scores[4] == scores[6] == scores[[3, 5, END]].max()


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
    scores = scores_of(prefix)[0]
    # The end token's own output is taken for the end of the answer.
    as_output = prefix.extend(END)
    share = math.exp(as_output.log_prob - prefix.log_prob) if as_output is not prefix else 0.0
    assert float(scores.exp().sum()) + share == pytest.approx(1.0, abs=1e-3)


def test_runs_of_silence_change_next_to_nothing_but_the_work() -> None:
    head = make_head()
    said = [BLANK] * 50 + [3] + [BLANK] * 80 + [3, 5, 5] + [BLANK] * 30
    logits = 9.5 * torch.nn.functional.one_hot(torch.tensor(said), VOCABULARY)
    logits[-25:, 6] += 2.0  # what ends a sentence is written into the pause behind it
    clip = ClipPosteriors(logits, head, [END], 0.3)
    assert len(clip) < 30 < len(said)
    whole = ClipPosteriors(logits, head, [END], 0.3)
    whole.posteriors = logits.softmax(-1)
    whole.array = whole.posteriors.numpy()
    whole.log_blank = np.log(whole.array[:, BLANK].astype("float64"))
    short, long = CTCPrefix.begin(clip), CTCPrefix.begin(whole)
    for token in (3, 3, 5, 6):
        both = scores_of(short), scores_of(long)
        torch.testing.assert_close(*both, atol=0.5, rtol=0)
        short, long = short.extend(token), long.extend(token)
    assert short.log_prob == pytest.approx(long.log_prob, abs=0.5)
    assert short.extend(6).log_prob == pytest.approx(long.extend(6).log_prob, abs=1.5)


def test_prefixes_are_scored_and_extended_together_as_alone() -> None:
    head = make_head()
    clips = [listen(seed, n_frames, head)[1] for seed, n_frames in enumerate((1, 7, 40, 90))]
    prefixes = [CTCPrefix.begin(clip) for clip in clips]
    for tokens in ([3, 5, 6, 0], [3, 5, 5, BLANK], [0, 5, 6, 6], [4, 4, 4, 4]):
        alone = [prefix.extend(token) for prefix, token in zip(prefixes, tokens, strict=True)]
        prefixes = extend_prefixes(prefixes, tokens)
        for one, other in zip(prefixes, alone, strict=True):
            assert (one.start, one.last) == (other.start, other.last)
            assert one.log_prob == pytest.approx(other.log_prob, abs=1e-9)
            np.testing.assert_allclose(one.either, other.either, atol=1e-9)
        together = scores_of(*prefixes)
        separate = torch.cat([scores_of(prefix) for prefix in prefixes])
        torch.testing.assert_close(together, separate, atol=1e-4, rtol=0)


def test_logits_that_are_not_finite_are_refused() -> None:
    logits = torch.zeros(5, VOCABULARY)
    logits[2, 3] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        ClipPosteriors(logits, make_head(), [END], 0.3)


def test_a_clip_of_silence_ends_at_once() -> None:
    logits = torch.full((200, VOCABULARY), -20.0)
    logits[:, BLANK] = 0.0
    prefix = CTCPrefix.begin(ClipPosteriors(logits, make_head(), [END], 0.3))
    assert scores_of(prefix)[0].argmax() == END


def test_a_token_without_an_output_leaves_the_place_as_it_was() -> None:
    head = make_head(3)
    _, clip = listen(0, 6, head)
    prefix = CTCPrefix.begin(clip).extend(3)
    assert prefix.extend(4) is prefix
    assert prefix.extend(BLANK) is prefix


def test_an_answer_that_nobody_said_keeps_every_score_finite() -> None:
    logits = torch.full((1500, VOCABULARY), -200.0)
    logits[:, BLANK] = 0.0
    logits[::100, 4] = 0.1
    clip = ClipPosteriors(logits, make_head(), [END], 0.3)
    prefix = CTCPrefix.begin(clip)
    for token in [3, 3, 5, 0, 6] * 8:
        prefix = prefix.extend(token)
        assert scores_of(prefix).isfinite().all()


@pytest.mark.parametrize("n_tokens", [None, 3])
def test_what_brings_a_word_outside_the_lexicon_costs_its_penalty(n_tokens: int | None) -> None:
    head = make_head(n_tokens)
    spelt = [b"", b"", b"", b"a", b"b", b"c", b" "]
    logits = torch.randn(5, head.out_features, generator=torch.Generator().manual_seed(0))
    clips = [
        ClipPosteriors(logits, head, [END], 0.3, lexicon)
        for lexicon in (None, Lexicon(["ab", "c"], 2.0, spelt))
    ]
    llm = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(1))
    # The head has no output for 4 where it covers some tokens; the answer is spelt with it still.
    for answer, outside in [
        ([], {4}),
        ([3], {3, 5, 6, END}),
        ([3, 4], {3, 4, 5}),
        ([3, 4, 6], {4}),
        ([3, 5], set()),
        ([3, 5, 6, 5], {3, 4, 5}),
    ]:
        plain, counted = map(CTCPrefix.begin, clips)
        for token in answer:
            (plain,), (counted,) = (extend_prefixes([each], [token]) for each in (plain, counted))
        cost = joint_scores(llm, [plain]) - joint_scores(llm, [counted])
        expected = [2.0 * (index in outside) for index in range(VOCABULARY)]
        assert cost[0].tolist() == pytest.approx(expected, abs=1e-5)
