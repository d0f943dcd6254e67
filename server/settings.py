"""Every option of the server: a variable `SPEECHLLM_…` and a flag of `speechllm serve`.

The command line makes its flags and their help from the fields here.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

if TYPE_CHECKING:
    from collections.abc import Iterable

ENV_PREFIX = "SPEECHLLM_"

# The client reads the first, tests and benchmarks the second.
_OTHER_VARIABLES = frozenset({f"{ENV_PREFIX}API_KEY", f"{ENV_PREFIX}SHARED_DATA"})

_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
_ORIGIN = re.compile(r"https?://[A-Za-z0-9.\-\[\]:]+")


class Settings(BaseSettings):
    """Options of one server process."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True, extra="forbid")

    model: str = Field("weights/default", description="Checkpoint folder or hub id.")
    model_name: str = Field(
        "", description="Name in the API; empty takes the folder's, or the hub id."
    )
    model_aliases: str = Field(
        "whisper-1",
        description="Other names that requests may ask for the model by, separated by commas.",
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.")
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto", description="Of the weights; auto is bf16 on CUDA, fp32 on a CPU."
    )
    cpu_threads: int = Field(
        0,
        ge=0,
        le=1024,
        description="Threads that compute on the CPU; 0 takes all cores.",
    )
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")

    api_keys: SecretStr = Field(
        SecretStr(""),
        description="Keys that requests need one of, separated by commas, each key or name:key; "
        "none, and no file of keys, lets everybody in. Processes can be listed with their flags: "
        "prefer the variable or the file.",
    )
    api_keys_file: str = Field(
        "", description="File of further keys, one a line; lines that begin with # are skipped."
    )
    key_max_concurrency: int = Field(
        0, ge=0, description="Most transcriptions that one key may have running; 0 for any number."
    )
    key_audio_s_per_minute: float = Field(
        0.0,
        ge=0,
        description="Most seconds of audio that one key may send in a minute; 0 for any number.",
    )
    cors_origins: str = Field(
        "",
        description="Origins whose pages may call the server, separated by commas, or *; empty for "
        "none but its own.",
    )

    max_upload_bytes: int = Field(25 * 2**20, ge=1, description="Largest request body, bytes.")
    upload_idle_timeout_s: float = Field(
        30.0, gt=0, description="Longest pause in an upload, seconds; it is then refused."
    )
    max_uploads: int = Field(
        128,
        ge=1,
        description="Most uploads that are received at once, held in memory; more are refused with "
        "429.",
    )
    max_audio_s: float = Field(
        7200.0,
        gt=0,
        description="Longest recording, seconds of decoded audio; what the model cannot take in "
        "one piece is cut.",
    )
    max_excerpt_s: float = Field(
        15.0,
        ge=1,
        description="Longest piece of a recording that had to be cut, seconds; the model's own "
        "limit holds besides. No longer than the clips that the model was trained on.",
    )
    max_long_recordings: int = Field(
        4,
        ge=1,
        le=256,
        description="Most recordings under way that had to be cut; more are refused with 429.",
    )
    max_excerpts_in_flight: int = Field(
        8,
        ge=1,
        le=1024,
        description="Most pieces of one recording that wait or run; fewer leave others more room.",
    )
    max_channels: int = Field(2, ge=1, le=64, description="Most channels; they are averaged.")
    min_sample_rate_hz: int = Field(4_000, ge=1, description="Lowest sample rate taken, Hz.")
    max_sample_rate_hz: int = Field(192_000, ge=1, description="Highest sample rate taken, Hz.")
    decode_workers: int = Field(2, ge=1, le=256, description="Processes that decode uploads.")
    decode_timeout_s: float = Field(
        20.0,
        gt=0,
        description="Longest decoding of half a minute of an upload, seconds; its process is then "
        "ended.",
    )

    front_ends: int = Field(
        1,
        ge=1,
        le=64,
        description="Processes that take in requests and decode uploads for one engine; more than "
        "one where one cannot keep a GPU busy. The engine then has a process of its own, and the "
        "decoding processes are shared out.",
    )

    max_batch_size: int = Field(
        32,
        ge=1,
        le=1024,
        description="Most clips that are decoded together; every beam of a search counts as one.",
    )
    max_wait_ms: float = Field(
        0.0,
        ge=0,
        le=10_000,
        description="Longest that a request waits for others to start with it, milliseconds; "
        "0 takes what is there.",
    )
    preferred_batch_sizes: str = Field(
        "",
        description="Numbers of clips, separated by commas; the largest that waits starts at once, "
        "whatever the longest wait.",
    )
    max_batch_audio_s: float = Field(
        0.0,
        ge=0,
        description="Most seconds of audio encoded while clips that are being decoded wait, "
        "padding included; 0 takes 240 on CUDA, and 30 on a CPU.",
    )
    kv_cache_mib: int = Field(
        0,
        ge=0,
        description="Memory for the keys and values of running clips, MiB; 0 takes 60 % of what "
        "the weights leave on CUDA, and at most 2048 on a CPU.",
    )
    num_beams: int = Field(
        0,
        ge=0,
        le=8,
        description="Beams of the search for an answer whose request does not say, unless it is "
        "streamed; 1 for none, which is fastest, 0 takes what the checkpoint's "
        "generation_config.json says.",
    )
    loop_guard: bool = Field(
        True,
        description="Decode a text that repeats itself again under a penalty, and cut it if that "
        "does not help.",
    )
    cuda_graphs: bool = Field(
        True,
        description="On a CUDA device, record the encoder, and what LLMs built like Llama do, as "
        "CUDA graphs.",
    )
    silence_gate: bool = Field(
        True,
        description="Answer a clip that is nowhere louder than -60 dBFS with an empty text, "
        "without the model.",
    )
    max_queue_size: int = Field(
        128,
        ge=1,
        description="Most requests that may be decoding or waiting; more are refused with 429.",
    )
    max_queue_audio_s: float = Field(
        1800.0,
        gt=0,
        description="Most seconds of audio that may be decoding or waiting; more is refused with "
        "429.",
    )
    request_timeout_s: float = Field(
        120.0,
        gt=0,
        description="From the upload's end until a request is given up, seconds; each piece of a "
        "recording that was cut has as much longer as it lies behind the beginning.",
    )
    drain_timeout_s: float = Field(
        30.0, ge=0, description="After SIGTERM, longest wait for requests in flight, seconds."
    )

    realtime_max_sessions: int = Field(
        32, ge=0, description="Most live sessions at once; more are refused with 429."
    )
    realtime_max_session_s: float = Field(
        3600.0, gt=0, description="Longest live session, seconds."
    )
    realtime_idle_timeout_s: float = Field(
        60.0, gt=0, description="Longest pause in what a live session's client sends, seconds."
    )
    realtime_max_buffer_s: float = Field(
        60.0,
        ge=1,
        description="Most audio that a live session holds untranscribed, seconds; what comes "
        "beyond is refused.",
    )
    realtime_partial_interval_ms: int = Field(
        600,
        ge=0,
        description="Audio between two transcripts of a turn that goes on, milliseconds; 0 for "
        "none before its end.",
    )

    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe log line that is written."
    )

    @field_validator("device")
    @classmethod
    def _check_device(cls, value: str) -> str:
        if not _DEVICE.fullmatch(value):
            raise ValueError(f"a device is auto, cpu, cuda or cuda:N, not {value!r}")
        return value

    @field_validator("preferred_batch_sizes")
    @classmethod
    def _check_sizes(cls, value: str) -> str:
        if not all(size >= 1 for size in _sizes(value)):
            raise ValueError(f"sizes are at least 1, got {value!r}")
        return value

    @field_validator("num_beams")
    @classmethod
    def _check_beams(cls, value: int, info: ValidationInfo) -> int:
        places = info.data.get("max_batch_size", value)
        if value > places:
            raise ValueError(f"every beam takes a place of --max-batch-size, which is {places}")
        return value

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, value: str) -> str:
        for origin in _parts(value):
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"an origin is scheme://host or scheme://host:port, not {origin!r}"
                )
        return value

    @property
    def served_name(self) -> str:
        """The model's name in the API."""
        folder = Path(self.model).expanduser()
        return self.model_name or (folder.resolve().name if folder.is_dir() else self.model)

    @property
    def aliases(self) -> tuple[str, ...]:
        """Its other names."""
        return _parts(self.model_aliases)

    @property
    def origins(self) -> tuple[str, ...]:
        """Whose pages may call the server."""
        return _parts(self.cors_origins)

    @property
    def preferred_sizes(self) -> tuple[int, ...]:
        """The preferred batch sizes as numbers."""
        return _sizes(self.preferred_batch_sizes)


