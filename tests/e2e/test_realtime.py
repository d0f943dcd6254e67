"""`WS /v1/realtime` of a real server process, by a WebSocket client and by OpenAI's SDK."""

import base64
import contextlib
import io
import json
import re
import signal
import socket as socketlib
import threading
import time

import numpy as np
import openai
import pytest
import soundfile
import soxr
from openai.types.realtime import RealtimeServerEvent
from pydantic import TypeAdapter
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from tests.e2e.test_serve import metric
from tests.recordings import speechlike

RATE = 24_000
PCM = {"type": "audio/pcm", "rate": RATE}
KEY = "a-secret-key-for-tests"
SERVER_EVENT = TypeAdapter(RealtimeServerEvent)
DELTA = "conversation.item.input_audio_transcription.delta"
COMPLETED = "conversation.item.input_audio_transcription.completed"


@pytest.fixture(scope="module")
def server(start_server, tiny_checkpoint):
    with start_server(
        "--model", tiny_checkpoint, "--device", "cpu", "--decode-workers", "1",
        "--model-name", "tiny", "--realtime-max-sessions", "2", "--realtime-idle-timeout-s", "20",
        "--realtime-max-buffer-s", "20", "--api-keys", f"tests:{KEY}",
        "--cors-origins", "https://page.example",
    ) as (process, client):  # fmt: skip
        client.headers["Authorization"] = f"Bearer {KEY}"
        yield process, client


def address(client, query="?intent=transcription"):
    return str(client.base_url).replace("http", "ws", 1).rstrip("/") + "/v1/realtime" + query


def open_session(client, query="?intent=transcription", **options):
    headers = {"Authorization": f"Bearer {KEY}"}
    return connect(address(client, query), additional_headers=headers, open_timeout=60, **options)


def speech(seconds=2.0, rate_hz=RATE, seed=2):
    """A voice between silences, PCM16."""
    samples = np.concatenate([np.zeros(4_000), speechlike(seconds, seed), np.zeros(16_000)])
    return pcm16(soxr.resample(samples, 16_000, rate_hz))


def pcm16(samples):
    return (np.clip(samples, -1, 1) * 32_767).astype("<i2").tobytes()


def send(socket, kind, **fields):
    socket.send(json.dumps({"type": kind, **fields}))


def receive(socket, timeout=60):
    event = json.loads(socket.recv(timeout=timeout))
    if event.get("session", {}).get("audio", {}).get("input", {}).get("format") in (None, PCM):
        SERVER_EVENT.validate_python(event)  # as OpenAI's SDK has it, which knows no other rate
    return event


def receive_until(socket, *kinds):
    events = []
    while not events or events[-1]["type"] not in kinds:
        events.append(receive(socket))
    return events


def update(socket, **audio_input):
    session = {"type": "transcription", "audio": {"input": audio_input}}
    send(socket, "session.update", session=session)


def stream(socket, data, rate_hz=RATE, pace=0.0):
    """Send samples in pieces of 100 ms, waiting `pace` times as long between them."""
    step = rate_hz // 10 * 2
    for start in range(0, len(data), step):
        audio = base64.b64encode(data[start : start + step]).decode()
        send(socket, "input_audio_buffer.append", audio=audio)
        time.sleep(0.1 * pace)


def kinds_of(events):
    return [event["type"] for event in events]


