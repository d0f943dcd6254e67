"""API keys: whose a request is, and how much of the server its key may use. Knows no HTTP."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import math
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

from server.board import Bucket, Tally
from server.errors import ApiKeyError, RateLimitedError
from server.settings import SettingError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ANONYMOUS = "anonymous"
"""Whose a request is where no keys are configured."""

MIN_KEY_CHARACTERS = 16

_ENTRY = re.compile(
    r"(?:(?P<name>[A-Za-z0-9_-]{1,64}):)?"
    rf"(?P<key>[A-Za-z0-9._~+/=-]{{{MIN_KEY_CHARACTERS},512}})"
)
_RETRY_CONCURRENCY_S = 1.0


class KeyRing:
    """The keys that are taken, by the names of their owners; only digests are kept."""

    def __init__(self, entries: list[str]) -> None:
        """Take entries `key` or `name:key`.

        Raises:
            ValueError: an entry is neither, or a name or key comes twice; says which by number,
                since an entry may be a secret.
        """
        self._names: dict[bytes, str] = {}
        for number, entry in enumerate(entries, start=1):
            match = _ENTRY.fullmatch(entry)
            if match is None:
                raise ValueError(
                    f"API key {number} is not a key or name:key of letters, digits and ._~+/=-, "
                    f"at least {MIN_KEY_CHARACTERS} characters long"
                )
            name, digest = match["name"] or f"key-{number}", _digest(match["key"])
            if digest in self._names or name in self._names.values():
                raise ValueError(f"API key {number} or its name is there twice")
            self._names[digest] = name

    @classmethod
    def from_settings(cls, keys: str, path: str) -> KeyRing:
        """Gather keys from a list separated by commas and from a file, one a line.

        Raises:
            SettingError: an entry is not right, or the file has none or cannot be read.
        """
        listed = [key.strip() for key in keys.split(",") if key.strip()]
        in_file = _read_keys(path) if path else []
        try:
            cls(listed)  # first by itself, so that a fault is told of where it lies
        except ValueError as error:
            raise SettingError("api_keys", str(error)) from error
        try:
            return cls([*listed, *in_file])
        except ValueError as error:
            raise SettingError("api_keys_file", str(error)) from error

    @property
    def owners(self) -> list[str]:
        """Whose requests there can be."""
        return list(self._names.values()) or [ANONYMOUS]

    def __len__(self) -> int:
        """Return how many keys are taken; none means that everybody may come."""
        return len(self._names)

    def owner(self, key: str | None) -> str:
        """Return whose a key is, in a time that does not depend on it.

        Raises:
            ApiKeyError: it is nobody's, or missing.
        """
        if not self._names:
            return ANONYMOUS
        if key is None:
            raise ApiKeyError("send an API key: Authorization: Bearer <key>")
        digest, found = _digest(key), None
        for known, name in self._names.items():
            if hmac.compare_digest(known, digest):
                found = name
        if found is None:
            raise ApiKeyError("the API key is not one that this server knows")
        return found


def _read_keys(path: str) -> list[str]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise SettingError("api_keys_file", f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SettingError("api_keys_file", f"{path} is not a text in UTF-8") from error
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:  # without keys, everybody would be let in
        raise SettingError("api_keys_file", f"the file of API keys {path} holds none")
    return keys


def _digest(key: str) -> bytes:
    # Keys are long and random, so that a fast hash is enough; and it makes all equally long.
    return hashlib.sha256(key.encode()).digest()


class Charge:
    """What a transcription costs its key."""

    def __init__(self, bucket: Bucket, audio_s: float) -> None:
        """Made by `KeyLimits.hold`."""
        self._bucket = bucket
        self._audio_s = 0.0
        self.measure(audio_s)

    def measure(self, audio_s: float) -> None:
        """Correct the length that was assumed."""
        with self._bucket.opened() as cells:
            cells[0] -= audio_s - self._audio_s
        self._audio_s = audio_s


class KeyLimits:
    """What each key may use: transcriptions at once, and seconds of audio a minute."""

    def __init__(
        self,
        *,
        max_concurrency: int,
        audio_s_per_minute: float,
        use_of: Callable[[str], tuple[Tally, Bucket]] = lambda _owner: (Tally(), Bucket()),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin with every key's share whole.

        Args:
            max_concurrency: transcriptions at once; 0 for any number.
            audio_s_per_minute: seconds of audio; 0 for any number.
            use_of: where a key's transcriptions and audio are counted; asked once for each key.
            clock: monotonic seconds, the same in all processes that count together.
        """
        self._max_concurrency = max_concurrency
        self._per_minute_s = audio_s_per_minute
        self._use_of = use_of
        self._clock = clock
        self._uses: dict[str, tuple[Tally, Bucket]] = {}

    @contextlib.contextmanager
    def hold(self, owner: str, audio_s: float) -> Iterator[Charge]:
        """Count a transcription in for as long as it takes.

        A key goes into debt by at most what it has running: a clip longer than a minute's share is
        transcribed, and the key waits for it afterwards.

        Args:
            owner: of the key.
            audio_s: length of the clip as far as it is known; the charge corrects it.

        Raises:
            RateLimitedError: the share is used up; says when to come back.
        """
        if owner not in self._uses:
            self._uses[owner] = self._use_of(owner)
        running, bucket = self._uses[owner]
        level_s = self._refill(bucket)
        if self._per_minute_s and level_s <= 0:
            wait_s = 60 * -level_s / self._per_minute_s
            raise RateLimitedError(
                f"this key's {self._per_minute_s:g} s of audio a minute are used up",
                retry_after_s=math.floor(wait_s) + 1.0,
            )
        if self._max_concurrency and running.total >= self._max_concurrency:
            raise RateLimitedError(
                f"this key has {self._max_concurrency} transcriptions running, the most it may",
                retry_after_s=_RETRY_CONCURRENCY_S,
            )
        running.add(1)
        try:
            yield Charge(bucket, audio_s)
        finally:
            running.add(-1)

    def _refill(self, bucket: Bucket) -> float:
        """Let what time has earned flow in, and return what there is, seconds."""
        now_s = self._clock()
        with bucket.opened() as cells:
            level_s, updated_s, is_used = cells
            earned_s = (now_s - updated_s) * self._per_minute_s / 60
            level_s = min(self._per_minute_s, level_s + earned_s) if is_used else self._per_minute_s
            cells[:] = level_s, now_s, 1.0
        return float(level_s)
