import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor, TopPLogitsWarper

from model.ctc import CTCHead
from model.ctc_prefix import ClipPosteriors
from server.engine.decoder_pass import likeliest
from server.engine.decoding import Candidates, Decoding
from server.engine.sampling import TokenSampler, branch_samplers, choose_tokens

VOCABULARY = 50
STOP_IDS = frozenset({0, 3})


def begin(decoding):
    return TokenSampler(decoding, STOP_IDS)


def logits_of(seed, rows=1):
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def draw(decoding, logits, n=1):
    sampler = begin(decoding)
    return [sampler.choose(logits, logits).id for _ in range(n)]


def test_temperature_zero_takes_the_likeliest():
    logits = logits_of(0, 3)
    tokens = choose_tokens(logits, likeliest(logits).numpy(), [begin(Decoding()) for _ in range(3)])
    assert [token.id for token in tokens] == logits.argmax(-1).tolist()
    assert all(token.logprob is None for token in tokens)


def test_log_probabilities_are_the_model_s_own_whatever_is_sampled():
    logits = logits_of(1, 2)
    wishes = [Decoding(logprobs=True), Decoding(logprobs=True, temperature=1.7, seed=3, top_p=0.5)]
    for row, token in enumerate(
        choose_tokens(logits, likeliest(logits).numpy(), [begin(w) for w in wishes])
    ):
        expected = logits[row].log_softmax(-1)[token.id]
        torch.testing.assert_close(torch.tensor(token.logprob), expected)


@given(st.integers(0, 2**63 - 1), st.integers(0, 1000), st.integers(1, 6))
def test_a_seed_gives_the_same_tokens_in_any_company(seed, logits_seed, company):
    decoding = Decoding(temperature=1.0, top_p=0.9, seed=seed)
    logits = logits_of(logits_seed)
    alone, in_batch = begin(decoding), begin(decoding)
    others = [begin(Decoding(temperature=0.7)) for _ in range(company)]
    for _ in range(3):
        (expected,) = choose_tokens(logits, likeliest(logits).numpy(), [alone])
        batch = torch.cat([logits_of(logits_seed + 1, company), logits])
        assert choose_tokens(batch, likeliest(batch).numpy(), [*others, in_batch])[-1] == expected


def test_without_a_seed_answers_differ():
    decoding = Decoding(temperature=2.0)
    assert draw(decoding, torch.zeros(VOCABULARY), 20) != draw(
        decoding, torch.zeros(VOCABULARY), 20
    )


def test_samples_follow_the_distribution():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    drawn = torch.tensor(draw(Decoding(temperature=0.5, seed=0), logits, 4000))
    observed = drawn.bincount(minlength=4) / len(drawn)
    torch.testing.assert_close(observed, (logits / 0.5).softmax(-1), atol=0.03, rtol=0)


@given(st.integers(0, 1000), st.floats(0.05, 0.99))
def test_top_p_keeps_the_tokens_that_transformers_keeps(logits_seed, top_p):
    logits = logits_of(logits_seed)
    kept = TopPLogitsWarper(top_p)(None, logits / 0.8)[0].isfinite()
    drawn = draw(Decoding(temperature=0.8, top_p=top_p, seed=logits_seed), logits[0], 30)
    assert all(kept[token] for token in drawn)


@given(st.integers(0, 1000), st.floats(1.05, 3.0), st.lists(st.integers(0, 49), max_size=8))
def test_the_repetition_penalty_is_transformers_own(logits_seed, penalty, generated):
    logits = logits_of(logits_seed)
    sampler = begin(Decoding(repetition_penalty=penalty))
    for token in generated:
        sampler.note(token, None)
    ids = torch.tensor([generated], dtype=torch.int64)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone()).argmax()
    assert sampler.choose(sampler.penalise(logits[0]), logits[0]).id == int(expected)


def test_a_row_that_is_not_finite_gives_no_token_and_spoils_no_other():
    logits = logits_of(2, 3)
    logits[1, 7] = torch.nan
    wishes = [Decoding(), Decoding(temperature=1.0, seed=0), Decoding()]
    tokens = choose_tokens(logits, likeliest(logits).numpy(), [begin(wish) for wish in wishes])
    assert tokens[1] is None
    assert [tokens[0].id, tokens[2].id] == logits[[0, 2]].argmax(-1).tolist()


@given(st.integers(0, 1000))
def test_the_last_token_can_be_drawn_and_nothing_beyond_it(seed):
    logits = torch.full((VOCABULARY,), -torch.inf)
    logits[-1] = 0.0
    assert draw(Decoding(temperature=1.0, seed=seed), logits) == [VOCABULARY - 1]


def test_what_is_heard_counts_whatever_else_is_asked_for():
    head = CTCHead(4, VOCABULARY, blank_id=1)
    path = [7, 1, 7, 9]
    ctc_logits = 20.0 * torch.nn.functional.one_hot(torch.tensor(path), VOCABULARY)
    posteriors = ClipPosteriors(ctc_logits, head, STOP_IDS, weight=0.9)
    decodings = [
        Decoding(),
        Decoding(logprobs=True),
        Decoding(temperature=0.1, seed=1),
        Decoding(repetition_penalty=1.5),
        Decoding(num_beams=3),
    ]
    samplers = [TokenSampler(decoding, STOP_IDS, posteriors) for decoding in decodings]
    samplers.append(begin(Decoding()))
    for step, expected in enumerate([{7}, {7}, {9}, STOP_IDS]):
        logits = logits_of(step, len(samplers))
        choices = choose_tokens(logits, likeliest(logits).numpy(), samplers)
        for row, choice in enumerate(choices[:-1]):
            ids = choice.token_ids if isinstance(choice, Candidates) else [choice.id]
            assert ids[0] in expected
            if isinstance(choice, Candidates):
                (samplers[row],) = branch_samplers([samplers[row]], [ids[0]])
        assert choices[-1].id == logits[-1].argmax()
        of_the_llm = logits[1].log_softmax(-1)[choices[1].id]
        torch.testing.assert_close(torch.tensor(choices[1].logprob), of_the_llm)
