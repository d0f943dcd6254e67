"""The real application on a real, small checkpoint; only faults come from a scripted engine."""

import asyncio
import contextlib
import json
import re

import numpy as np
import pytest

from model.transcription import Transcriber
from server.app import build_engine, create_app
from server.audio.decode import decode
from server.audio.limits import AudioLimits
from server.engine.admission import Admission
from server.engine.interface import Capabilities, EngineResult, EngineStats
from server.errors import QueueFullError
from server.metrics import Metrics
from server.settings import Settings
from tests.integration.server.serving import error_of, serving, until_ready, upload
from tests.recordings import FORMATS, encode, speechlike, tone, with_wav_data_size

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def anyio_backend():
    return "asyncio"


@pytest.fixture(scope="module")
def settings(tiny_checkpoint):
    return Settings(
        model=str(tiny_checkpoint),
        device="cpu",
        decode_workers=1,
        max_upload_bytes=4_000_000,
        max_audio_s=20.0,
    )


@pytest.fixture(scope="module")
async def client(settings):
    async with serving(settings) as client:
        await until_ready(client)
        yield client


@pytest.mark.parametrize("form", FORMATS)
async def test_every_format_is_transcribed(client, form):
    recording = encode(tone(1.0, 48_000, channels=2), 48_000, form)
    response = await client.post("/transcribe", **upload(recording, "misleading.txt"))
    assert response.status_code == 200, response.text
    body = response.json()
    assert set(body) == {"text", "language", "duration", "timings"}
    assert body["duration"] == pytest.approx(1.0, abs=0.08)
    timings = body["timings"]
    assert set(timings) == {"decode", "queue", "encode", "generate", "total"}
    assert sum(timings.values()) - timings["total"] <= timings["total"]


async def test_the_answer_is_what_the_model_says_of_the_same_clip(client, settings):
    recordings = [encode(speechlike(seconds, seed=2)) for seconds in (1.0, 2.5, 4)]
    responses = await asyncio.gather(*(client.post("/transcribe", **upload(r)) for r in recordings))
    transcriber = Transcriber.from_pretrained(settings.model, "cpu")
    for recording, response in zip(recordings, responses, strict=True):
        clip = decode(recording, AudioLimits(30.0))
        (expected,) = transcriber.transcribe([clip.waveform]).transcripts
        assert response.json()["text"] == expected.text
        assert response.json()["language"] == expected.language


async def test_a_prompt_reaches_the_model(client, settings):
    recording = encode(speechlike(2.0, seed=2))
    response = await client.post("/transcribe", **upload(recording), data={"prompt": "Юу вэ?"})
    transcriber = Transcriber.from_pretrained(settings.model, "cpu")
    waveform = decode(recording, AudioLimits(30.0)).waveform
    (expected,) = transcriber.transcribe([waveform], prompt="Юу вэ?").transcripts
    assert response.json()["text"] == expected.text


