"""Options, formats, streaming, keys and headers of the real application."""

import asyncio
import contextlib
import io
import json
import struct

import numpy as np
import pytest
import srt
import webvtt

from server.engine.admission import Admission
from server.engine.decoding import Token
from server.engine.interface import Capabilities, EngineResult, EngineStats, Piece
from server.errors import InferenceFailedError
from server.settings import Settings
from tests.integration.server.serving import error_of, serving, until_ready, upload
from tests.recordings import encode, speechlike, tone

pytestmark = pytest.mark.anyio

CLIP = encode(speechlike(1.5))
ALICE, BOB = "alice-0123456789abcdef", "bob-0123456789abcdefgh"


@pytest.fixture(scope="module")
def anyio_backend():
    return "asyncio"


@pytest.fixture(scope="module")
def settings(tiny_checkpoint):
    return Settings(model=str(tiny_checkpoint), device="cpu", decode_workers=1, max_audio_s=30)


@pytest.fixture(scope="module")
async def client(settings):
    async with serving(settings) as client:
        await until_ready(client)
        yield client


async def ask(client, data=CLIP, **fields):
    return await client.post("/transcribe", **upload(data), data=fields)


def read_vtt(text):
    return webvtt.from_buffer(io.StringIO(text)).captions


def frames_of(text):
    blocks = text.split("\n\n")
    assert blocks.pop() == ""
    assert all(block.startswith("data: ") for block in blocks)
    return [block.removeprefix("data: ") for block in blocks]


@pytest.fixture(scope="module")
async def plain(client):
    response = await ask(client)
    assert response.status_code == 200
    assert response.json()["text"]
    return response.json()


@pytest.mark.parametrize(
    ("form", "media_type"),
    [
        ("text", "text/plain; charset=utf-8"),
        ("srt", "application/x-subrip; charset=utf-8"),
        ("vtt", "text/vtt; charset=utf-8"),
        ("tsv", "text/tab-separated-values; charset=utf-8"),
    ],
)
async def test_a_file_says_what_json_says(client, plain, form, media_type):
    response = await ask(client, response_format=form)
    assert response.status_code == 200
    assert response.headers["content-type"] == media_type
    text = {
        "text": lambda body: body,
        "srt": lambda body: " ".join(cue.content for cue in srt.parse(body)),
        "vtt": lambda body: " ".join(cue.text for cue in read_vtt(body)),
        "tsv": lambda body: " ".join(row.split("\t")[2] for row in body.splitlines()[1:]),
    }[form](response.text)  # fmt: skip
    letters = [c for c in plain["text"] if c.isalnum()]
    assert [c for c in text if c.isalnum()] == letters


async def test_verbose_json_has_segments_and_how_sure_the_model_was(client, plain):
    body = (await ask(client, response_format="verbose_json")).json()
    (segment,) = body["segments"]
    assert body["text"] == segment["text"] == plain["text"]
    assert 0 <= segment["start"] < 0.1  # where the voice begins
    assert segment["end"] == body["duration"]
    assert segment["avg_logprob"] < 0
    assert set(body["timings"]) == set(plain["timings"])


async def test_what_is_asked_for_is_there_and_nothing_else(client, plain):
    body = (await ask(client, timestamps="segment", logprobs="true")).json()
    assert set(body) == {*plain, "alignment", "segments", "logprobs"}
    assert set(body["segments"][0]) == {"start", "end", "text", "finish_reason"}
    words = (await ask(client, timestamps="word")).json()["segments"][0]
    assert set(words) == {"start", "end", "text", "finish_reason", "words"}
    spelt = b"".join(bytes(each["bytes"]) for each in body["logprobs"])
    assert spelt.decode(errors="replace").strip() == plain["text"]
    assert all(each["logprob"] <= 0 for each in body["logprobs"])


async def test_the_n_best_answers_come_with_their_scores(client):
    body = (await ask(client, n_best="3")).json()
    (segment,) = body["segments"]
    scores = [each["score"] for each in segment["hypotheses"]]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)
    assert segment["hypotheses"][0]["text"] == body["text"]


async def test_beams_cannot_be_streamed(client):
    response = await ask(client, num_beams="2", stream="true")
    assert (response.status_code, error_of(response)["param"]) == (400, "num_beams")


