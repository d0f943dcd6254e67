import pytest
from pydantic import ValidationError

from server.settings import (
    SettingError,
    Settings,
    read_settings,
    unknown_variables,
    variable_of,
)


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
        ("cors_origins", "example.org"), ("cors_origins", "https://a.org/path"),
        ("key_max_concurrency", -1), ("key_audio_s_per_minute", -1),
        ("num_beams", 9), ("num_beams", -1),
        ("device", "gpu"), ("device", "meta"), ("device", "cuda:"), ("device", "cuda:0 "),
    ],
)  # fmt: skip
def test_a_value_out_of_bounds_is_refused(name, value):
    with pytest.raises(ValidationError, match=name):
        Settings(**{name: value})


def test_beams_have_to_fit_into_a_batch():
    assert Settings(max_batch_size=4, num_beams=4).num_beams == 4
    assert Settings(max_batch_size=1).num_beams == 0
    with pytest.raises(SettingError, match=r"^--num-beams / .* --max-batch-size, which is 4"):
        read_settings(max_batch_size=4, num_beams=5)


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:11"])
def test_devices_are_taken_by_name(device):
    assert Settings(device=device).device == device


def test_a_value_of_the_environment_that_cannot_be_is_named_as_a_user_does(monkeypatch):
    monkeypatch.setenv("SPEECHLLM_MAX_WAIT_MS", "long")
    with pytest.raises(SettingError) as raised:
        read_settings(port=9000)
    assert str(raised.value).startswith("--max-wait-ms / SPEECHLLM_MAX_WAIT_MS: ")
    assert read_settings(max_wait_ms=1).max_wait_ms == 1


def test_preferred_batch_sizes_are_numbers_between_commas():
    assert Settings(preferred_batch_sizes="4, 8,16").preferred_sizes == (4, 8, 16)
    assert Settings().preferred_sizes == ()


def test_every_field_says_what_it_is():
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name


def test_keys_do_not_show_when_settings_are_printed():
    assert "a-key-of-16-chars" not in repr(Settings(api_keys="a-key-of-16-chars"))


def test_a_model_goes_by_its_folders_name_unless_it_is_given_one(tmp_path, monkeypatch):
    (tmp_path / "mongolian").mkdir()
    assert Settings(model=str(tmp_path / "mongolian")).served_name == "mongolian"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Settings(model="~/mongolian").served_name == "mongolian"
    assert Settings(model="someone/speech-llm").served_name == "someone/speech-llm"
    assert Settings(model="someone/speech-llm", model_name="asr").served_name == "asr"


def test_origins_and_aliases_are_between_commas():
    settings = Settings(cors_origins="https://a.org, http://localhost:3000", model_aliases="a,b")
    assert settings.origins == ("https://a.org", "http://localhost:3000")
    assert settings.aliases == ("a", "b")
    assert Settings().origins == ()


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("SPEECHLLM_MAX_BATCH_SIZ", "SPEECHLLM_MAX_BATCH_SIZE"),
        ("SPEECHLLM_THREADS", "SPEECHLLM_CPU_THREADS"),
        ("speechllm_modle", "SPEECHLLM_MODEL"),
        ("SPEECHLLM_KUBERNETES", None),
        ("SPEECHLLM_", None),
    ],
)
def test_a_variable_that_sets_nothing_is_found_with_the_one_that_may_be_meant(name, meant):
    assert unknown_variables([name, "PATH"]) == {name: meant}


def test_variables_that_are_read_are_not_taken_for_misspelt():
    known = [variable_of(name) for name in Settings.model_fields]
    known += ["speechllm_port", "SPEECHLLM_API_KEY", "SPEECHLLM_SHARED_DATA"]
    assert unknown_variables(known) == {}
