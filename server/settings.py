"""Every option of the server: a variable `SPEECHLLM_…` and a flag of `speechllm serve`.

The command line makes its flags and their help from the fields here.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

ENV_PREFIX = "SPEECHLLM_"


class Settings(BaseSettings):
    """Options of one server process."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True, extra="forbid")

    model: str = Field("weights/default", description="Checkpoint folder or hub id.")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.")
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto", description="Of the weights; auto is bf16 on CUDA, fp32 on a CPU."
    )
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")

    max_upload_bytes: int = Field(25 * 2**20, ge=1, description="Largest request body, bytes.")
    upload_idle_timeout_s: float = Field(
        30.0, gt=0, description="Longest pause in an upload, seconds; it is then refused."
    )
    max_audio_s: float = Field(
        30.0,
        gt=0,
        description="Longest clip, seconds of decoded audio; the model's own limit holds besides.",
    )
    max_channels: int = Field(2, ge=1, le=64, description="Most channels; they are averaged.")
    min_sample_rate_hz: int = Field(4_000, ge=1, description="Lowest sample rate taken, Hz.")
    max_sample_rate_hz: int = Field(192_000, ge=1, description="Highest sample rate taken, Hz.")
    decode_workers: int = Field(2, ge=1, le=256, description="Processes that decode uploads.")
    decode_timeout_s: float = Field(
        20.0,
        gt=0,
        description="Longest decoding of one upload, seconds; its process is then ended.",
    )

    max_batch_size: int = Field(16, ge=1, le=1024, description="Most clips in a batch.")
    max_wait_ms: float = Field(
        0.0,
        ge=0,
        le=10_000,
        description="Longest that the oldest request waits for its batch to fill, milliseconds; "
        "0 takes what is there.",
    )
    max_batch_audio_s: float = Field(
        240.0, gt=0, description="Most seconds of audio in a batch, padding included."
    )
    max_queue_size: int = Field(
        128,
        ge=1,
        description="Most requests that may be decoding or waiting; more are refused with 429.",
    )
    request_timeout_s: float = Field(
        120.0, gt=0, description="From the upload's end until a waiting request gives up, seconds."
    )
    drain_timeout_s: float = Field(
        30.0, ge=0, description="After SIGTERM, longest wait for requests in flight, seconds."
    )

    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe log line that is written."
    )