async def test_the_recording_may_be_the_body(client, plain):
    response = await client.post(
        "/transcribe",
        params={"response_format": "text"},
        content=CLIP,
        headers={"content-type": "audio/wav"},
    )
    assert response.text == plain["text"] + "\n"


async def test_options_of_a_form_may_be_in_the_query_and_the_forms_own_go_first(client, plain):
    query = {"response_format": "srt", "vad": "false"}
    response = await client.post("/transcribe", **upload(CLIP), params=query)
    assert response.text.startswith("1\n00:00:00,000 --> ")
    response = await client.post(
        "/transcribe", **upload(CLIP), params=query, data={"response_format": "text"}
    )
    assert response.text == plain["text"] + "\n"


@pytest.mark.parametrize(
    "media_type", ["audio/pcm;rate=16000", 'audio/pcm; rate="16000"; channels=1']
)
async def test_raw_samples_are_what_a_file_of_them_is(client, plain, media_type):
    samples = CLIP[CLIP.index(b"data") + 8 :]
    response = await client.post(
        "/transcribe", content=samples, headers={"content-type": media_type}
    )
    assert response.json()["text"] == plain["text"]
    assert response.json()["duration"] == plain["duration"]


@pytest.mark.parametrize(
    ("media_type", "content", "status", "code"),
    [
        ("audio/pcm;rate=16000", b"abc", 400, "audio_truncated"),
        ("audio/pcm;rate=16000", b"", 400, "audio_empty"),
        ("audio/pcm;rate=16000;channels=3", bytes(6000), 415, "audio_unsupported"),
        ("audio/pcm;rate=999", bytes(6000), 415, "audio_unsupported"),
        ("audio/pcm;rate=4000", bytes(8000 * 31), 413, "audio_too_long"),
        ("audio/wav", b"", 400, "audio_empty"),
        ("application/json", b"{}", 400, "invalid_request"),
        ("", b"x", 400, "invalid_request"),
    ],
)
async def test_bodies_that_are_no_recording_are_refused(client, media_type, content, status, code):
    response = await client.post(
        "/transcribe", content=content, headers={"content-type": media_type}
    )
    assert (response.status_code, error_of(response)["code"]) == (status, code)


async def test_several_files_are_answered_in_order_each_for_itself(client, plain):
    other = encode(speechlike(0.7, seed=3))
    files = [("file", (name, data)) for name, data in
             [("a", CLIP), ("b", b"no audio" * 9), ("c", other), ("d", CLIP)]]  # fmt: skip
    response = await client.post("/transcribe", files=files)
    assert response.status_code == 200
    first, second, third, fourth = response.json()["results"]
    assert set(first) == set(plain)
    assert first["text"] == fourth["text"] == plain["text"]
    assert second["error"]["code"] == "audio_unrecognised"
    assert third["duration"] == pytest.approx(0.7)


@pytest.mark.parametrize(
    "fields", [{"stream": "true"}, {"progress": "true"}, {"response_format": "srt"}]
)
async def test_several_files_are_answered_in_json_only(client, fields):
    files = [("file", ("a", CLIP)), ("file", ("b", CLIP))]
    response = await client.post("/transcribe", files=files, data=fields)
    assert (response.status_code, error_of(response)["param"]) == (400, next(iter(fields)))


async def test_a_language_the_checkpoint_does_not_name_is_refused(client):
    response = await ask(client, language="de")
    assert (response.status_code, error_of(response)["code"]) == (400, "language_unsupported")
    assert "en, mn" in error_of(response)["message"]
    assert (await ask(client, language="mn")).json()["language"] == "mn"


async def test_a_deadline_that_cannot_be_kept_is_504(client):
    response = await ask(client, encode(speechlike(20.0)), deadline_ms="1")
    assert (response.status_code, error_of(response)["code"]) == (504, "deadline_exceeded")


async def test_a_stream_tells_the_text_piece_by_piece_and_whole(client, plain):
    response = await ask(client, stream="true")
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, end = frames_of(response.text)
    assert end == "[DONE]"
    *deltas, done = (json.loads(event) for event in events)
    assert len(deltas) > 1
    assert {delta["type"] for delta in deltas} == {"transcript.text.delta"}
    assert "".join(delta["delta"] for delta in deltas) == done["text"]
    assert done["type"] == "transcript.text.done"
    assert done["usage"] == {"type": "duration", "seconds": plain["duration"]}