INFINITE = np.full(16_000, np.inf, np.float32)
BAD_AUDIO = {
    "empty": (b"", 400, "audio_empty"),
    "no samples": (encode(np.zeros(0, np.float32)), 400, "audio_empty"),
    "text": (b"Dear Sir or Madam, " * 20, 415, "audio_unrecognised"),
    "truncated wav": (encode(tone(1.0))[:9_000], 400, "audio_truncated"),
    "truncated m4a": (encode(tone(1.0), form="m4a")[:3_000], 400, "audio_truncated"),
    "nan": (encode(tone(1.0) * np.nan, form="wav-float"), 400, "audio_not_finite"),
    "infinite": (encode(INFINITE, form="wav-float"), 400, "audio_not_finite"),
    "too long": (encode(tone(25.0)), 413, "audio_too_long"),
    "long, and its header does not say so": (
        with_wav_data_size(encode(tone(25.0)), 0xFFFFFFFF), 413, "audio_too_long",
    ),
    "hours in little": (encode(np.zeros(3600 * 16_000), form="flac"), 413, "audio_too_long"),
    "six channels": (encode(tone(0.1, channels=6)), 415, "audio_unsupported"),
    "rate of 1 kHz": (encode(tone(0.1, 1_000), 1_000), 415, "audio_unsupported"),
    "too large": (b"RIFF" + bytes(4_000_000), 413, "upload_too_large"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_AUDIO)
async def test_bad_audio_is_refused_with_a_reason_and_the_server_lives_on(client, case):
    data, status, code = BAD_AUDIO[case]
    response = await client.post("/transcribe", **upload(data))
    assert (response.status_code, error_of(response)["code"]) == (status, code)
    assert error_of(response)["param"] == "file"
    assert "Traceback" not in response.text
    again = await client.post("/transcribe", **upload(encode(tone(0.2))))
    assert again.status_code == 200


BOUNDARY = {"content-type": "multipart/form-data; boundary=x"}
BAD_FORMS = {
    "no body": ({}, None),
    "json": ({"json": {"file": "x"}}, None),
    "no file": ({"files": {"prompt": (None, "hi")}}, "file"),
    "file as text": ({"files": {"file": (None, "text")}}, "file"),
    "too many files": ({"files": [("file", ("a", b"a"))] * 33}, "file"),
    "a file for a text": ({"files": {"file": ("a", b"a"), "prompt": ("b", b"b")}}, "prompt"),
    "unknown query": ({"files": {"file": ("a", b"a")}, "params": {"lang": "mn"}}, "lang"),
    "said twice": (
        {"content": b"a", "headers": {"content-type": "audio/wav"}, "params": [("vad", "1")] * 2},
        "vad",
    ),
    "raw samples of no rate": (
        {"content": b"xx", "headers": {"content-type": "audio/pcm"}}, "rate",
    ),
    "raw samples of no number": (
        {"content": b"xx", "headers": {"content-type": "audio/pcm;rate=9e9"}}, "rate",
    ),
    "raw samples of no channels": (
        {"content": b"xx", "headers": {"content-type": "audio/pcm;rate=8000;channels=0"}},
        "channels",
    ),
    "unknown field": ({"files": {"file": ("a", b"a")}, "data": {"lang": "mn"}}, "lang"),
    "empty prompt": ({"files": {"file": ("a", b"a")}, "data": {"prompt": " "}}, "prompt"),
    "long prompt": ({"files": {"file": ("a", b"a")}, "data": {"prompt": "a" * 1001}}, "prompt"),
    "no boundary": ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, None),
    "broken form": ({"content": b"nonsense", "headers": BOUNDARY}, None),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FORMS)
async def test_a_form_that_is_not_right_is_refused_with_a_reason(client, case):
    arguments, param = BAD_FORMS[case]
    response = await client.post("/transcribe", **arguments)
    error = error_of(response)
    assert (response.status_code, error["code"]) == (400, "invalid_request")
    assert error["param"] == param


async def test_an_upload_may_have_all_the_bytes_that_are_allowed_and_no_more(client):
    headers = {"content-type": "audio/wav"}
    recording = encode(tone(1.0))
    recording += bytes(4_000_000 - len(recording))  # behind the samples, where a reader stops

    async def unannounced(content):
        yield content

    for announce in (bytes, unannounced):
        body = announce(recording)
        response = await client.post("/transcribe", content=body, headers=headers)
        assert response.status_code == 200, response.text
        body = announce(recording + b"0")
        response = await client.post("/transcribe", content=body, headers=headers)
        assert (response.status_code, error_of(response)["code"]) == (413, "upload_too_large")


async def test_an_upload_of_unannounced_size_is_cut_off_at_the_limit(client):
    sent = 0

    async def endless():
        nonlocal sent
        yield b'--x\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n'
        while True:
            sent += 65_536
            yield bytes(65_536)

    response = await client.post("/transcribe", content=endless(), headers=BOUNDARY)
    assert (response.status_code, error_of(response)["code"]) == (413, "upload_too_large")
    assert sent < 4 * 4_000_000


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [("GET", "/nope", 404, "not_found"), ("GET", "/transcribe", 405, "method_not_allowed")],
)
async def test_the_frameworks_own_errors_have_our_shape(client, method, path, status, code):
    response = await client.request(method, path)
    assert (response.status_code, error_of(response)["code"]) == (status, code)


