import pytest
from pydantic import ValidationError

from server.settings import Settings


def test_an_environment_variable_sets_a_field(monkeypatch):
    monkeypatch.setenv("SPEECHLLM_MAX_WAIT_MS", "2.5")
    assert Settings().max_wait_ms == 2.5


def test_an_argument_wins_over_the_environment(monkeypatch):
    monkeypatch.setenv("SPEECHLLM_PORT", "9000")
    assert Settings(port=9001).port == 9001


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", 70_000), ("max_batch_size", 0), ("max_wait_ms", -1), ("dtype", "int3"),
        ("kv_cache_mib", -1), ("max_queue_audio_s", 0), ("preferred_batch_sizes", "4,0"),
        ("preferred_batch_sizes", "four"), ("nope", 1),
    ],
)  # fmt: skip
def test_a_value_out_of_bounds_is_refused(name, value):
    with pytest.raises(ValidationError, match=name):
        Settings(**{name: value})


def test_preferred_batch_sizes_are_numbers_between_commas():
    assert Settings(preferred_batch_sizes="4, 8,16").preferred_sizes == (4, 8, 16)
    assert Settings().preferred_sizes == ()


def test_every_field_says_what_it_is():
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name