async def test_a_stream_that_fails_before_its_first_word_has_a_status(client):
    response = await ask(client, b"no audio" * 9, stream="true")
    assert (response.status_code, error_of(response)["code"]) == (415, "audio_unrecognised")


async def test_problem_details_come_to_who_asks_for_them(client):
    headers = {"Accept": "application/problem+json"}
    response = await client.post("/transcribe", **upload(b""), headers=headers)
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert (body["status"], body["title"], body["code"]) == (400, "Bad Request", "audio_empty")
    assert body["request_id"] == response.headers["x-request-id"]


@pytest.mark.parametrize("path", ["/", "/docs", "/openapi.json", "/nope", "/health/live"])
async def test_every_answer_has_safe_headers(client, path):
    headers = (await client.get(path)).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["x-frame-options"] == "DENY"
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none'")
    assert "unsafe-eval" not in policy


async def test_the_viewer_of_the_api_loads_nothing_from_elsewhere(client):
    page = (await client.get("/docs")).text
    assert "//" not in page.replace("<!doctype", "")
    for path in ("swagger-ui-bundle.js", "swagger-ui.css", "start.js", "favicon.png"):
        assert (await client.get(f"/docs/{path}")).status_code == 200
    assert (await client.get("/docs/core.py")).status_code == 422
    bundle = (await client.get("/docs/swagger-ui-bundle.js")).text
    assert 'PACKAGE_VERSION:"5.' in bundle  # OpenAPI 3.1 is shown from version 5 on


async def test_other_origins_may_not_call_unless_they_are_named(client, settings):
    origin = {"Origin": "https://app.example.org"}
    assert "access-control-allow-origin" not in (await client.get("/", headers=origin)).headers
    named = settings.model_copy(
        update={"cors_origins": origin["Origin"], "api_keys": Settings(api_keys=ALICE).api_keys}
    )
    preflight = origin | {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,x-stainless-os",
    }
    async with serving(named, ScriptedEngine([])) as other:
        allowed = await other.options("/transcribe", headers=preflight)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == origin["Origin"]
        refused = await other.post("/transcribe", headers=origin, **upload(CLIP))
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == origin["Origin"]
        stranger = await other.options(
            "/transcribe", headers=preflight | {"Origin": "https://evil.example.org"}
        )
        assert "access-control-allow-origin" not in stranger.headers


class ScriptedEngine:
    """Tells pieces, then fails, answers or waits, as told."""

    capabilities = Capabilities(max_audio_s=30.0)

    def __init__(self, pieces, end="stop"):
        self.pieces = pieces
        self.end = end
        self.told = asyncio.Event()
        self.may_end = asyncio.Event()
        self.submitted = []

    async def start(self):
        pass

    @contextlib.contextmanager
    def admit(self, audio_s):
        yield Admission(max_requests=1, max_audio_s=60.0).take(audio_s)

    async def submit(self, request):
        self.submitted.append(request.id)
        for piece in self.pieces:
            if request.on_piece is not None:
                request.on_piece(Piece(piece, Token(5), None))
        self.told.set()
        if isinstance(self.end, Exception):
            raise self.end
        if self.end == "wait":
            await self.may_end.wait()
        return EngineResult("".join(self.pieces), None, "stop", (5,), 0, 0, 0, 0, 0, 1)

    async def drain(self, timeout_s):
        pass

    async def stop(self):
        pass

    async def failed(self):
        return await asyncio.get_running_loop().create_future()

    def stats(self):
        return EngineStats(
            alive=True, admitted=0, admitted_audio_s=0.0, queued=0, running=0,
            running_audio_s=0.0, slots=1, kv_cache_bytes=0, rtfx=None,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InferenceFailedError("the model failed on this audio"), "inference_failed"),
        (KeyError("secret detail"), "internal_error"),
    ],
)
async def test_a_stream_that_fails_midway_says_so_and_does_not_end_well(error, code):
    engine = ScriptedEngine(["Where ", "did"], error)
    async with serving(Settings(decode_workers=1), engine) as client:
        await until_ready(client)
        response = await ask(client, stream="true")
        first, second, last = frames_of(response.text)
        assert json.loads(first)["delta"] + json.loads(second)["delta"] == "Where did"
        assert json.loads(last)["error"]["code"] == code
        assert "secret" not in response.text
        metrics = (await client.get("/metrics")).text
        assert f'speechllm_requests_refused_total{{code="{code}"}} 1.0' in metrics


