import pytest

from server.errors import ApiKeyError, RateLimitedError
from server.keys import ANONYMOUS, KeyLimits, KeyRing
from server.settings import SettingError

ALICE, BOB = "alice-0123456789abcdef", "bob-0123456789abcdefgh"


class Clock:
    now_s = 0.0

    def __call__(self):
        return self.now_s


def test_without_keys_everybody_may_come():
    assert KeyRing([]).owner(None) == ANONYMOUS
    assert KeyRing([]).owner("anything") == ANONYMOUS


def test_a_key_names_its_owner_and_others_are_refused():
    ring = KeyRing([f"alice:{ALICE}", BOB])
    assert ring.owner(ALICE) == "alice"
    assert ring.owner(BOB) == "key-2"
    for wrong in (None, "", "alice", ALICE[:-1], ALICE + "x", f"alice:{ALICE}", "ключ" * 5):
        with pytest.raises(ApiKeyError):
            ring.owner(wrong)


def test_no_key_of_a_thousand_wrong_ones_is_taken():
    ring = KeyRing([f"alice:{ALICE}", BOB])
    for number in range(1000):
        with pytest.raises(ApiKeyError):
            ring.owner(f"{ALICE}{number}")


@pytest.mark.parametrize(
    "entries",
    [["short"], ["a b" * 10], [f"näme:{ALICE}"], [ALICE, ALICE], [f"a:{ALICE}", f"a:{BOB}"]],
)
def test_bad_entries_are_refused_without_showing_them(entries):
    with pytest.raises(ValueError, match="API key") as raised:
        KeyRing(entries)
    assert not any(entry in str(raised.value) for entry in entries)


def test_keys_come_from_the_setting_and_from_a_file(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"# of the team\n\nbob:{BOB}\n")
    ring = KeyRing.from_settings(f"alice:{ALICE}", str(file))
    assert {ring.owner(ALICE), ring.owner(BOB)} == {"alice", "bob"}


@pytest.mark.parametrize("text", ["", "# of the team\n\n"])
def test_a_file_without_keys_is_refused_and_lets_nobody_in(tmp_path, text):
    file = tmp_path / "keys"
    file.write_text(text)
    for keys in ("", f"alice:{ALICE}"):
        with pytest.raises(ValueError, match="holds none"):
            KeyRing.from_settings(keys, str(file))


@pytest.mark.parametrize(
    ("keys", "in_file", "told"),
    [
        (f"alice:{ALICE},short", BOB, "--api-keys / SPEECHLLM_API_KEYS: API key 2 "),
        (ALICE, f"{BOB}\nshort", "--api-keys-file / SPEECHLLM_API_KEYS_FILE: API key 3 "),
        (ALICE, ALICE, "--api-keys-file / SPEECHLLM_API_KEYS_FILE: API key 2 "),
        (ALICE, "\xff", "--api-keys-file / SPEECHLLM_API_KEYS_FILE: {file} is not a text in UTF-8"),
        (ALICE, None, "--api-keys-file / SPEECHLLM_API_KEYS_FILE: {file}: No such file"),
    ],
)
def test_the_setting_that_has_a_bad_key_is_named(tmp_path, keys, in_file, told):
    file = tmp_path / "keys"
    if in_file is not None:
        file.write_text(in_file, encoding="latin-1")
    with pytest.raises(SettingError) as raised:
        KeyRing.from_settings(keys, str(file))
    assert str(raised.value).startswith(told.format(file=file))
    assert ALICE not in str(raised.value)


def test_a_key_may_have_only_so_many_running():
    limits = KeyLimits(max_concurrency=1, audio_s_per_minute=0.0)
    with limits.hold("alice", 1.0):
        with pytest.raises(RateLimitedError), limits.hold("alice", 1.0):
            pass
        with limits.hold("bob", 1.0):
            pass
    with limits.hold("alice", 1.0):
        pass


def test_seconds_of_audio_come_back_with_time():
    clock = Clock()
    limits = KeyLimits(max_concurrency=0, audio_s_per_minute=60.0, clock=clock)
    with limits.hold("alice", 90.0):
        pass
    with pytest.raises(RateLimitedError) as raised, limits.hold("alice", 1.0):
        pass
    assert raised.value.retry_after_s == 31.0
    with limits.hold("bob", 1.0):
        pass
    clock.now_s = raised.value.retry_after_s
    with limits.hold("alice", 1.0):
        pass


def test_a_charge_is_what_was_measured():
    clock = Clock()
    limits = KeyLimits(max_concurrency=0, audio_s_per_minute=60.0, clock=clock)
    with limits.hold("alice", 60.0) as charge:
        charge.measure(0.0)
    with limits.hold("alice", 0.0) as charge:
        charge.measure(59.0)
    with limits.hold("alice", 1.0):
        pass
    with pytest.raises(RateLimitedError), limits.hold("alice", 1.0):
        pass


def test_a_share_is_saved_up_for_a_minute_at_most():
    clock = Clock()
    limits = KeyLimits(max_concurrency=0, audio_s_per_minute=60.0, clock=clock)
    with limits.hold("alice", 0.0):
        pass
    clock.now_s = 3600.0
    with limits.hold("alice", 60.0):
        pass
    with pytest.raises(RateLimitedError), limits.hold("alice", 1.0):
        pass