class SettingError(ValueError):
    """A setting has a value that cannot be; the message names its flag and its variable."""

    def __init__(self, field: str, reason: str) -> None:
        """Give the field of Settings, and what is wrong with its value."""
        super().__init__(f"{flag_of(field)} / {variable_of(field)}: {reason}")


def read_settings(**given: Any) -> Settings:  # noqa: ANN401 - as many types as fields
    """Make settings of what is given, the environment and the defaults, in this order.

    Raises:
        SettingError: a value is out of bounds; of several, the first is told of.
    """
    try:
        return Settings(**given)
    except ValidationError as error:
        first = error.errors()[0]
        reason = first["msg"].removeprefix("Value error, ")
        raise SettingError(str(first["loc"][0]), reason) from error


def flag_of(field: str) -> str:
    """The flag of `speechllm serve` that sets a field."""
    return f"--{field.replace('_', '-')}"


def variable_of(field: str) -> str:
    """The environment variable that sets a field."""
    return f"{ENV_PREFIX}{field.upper()}"


def unknown_variables(names: Iterable[str]) -> dict[str, str | None]:
    """Find variables that look like settings and set nothing.

    Args:
        names: of the environment's variables; capitals make no difference, as in reading settings.

    Returns:
        Each such name with that of the setting that may be meant, None where none is close.
    """
    known = _OTHER_VARIABLES.union(map(variable_of, Settings.model_fields))
    return {
        name: _closest_variable(name)
        for name in sorted(names)
        if name.upper().startswith(ENV_PREFIX) and name.upper() not in known
    }


def _closest_variable(name: str) -> str | None:
    # Without the prefix, which would make any two of them alike.
    rest = name[len(ENV_PREFIX) :].lower()
    found = difflib.get_close_matches(rest, Settings.model_fields, n=1)
    return variable_of(found[0]) if found else None


def _parts(value: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.split(",") if part.strip())


def _sizes(value: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in _parts(value))
    except ValueError as error:
        raise ValueError(f"not whole numbers separated by commas: {value!r}") from error