async def test_a_stream_of_a_long_recording_says_how_far_it_is():
    engine = ScriptedEngine(["word"])
    engine.capabilities = Capabilities(max_audio_s=2.0)
    recording = upload(encode(speechlike(6.0)))
    async with serving(Settings(decode_workers=1), engine) as client:
        await until_ready(client)
        response = await client.post("/transcribe", **recording, data={"stream": "true"})
        *frames, end = frames_of(response.text)
        assert end == "[DONE]"
        events = [json.loads(frame) for frame in frames]
        progress = [each for each in events if each["type"] == "transcript.progress"]
        assert len(progress) == len(engine.submitted) > 2
        assert {each["duration"] for each in progress} == {6.0}
        processed_s = [each["processed"] for each in progress]
        assert processed_s == sorted(set(processed_s))
        assert 4.0 < processed_s[-1] <= 6.0
        # OpenAI's API has no such event.
        response = await client.post(
            "/v1/audio/transcriptions", **recording, data={"stream": "true"}
        )
        kinds = {json.loads(frame)["type"] for frame in frames_of(response.text)[:-1]}
        assert kinds == {"transcript.text.delta", "transcript.text.done"}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"response_format": "srt"},
        {"response_format": "verbose_json"},
        {"response_format": "text", "num_beams": "2"},  # which no stream of text takes
        {"n_best": "2", "timestamps": "word"},
    ],
)
async def test_behind_its_progress_comes_the_plain_answer_whatever_was_asked(client, fields):
    recording = encode(speechlike(29.0))
    expected = await ask(client, recording, **fields)
    response = await ask(client, recording, progress="true", **fields)
    assert response.headers["content-type"].startswith("text/event-stream")
    *progress, done, end = frames_of(response.text)
    assert end == "[DONE]"
    assert {json.loads(each)["type"] for each in progress} <= {"transcript.progress"}
    event = json.loads(done)
    assert set(event) == {"type", "body"}
    assert event["type"] == "transcript.done"
    if expected.headers["content-type"] != "application/json":
        assert event["body"] == expected.text
    else:
        body = json.loads(event["body"])
        assert list(body) == list(expected.json())
        assert body | {"timings": None} == expected.json() | {"timings": None}


async def test_of_a_long_recording_its_progress_is_told_without_its_text():
    engine = ScriptedEngine(["word"])
    engine.capabilities = Capabilities(max_audio_s=2.0)
    async with serving(Settings(decode_workers=1), engine) as client:
        await until_ready(client)
        response = await ask(client, encode(speechlike(6.0)), progress="true")
        *progress, done = map(json.loads, frames_of(response.text)[:-1])
        assert {each["type"] for each in progress} == {"transcript.progress"}
        assert len(progress) == len(engine.submitted) > 2
        assert json.loads(done["body"])["text"] == " ".join(["word"] * len(engine.submitted))


async def test_progress_that_fails_before_its_first_event_has_a_status(client):
    response = await ask(client, b"no audio" * 9, progress="true")
    assert (response.status_code, error_of(response)["code"]) == (415, "audio_unrecognised")


async def test_a_checkpoint_without_a_prompt_is_asked_nothing():
    engine = ScriptedEngine(["word"])
    engine.capabilities = Capabilities(max_audio_s=30.0, takes_prompt=False)
    async with serving(Settings(decode_workers=1), engine) as client:
        await until_ready(client)
        for path in ("/transcribe", "/v1/audio/transcriptions"):
            response = await client.post(path, **upload(CLIP), data={"prompt": "What?"})
            assert response.status_code == 400
            assert error_of(response)["param"] == "prompt"
        assert engine.submitted == []