def test_a_turn_from_the_first_event_to_the_last(server):
    _, client = server
    with open_session(client) as socket:
        created = receive(socket)
        assert created["type"] == "session.created"
        audio_input = created["session"]["audio"]["input"]
        assert created["session"]["type"] == "transcription"
        assert audio_input["format"] == {"type": "audio/pcm", "rate": 24_000}
        assert audio_input["turn_detection"]["type"] == "server_vad"
        stream(socket, speech(), pace=0.5)
        events = receive_until(socket, COMPLETED)
        done = receive(socket)
    kinds = [kind for kind in kinds_of(events) if kind != DELTA]
    assert kinds == [
        "input_audio_buffer.speech_started",
        "input_audio_buffer.speech_stopped",
        "input_audio_buffer.committed",
        "conversation.item.added",
        COMPLETED,
    ]
    completed = events[-1]
    deltas = [event for event in events if event["type"] == DELTA]
    assert "".join(event["delta"] for event in deltas) == completed["transcript"] != ""
    assert {event["content_index"] for event in [*deltas, completed]} == {0}
    assert len({event["item_id"] for event in events if "item_id" in event}) == 1
    assert completed["usage"]["type"] == "duration"
    assert completed["usage"]["seconds"] == pytest.approx(2.2, abs=1.2)
    assert done["type"] == "conversation.item.done"
    assert done["item"]["content"][0]["transcript"] == completed["transcript"]


@pytest.mark.parametrize("rate_hz", [24_000, 16_000, 8_000])
def test_binary_frames_and_a_commit_by_hand_at_every_rate(server, rate_hz):
    _, client = server
    data = speech(rate_hz=rate_hz)
    with open_session(client) as socket:
        receive(socket)
        update(socket, turn_detection=None, format={"type": "audio/pcm", "rate": rate_hz})
        updated = receive(socket)
        assert updated["type"] == "session.updated"
        assert updated["session"]["audio"]["input"]["turn_detection"] is None
        texts = []
        for step in (len(data), 4_801):
            for start in range(0, len(data), step):
                socket.send(data[start : start + step])
            send(socket, "input_audio_buffer.commit")
            events = receive_until(socket, "conversation.item.done")
            assert "input_audio_buffer.speech_started" not in kinds_of(events)
            texts += [event["transcript"] for event in events if event["type"] == COMPLETED]
    assert texts[0] == texts[1] != ""


@pytest.mark.parametrize(
    ("kind", "former", "subtype"),
    [("audio/pcmu", "g711_ulaw", "ULAW"), ("audio/pcma", "g711_alaw", "ALAW")],
)
def test_g711_says_what_the_same_samples_say_as_pcm16(server, kind, former, subtype):
    _, client = server
    samples = np.frombuffer(speech(rate_hz=8_000), "<i2")
    file = io.BytesIO()
    soundfile.write(file, samples, 8_000, format="RAW", subtype=subtype)
    coded = file.getvalue()
    as_read = {"format": "RAW", "subtype": subtype, "channels": 1, "samplerate": 8_000}
    decoded, _ = soundfile.read(io.BytesIO(coded), dtype="int16", **as_read)
    texts = []
    with open_session(client) as socket:
        receive(socket)
        for given, data in (
            ({"type": kind}, coded),
            (former, coded),
            ({"type": "audio/pcm", "rate": 8_000}, decoded.tobytes()),
        ):
            update(socket, turn_detection=None, format=given)
            told = receive(socket)["session"]["audio"]["input"]["format"]
            assert told == ({"type": kind} if given == former else given)
            socket.send(data)
            send(socket, "input_audio_buffer.commit")
            events = receive_until(socket, "conversation.item.done")
            texts += [event["transcript"] for event in events if event["type"] == COMPLETED]
    assert texts[0] == texts[1] == texts[2] != ""


def test_a_cleared_buffer_is_empty(server):
    _, client = server
    with open_session(client) as socket:
        receive(socket)
        update(socket, turn_detection=None)
        receive(socket)
        socket.send(speech())
        send(socket, "input_audio_buffer.clear")
        assert receive(socket)["type"] == "input_audio_buffer.cleared"
        send(socket, "input_audio_buffer.commit", event_id="mine")
        error = receive(socket)["error"]
    assert (error["code"], error["event_id"]) == ("input_audio_buffer_commit_empty", "mine")