async def test_a_given_request_id_comes_back_and_a_forged_one_does_not(client):
    response = await client.get("/health/live", headers={"X-Request-ID": "job-17.b"})
    assert response.headers["x-request-id"] == "job-17.b"
    response = await client.get("/health/live", headers={"X-Request-ID": "a b\tc"})
    assert re.fullmatch(r"[0-9a-f]{32}", response.headers["x-request-id"])


async def test_metrics_count_what_was_done_by_bounded_labels(client):
    await client.post("/transcribe", **upload(encode(tone(0.5))))
    await client.get("/some/path/nobody/knows")
    text = (await client.get("/metrics")).text
    assert 'speechllm_requests_total{endpoint="/transcribe",method="POST",status="200"}' in text
    assert 'endpoint="unmatched"' in text
    assert "nobody" not in text
    for stage in ("decode", "queue", "encode", "prefill", "first_token", "generate", "total"):
        assert f'speechllm_stage_seconds_count{{stage="{stage}"}}' in text


async def test_the_api_describes_itself(client):
    schema = (await client.get("/openapi.json")).json()
    form = schema["paths"]["/transcribe"]["post"]["requestBody"]["content"]["multipart/form-data"]
    assert form["schema"]["required"] == ["file"]
    assert schema["openapi"].startswith("3.1")
    assert "POST /transcribe" in (await client.get("/")).json()["endpoints"]


async def test_each_request_leaves_one_log_line(client, caplog):
    caplog.set_level("INFO", logger="speechllm.access")
    await client.post(
        "/transcribe", **upload(encode(tone(0.5))), headers={"X-Request-ID": "logged"}
    )
    (record,) = [r for r in caplog.records if r.name == "speechllm.access"]
    assert record.fields["request_id"] == "logged"
    assert (record.fields["status"], record.fields["audio_s"]) == (200, 0.5)
    assert json.dumps(record.fields)


class HeldEngine:
    """Starts when told, and fails or refuses as told."""

    capabilities = Capabilities(max_audio_s=30.0)

    def __init__(self):
        self.may_start = asyncio.Event()
        self.submitted = asyncio.Event()
        self.may_answer = asyncio.Event()
        self.refusal = None
        self.failure = None
        self.cancelled = 0
        self.is_alive = True
        self.death = asyncio.get_running_loop().create_future()

    async def start(self):
        await self.may_start.wait()
        if self.failure is not None:
            raise self.failure

    @contextlib.contextmanager
    def admit(self, audio_s):
        if self.refusal is not None:
            raise self.refusal
        yield Admission(max_requests=1, max_audio_s=60.0).take(audio_s)

    async def submit(self, request):
        self.submitted.set()
        if self.failure is not None:
            raise self.failure
        try:
            await self.may_answer.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return EngineResult("held", None, "stop", (5,), 0.0, 0.0, 0.0, 0.0, 0.0, 1)

    async def drain(self, timeout_s):
        pass

    async def stop(self):
        pass

    async def failed(self):
        return await self.death

    def stats(self):
        return EngineStats(
            alive=self.is_alive, admitted=0, admitted_audio_s=0.0, queued=0, running=0,
            running_audio_s=0.0, slots=1, kv_cache_bytes=0, rtfx=None,
        )  # fmt: skip


@pytest.fixture
async def held():
    engine = HeldEngine()
    async with serving(Settings(decode_workers=1), engine) as client:
        yield engine, client


async def test_the_process_is_alive_and_not_ready_while_the_model_loads(held):
    engine, client = held
    assert (await client.get("/health/live")).status_code == 200
    response = await client.get("/health/ready")
    assert response.status_code == 503
    assert response.json() == {"status": "loading", "reason": "the model is loading"}
    refused = await client.post("/transcribe", **upload(encode(tone(0.1))))
    assert (refused.status_code, error_of(refused)["code"]) == (503, "not_ready")

    engine.may_start.set()
    await until_ready(client)
    assert (await client.get("/health/ready")).status_code == 200