@pytest.mark.parametrize("field", ["hotwords", "previous_text", "condition_on_previous_text"])
async def test_what_the_checkpoint_was_not_trained_with_is_refused(client, field):
    response = await ask(client, **{field: "true"})
    assert response.status_code == 400
    error = error_of(response)
    assert (error["code"], error["param"]) == ("invalid_request", field)
    assert "this checkpoint takes no" in error["message"]


@pytest.fixture
async def guarded():
    settings = Settings(
        decode_workers=1,
        api_keys=f"alice:{ALICE},{BOB}",
        key_max_concurrency=1,
        key_audio_s_per_minute=4.0,
    )
    engine = ScriptedEngine([], "wait")
    async with serving(settings, engine) as client:
        await until_ready(client)
        yield engine, client


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    "headers",
    [{}, bearer(""), bearer("alice-0123456789abcdeX"), {"Authorization": f"Basic {ALICE}"}],
)
async def test_without_a_key_nothing_but_health_and_metrics_is_answered(guarded, headers):
    _, client = guarded
    for path in ("/transcribe", "/v1/audio/transcriptions", "/v1/audio/translations"):
        response = await client.post(path, **upload(CLIP), headers=headers)
        assert (response.status_code, error_of(response)["code"]) == (401, "invalid_api_key")
        assert response.headers["www-authenticate"] == "Bearer"
    for path in ("/v1/models", "/v1/models/whisper-1"):
        assert (await client.get(path, headers=headers)).status_code == 401
    for path in ("/health/live", "/health/ready", "/metrics", "/docs", "/openapi.json"):
        assert (await client.get(path, headers=headers)).status_code == 200


async def test_a_key_is_held_to_its_share_and_others_are_not(guarded):
    engine, client = guarded
    post = lambda key: client.post("/transcribe", **upload(CLIP), headers=bearer(key))  # noqa: E731 - short, and used in this test alone
    running = asyncio.create_task(post(ALICE))
    await engine.told.wait()
    second = await post(ALICE)
    assert (second.status_code, error_of(second)["code"]) == (429, "rate_limit_exceeded")
    assert second.headers["retry-after"] == "1"
    others = asyncio.create_task(post(BOB))
    engine.may_end.set()
    assert [r.status_code for r in await asyncio.gather(running, others)] == [200, 200]

    # 4 s a minute at 1.5 s a clip: the third one goes into debt, the fourth has to wait.
    assert [(await post(ALICE)).status_code for _ in range(3)] == [200, 200, 429]


async def test_a_recording_that_fails_costs_its_key_nothing(guarded):
    engine, client = guarded
    engine.may_end.set()
    broken = encode(np.full(16_000 * 10, np.nan, np.float32), form="wav-float")
    failed = await client.post("/transcribe", **upload(broken), headers=bearer(ALICE))
    assert (failed.status_code, error_of(failed)["code"]) == (400, "audio_not_finite")
    answered = await client.post("/transcribe", **upload(CLIP), headers=bearer(ALICE))
    assert answered.status_code == 200, answered.text


async def until_waiting(turnstile, count):
    while turnstile.waiting < count:  # noqa: ASYNC110 - uploads take a few rounds of the loop
        await asyncio.sleep(0.01)


async def test_one_keys_many_wait_for_anothers_one():
    settings = Settings(decode_workers=1, max_batch_size=1, api_keys=f"alice:{ALICE},bob:{BOB}")
    engine = ScriptedEngine([], "wait")
    async with serving(settings, engine) as client:
        await until_ready(client)

        def post(key, name):
            headers = bearer(key) | {"X-Request-ID": name}
            return asyncio.create_task(client.post("/transcribe", **upload(CLIP), headers=headers))

        tasks = [post(ALICE, f"alice-{i}") for i in range(6)]
        turnstile = client.app.state.runtime.turnstile
        await until_waiting(turnstile, 4)
        tasks.append(post(BOB, "bob"))
        await until_waiting(turnstile, 5)
        assert "speechllm_requests_held 5.0" in (await client.get("/metrics")).text
        engine.may_end.set()
        assert [response.status_code for response in await asyncio.gather(*tasks)] == [200] * 7
    # Two were let in, one was next in line before bob came.
    assert engine.submitted.index("bob") <= 3