@pytest.mark.parametrize(
    ("message", "code", "param"),
    [
        ("no json", "invalid_request", None),
        ("[]", "invalid_request", None),
        ("[" * 100_000, "invalid_request", None),
        ('{"type": "response.create"}', "invalid_request", "type"),
        ('{"no": "type"}', "invalid_request", "type"),
        ('{"type": "input_audio_buffer.append", "audio": "?"}', "invalid_request", "audio"),
        (
            '{"type": "session.update", "session": {"type": "realtime"}}',
            "invalid_request",
            "session.type",
        ),
        (
            '{"type": "session.update", "session": {"type": "transcription", "audio": '
            '{"input": {"format": {"type": "audio/pcm", "rate": 44100}}}}}',
            "invalid_request",
            "session.audio.input.format.rate",
        ),
        (
            '{"type": "session.update", "session": {"type": "transcription", "audio": '
            '{"input": {"format": {"type": "audio/pcmu", "rate": 16000}}}}}',
            "invalid_request",
            "session.audio.input.format.rate",
        ),
        (
            '{"type": "session.update", "session": {"type": "transcription", '
            '"include": ["item.input_audio_transcription.mood"]}}',
            "invalid_request",
            "session.include.0",
        ),
        (
            '{"type": "session.update", "session": {"type": "transcription", "audio": '
            '{"input": {"transcription": {"language": "xx"}}}}}',
            "language_unsupported",
            "language",
        ),
        (
            '{"type": "session.update", "session": {"type": "transcription", "audio": '
            '{"input": {"transcription": {"model": "gpt-4o"}}}}}',
            "model_not_found",
            "model",
        ),
    ],
)
def test_a_bad_message_is_told_and_the_session_goes_on(server, message, code, param):
    _, client = server
    with open_session(client) as socket:
        receive(socket)
        socket.send(message)
        event = receive(socket)
        assert (event["type"], event["error"]["code"]) == ("error", code), event
        assert event["error"]["param"] == param, event
        update(socket, transcription={"language": "en", "model": "whisper-1"})
        assert receive(socket)["type"] == "session.updated"


def test_audio_beyond_the_buffer_is_refused(server):
    _, client = server
    with open_session(client) as socket:
        receive(socket)
        update(socket, turn_detection=None)
        receive(socket)
        socket.send(bytes(2 * RATE * 15))
        socket.send(bytes(2 * RATE * 10))
        assert receive(socket)["error"]["code"] == "input_audio_buffer_full"
        send(socket, "input_audio_buffer.commit")
        events = receive_until(socket, COMPLETED)
    assert events[-1]["transcript"] == "", "silence says nothing"


@pytest.mark.parametrize(
    ("options", "status", "code"),
    [
        ({"query": "?intent=conversation"}, 400, "invalid_request"),
        ({"query": "?model=gpt-4o"}, 404, "model_not_found"),
        ({"origin": "https://elsewhere.example"}, 403, "origin_refused"),
        ({"origin": "http://[x"}, 403, "origin_refused"),
    ],
)
def test_a_handshake_is_refused_with_a_reason(server, options, status, code):
    _, client = server
    with pytest.raises(InvalidStatus) as refused, open_session(client, **options):
        pass
    answer = refused.value.response
    assert answer.status_code == status
    error = json.loads(answer.body)["error"]
    assert error["code"] == code
    assert error["request_id"] == answer.headers["X-Request-ID"]


@pytest.mark.parametrize("key", [None, "not-this-servers-key"])
def test_a_session_needs_a_key(server, key):
    _, client = server
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    with (
        pytest.raises(InvalidStatus) as refused,
        connect(address(client), additional_headers=headers),
    ):
        pass
    assert refused.value.response.status_code == 401
    assert refused.value.response.headers["WWW-Authenticate"] == "Bearer"


def test_what_no_answer_could_repeat_is_told_and_the_session_goes_on(server):
    _, client = server
    with open_session(client) as socket:
        receive(socket)
        send(socket, "input_audio_buffer.append", audio="\u00e9\u00e9\u00e9\u00e9")
        assert receive(socket)["error"]["param"] == "audio"
        socket.send('{"type": "input_audio_buffer.commit", "event_id": "\\ud800"}')
        assert receive(socket)["error"]["type"] == "invalid_request_error"
        update(socket, transcription={"prompt": "\U0001f600 \u2028"})
        assert receive(socket)["type"] == "session.updated"