async def test_a_draining_server_finishes_and_takes_no_more(held):
    engine, client = held
    engine.may_start.set()
    await until_ready(client)
    work = asyncio.create_task(client.post("/transcribe", **upload(encode(speechlike(0.5)))))
    await engine.submitted.wait()
    client.app.state.runtime.begin_drain()
    assert (await client.get("/health/ready")).json()["status"] == "draining"
    refused = await client.post("/transcribe", **upload(encode(speechlike(0.5))))
    assert (refused.status_code, error_of(refused)["code"]) == (503, "shutting_down")
    engine.may_answer.set()
    assert (await work).json()["text"] == "held"


async def test_a_full_queue_answers_429_with_retry_after(held):
    engine, client = held
    engine.may_start.set()
    await until_ready(client)
    # Rounded up: who comes back a moment too early is refused again.
    for retry_after_s, seconds in ((7.0, "7"), (0.2, "1")):
        engine.refusal = QueueFullError("8 requests are waiting", retry_after_s=retry_after_s)
        response = await client.post("/transcribe", **upload(encode(speechlike(0.5))))
        assert (response.status_code, error_of(response)["code"]) == (429, "queue_full")
        assert response.headers["retry-after"] == seconds


async def test_an_unexpected_error_is_a_plain_500(held):
    engine, client = held
    engine.may_start.set()
    await until_ready(client)
    engine.failure = KeyError("secret detail")
    response = await client.post("/transcribe", **upload(encode(speechlike(0.5))))
    assert (response.status_code, error_of(response)["code"]) == (500, "internal_error")
    assert "secret" not in response.text


async def test_a_model_that_cannot_be_loaded_ends_the_process():
    engine = HeldEngine()
    engine.failure = ValueError("no such checkpoint")
    engine.may_start.set()
    failed = asyncio.Event()
    app = create_app(Settings(decode_workers=1), engine, on_failure=failed.set)
    async with app.router.lifespan_context(app):
        await asyncio.wait_for(failed.wait(), 30)
        assert app.state.runtime.state == "failed"
    assert str(app.state.runtime.failure) == "no such checkpoint"


async def test_a_dead_engine_turns_readiness_off_until_it_runs_again(held):
    engine, client = held
    engine.may_start.set()
    await until_ready(client)
    engine.is_alive = False
    response = await client.get("/health/ready")
    assert (response.status_code, response.json()["status"]) == (503, "failed")
    refused = await client.post("/transcribe", **upload(encode(speechlike(0.5))))
    assert (refused.status_code, error_of(refused)["code"]) == (503, "not_ready")
    engine.is_alive = True
    assert (await client.get("/health/ready")).status_code == 200


async def test_an_engine_that_has_died_for_good_ends_the_process():
    engine = HeldEngine()
    engine.may_start.set()
    failed = asyncio.Event()
    app = create_app(Settings(decode_workers=1), engine, on_failure=failed.set)
    async with app.router.lifespan_context(app):
        engine.death.set_result(RuntimeError("the device is gone"))
        await asyncio.wait_for(failed.wait(), 30)
        assert app.state.runtime.state == "failed"
    assert str(app.state.runtime.failure) == "the device is gone"


async def test_much_audio_at_once_is_refused_with_429_before_it_is_decoded(settings):
    crowded = settings.model_copy(
        update={"max_queue_audio_s": 5.0, "max_batch_size": 1, "max_wait_ms": 0.0}
    )
    async with serving(crowded) as client:
        await until_ready(client)
        clip = encode(speechlike(4.0, seed=2))
        responses = await asyncio.gather(
            *(client.post("/transcribe", **upload(clip)) for _ in range(8))
        )
        statuses = [response.status_code for response in responses]
        assert set(statuses) == {200, 429}
        refused = next(r for r in responses if r.status_code == 429)
        assert error_of(refused)["code"] == "queue_full"
        assert "s of audio are waiting" in error_of(refused)["message"]
        assert int(refused.headers["retry-after"]) >= 1


async def test_the_server_s_beams_overrule_the_checkpoint_s(tiny_checkpoint):
    settings = Settings(model=str(tiny_checkpoint), device="cpu", num_beams=3)
    engine = build_engine(settings, Metrics())
    await engine.start()
    try:
        assert engine.capabilities.num_beams == 3
    finally:
        await engine.stop()