async def test_the_log_names_the_keys_owner_and_never_the_key(guarded, caplog):
    caplog.set_level("INFO", logger="speechllm.access")
    engine, client = guarded
    engine.may_end.set()
    await client.post("/transcribe", **upload(encode(tone(0.2))), headers=bearer(ALICE))
    (record,) = [r for r in caplog.records if r.name == "speechllm.access"]
    assert record.fields["key"] == "alice"
    assert ALICE not in json.dumps(record.fields)


async def test_a_form_in_another_charset_is_refused(client):
    body = b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n--x--\r\n'
    for charset in ("idna", "utf-7", "nonsense"):
        media_type = f"multipart/form-data; boundary=x; charset={charset}"
        response = await client.post(
            "/transcribe", content=body, headers={"content-type": media_type}
        )
        assert (response.status_code, error_of(response)["code"]) == (400, "invalid_request")


async def test_a_recording_whose_header_announces_nonsense_leaves_the_counts_as_they_were(client):
    duration = b"\x44\x89\x88" + struct.pack(">d", float("nan"))
    info = b"\x15\x49\xa9\x66" + bytes([0x80 | len(duration)]) + duration
    segment = b"\x18\x53\x80\x67" + bytes([0x80 | len(info)]) + info
    response = await ask(client, b"\x1a\x45\xdf\xa3\x80" + segment)
    assert response.status_code == 400
    assert "speechllm_admitted_audio_seconds 0.0" in (await client.get("/metrics")).text


async def test_files_of_one_request_do_not_use_up_their_keys_concurrency(settings, plain):
    limited = settings.model_copy(update={"key_max_concurrency": 1})
    async with serving(limited) as client:
        await until_ready(client)
        files = [("file", (str(number), CLIP)) for number in range(3)]
        response = await client.post("/transcribe", files=files)
        texts = [each.get("text") for each in response.json()["results"]]
        assert texts == [plain["text"]] * 3


async def test_a_deadline_holds_while_a_request_waits_for_its_turn():
    engine = ScriptedEngine(["word"], "wait")
    keys = Settings(api_keys=f"{ALICE},{BOB}").api_keys
    async with serving(
        Settings(decode_workers=1, max_batch_size=1, api_keys=keys), engine
    ) as client:
        await until_ready(client)
        client.headers["Authorization"] = f"Bearer {ALICE}"
        inside = [asyncio.create_task(ask(client)) for _ in range(2)]  # all places
        while len(engine.submitted) < 2:  # noqa: ASYNC110 - a state, no event
            await asyncio.sleep(0.01)
        late = await ask(client, deadline_ms="100")
        assert (late.status_code, error_of(late)["code"]) == (504, "deadline_exceeded")
        assert not any(each.done() for each in inside)
        engine.may_end.set()
        assert [response.status_code for response in await asyncio.gather(*inside)] == [200, 200]


async def test_the_deadline_of_several_files_is_one_for_all():
    engine = ScriptedEngine(["word"], "wait")
    async with serving(Settings(decode_workers=1, key_max_concurrency=1), engine) as client:
        await until_ready(client)
        files = [("file", (name, CLIP)) for name in "ab"]
        asked = asyncio.create_task(
            client.post("/transcribe", files=files, data={"deadline_ms": "2000"})
        )
        await engine.told.wait()
        await asyncio.sleep(2.0)
        engine.may_end.set()
        _, second = (await asked).json()["results"]
        assert len(engine.submitted) == 1
        assert second["error"]["code"] == "deadline_exceeded"


async def test_no_more_uploads_are_received_at_once_than_allowed(settings):
    async with serving(settings.model_copy(update={"max_uploads": 1})) as client:
        await until_ready(client)
        may_end = asyncio.Event()

        async def slow_body():
            yield CLIP[:1000]
            await may_end.wait()
            yield CLIP[1000:]

        headers = {"content-type": "audio/wav"}
        first = asyncio.create_task(
            client.post("/transcribe", content=slow_body(), headers=headers)
        )
        await asyncio.sleep(0.5)
        second = await client.post("/transcribe", content=CLIP, headers=headers)
        assert (second.status_code, error_of(second)["code"]) == (429, "queue_full")
        assert second.headers["retry-after"] == "1"
        may_end.set()
        assert (await first).status_code == 200
        assert (await client.post("/transcribe", content=CLIP, headers=headers)).status_code == 200