def test_a_browser_sends_its_key_as_a_subprotocol(server):
    _, client = server
    with connect(
        address(client),
        subprotocols=["realtime", f"openai-insecure-api-key.{KEY}"],
        origin="https://page.example",
    ) as socket:
        assert socket.subprotocol == "realtime"
        assert receive(socket)["type"] == "session.created"


def test_sessions_are_bounded_and_their_places_come_free(server):
    _, client = server
    with open_session(client) as one, open_session(client) as two:
        receive(one)
        receive(two)
        assert metric(client, "speechllm_realtime_sessions") == 2
        with pytest.raises(InvalidStatus) as refused, open_session(client):
            pass
        assert refused.value.response.status_code == 429
        assert int(refused.value.response.headers["Retry-After"]) > 0
    wait_for(lambda: metric(client, "speechllm_realtime_sessions") == 0)
    with open_session(client) as socket:
        receive(socket)


def test_a_client_that_leaves_cancels_its_work(server):
    _, client = server
    with open_session(client) as socket:
        receive(socket)
        socket.send(speech(10.0))
    wait_for(lambda: metric(client, "speechllm_realtime_sessions") == 0)
    wait_for(lambda: metric(client, "speechllm_requests_admitted") == 0)


def test_a_client_that_does_not_read_is_let_go(server):
    _, client = server
    ended = 'speechllm_realtime_sessions_ended_total{reason="slow_reader"}'
    before = metric(client, ended)
    with open_session(client, max_queue=1) as socket:
        flood = threading.Thread(target=update_forever, args=(socket,))
        flood.start()
        try:
            wait_for(lambda: metric(client, ended) == before + 1)
            assert metric(client, "speechllm_realtime_sessions") == 0
        finally:
            # Closing it properly would wait for the sender, which waits for the server.
            socket.socket.shutdown(socketlib.SHUT_RDWR)
            flood.join()


def update_forever(socket):
    with contextlib.suppress(ConnectionClosed):
        while True:
            update(socket, transcription={"prompt": "x" * 900})


# The SDK calls connect() in a way that its newest version warns of.
@pytest.mark.filterwarnings("ignore:connect.. must be used as a context manager")
def test_the_openai_sdk_works_unchanged(server):
    _, client = server
    sdk = openai.OpenAI(base_url=f"{client.base_url}/v1".replace("//v1", "/v1"), api_key=KEY)
    texts, deltas = [], []
    with sdk.realtime.connect(extra_query={"intent": "transcription"}) as connection:
        connection.session.update(
            session={
                "type": "transcription",
                "include": ["item.input_audio_transcription.logprobs"],
                "audio": {
                    "input": {
                        "format": {"type": "audio/pcm", "rate": 24_000},
                        "transcription": {"model": "whisper-1", "language": "en"},
                        "turn_detection": {
                            "type": "server_vad",
                            "threshold": 0.5,
                            "prefix_padding_ms": 300,
                            "silence_duration_ms": 500,
                        },
                    }
                },
            }
        )
        connection.input_audio_buffer.append(audio=base64.b64encode(speech()).decode())
        for event in connection:
            if event.type == DELTA:
                deltas.append(event.delta)
            elif event.type == COMPLETED:
                texts.append(event.transcript)
                spelt = b"".join(bytes(each.bytes) for each in event.logprobs)
                # Of the last transcript, which may contradict what was told before.
                assert spelt
                assert all(each.logprob <= 0 for each in event.logprobs)
                break
            assert event.type != "error", event
    assert texts == ["".join(deltas)] != [""]


