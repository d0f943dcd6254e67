import math

import pytest

from server.engine.decoding import Decoding
from server.errors import InvalidRequestError


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", 2.1), ("temperature", math.nan),
        ("top_p", 0.0), ("top_p", 1.1), ("top_p", math.nan),
        ("seed", -1), ("seed", 2**63), ("repetition_penalty", 0.0), ("repetition_penalty", 11.0),
        ("max_tokens", 0), ("num_beams", 0), ("num_beams", 9), ("n_best", 0),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(InvalidRequestError, match=f"{name} is out of range: {value}") as refusal:
        Decoding(**{name: value})
    assert refusal.value.param == name


def test_only_plain_greedy_decoding_is_plain():
    assert Decoding(max_tokens=5, seed=1, top_p=0.5).is_plain
    for wish in (
        {"temperature": 0.1},
        {"repetition_penalty": 1.1},
        {"num_beams": 2},
        {"logprobs": True},
    ):
        assert not Decoding(**wish).is_plain


def test_beams_with_sampling_are_refused_with_the_reason():
    with pytest.raises(InvalidRequestError, match="does not sample") as refusal:
        Decoding(num_beams=2, temperature=0.5)
    assert refusal.value.param == "num_beams"
    assert Decoding(num_beams=4, n_best=4).n_best == 4


def test_more_answers_than_beams_are_refused_with_the_reason():
    with pytest.raises(InvalidRequestError, match="at most num_beams: 3 answers of 2") as refusal:
        Decoding(num_beams=2, n_best=3)
    assert refusal.value.param == "n_best"