def test_sigterm_lets_a_session_finish_what_it_has_heard(start_server, tiny_checkpoint):
    with start_server(
        "--model", tiny_checkpoint, "--device", "cpu", "--decode-workers", "1"
    ) as (process, client):  # fmt: skip
        with connect(address(client), open_timeout=60) as socket:
            receive(socket)
            socket.send(pcm16(soxr.resample(speechlike(3.0, 2), 16_000, RATE)))
            receive_until(socket, "input_audio_buffer.speech_started")
            ending = threading.Thread(target=process.end, args=(signal.SIGTERM,))
            ending.start()
            events = receive_until(socket, "error")
            with pytest.raises(ConnectionClosed):
                socket.recv(timeout=60)
        ending.join()
    assert COMPLETED in kinds_of(events)
    assert events[-1]["error"]["code"] == "session_shutdown"
    assert socket.close_code == 1012
    assert process.process.returncode == 0


@pytest.mark.parametrize(
    ("option", "code"),
    [("--realtime-idle-timeout-s", "idle"), ("--realtime-max-session-s", "expired")],
)
def test_sessions_end_when_they_idle_or_last_too_long(start_server, tiny_checkpoint, option, code):
    with (
        start_server("--model", tiny_checkpoint, "--device", "cpu", option, "1") as (_, client),
        connect(address(client), open_timeout=60) as socket,
    ):
        receive(socket)
        update(socket, turn_detection=None)
        audio = base64.b64encode(pcm16(speechlike(2.0))).decode()
        send(socket, "input_audio_buffer.append", audio=audio)
        events = receive_until(socket, "error")
        assert events[-1]["error"]["code"] == f"session_{code}"
        # What was heard is not lost.
        assert any(event["type"].endswith("transcription.completed") for event in events)
        with pytest.raises(ConnectionClosed):
            socket.recv(timeout=60)
        assert socket.close_code == 1008


def test_a_checkpoint_without_a_prompt_refuses_one_and_the_session_goes_on(start_server):
    with (
        start_server("--device", "cpu", "--decode-workers", "1", "--no-loop-guard") as (_, client),
        connect(address(client), open_timeout=60) as socket,
    ):
        receive(socket)
        update(socket, transcription={"prompt": "What is said?"})
        error = receive(socket)["error"]
        assert (error["code"], error["param"]) == ("invalid_request", "prompt")
        update(socket, transcription={"language": "en"})
        assert receive(socket)["type"] == "session.updated"


@pytest.mark.slow
def test_a_recording_is_heard_as_an_upload_of_it_is(start_server, shared_data):
    path = shared_data / "audio" / "kathleen" / "arctic_b0243_1592533298.flac"
    samples, rate_hz = soundfile.read(path, dtype="float32")
    silence = np.zeros(rate_hz)
    data = pcm16(soxr.resample(np.concatenate([silence, samples, silence]), rate_hz, RATE))
    with start_server("--device", "cpu") as (_, client):
        uploaded = client.post("/transcribe", files={"file": path.read_bytes()}).json()["text"]
        with connect(address(client), open_timeout=60) as socket:
            receive(socket)
            events = []
            for start in range(0, len(data), RATE):  # half a second
                stream(socket, data[start : start + RATE])
                # Once this is answered the audio has been heard; then its early text is awaited.
                update(socket)
                events += receive_until(socket, "session.updated")
                wait_for(lambda: metric(client, "speechllm_requests_admitted") == 0)
            events += receive_until(socket, COMPLETED) if COMPLETED not in kinds_of(events) else []
    (completed,) = (event for event in events if event["type"] == COMPLETED)
    heard, said = (re.findall(r"\w+", text.lower()) for text in (completed["transcript"], uploaded))
    assert len(set(heard) & set(said)) >= 0.7 * len(set(said)), (heard, said)
    assert DELTA in kinds_of(events[: kinds_of(events).index("input_audio_buffer.committed")])


def wait_for(condition):
    pause = threading.Event()
    for _ in range(1200):
        if condition():
            return
        pause.wait(0.05)
    pytest.fail("it did not happen within a minute")
