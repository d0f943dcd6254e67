"""The client, and the command line through it, against a real server over real sockets."""

import asyncio
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import srt
from typer.testing import CliRunner

from server.cli import app
from server.client import (
    AsyncClient,
    AuthenticationError,
    Client,
    ConnectionFailedError,
    OverloadedError,
    RequestRefusedError,
    RequestTimeoutError,
    Retry,
    TextDelta,
    UnexpectedAnswerError,
)
from tests.recordings import encode, tone

KEY = "a-key-of-this-test"
RECORDING = encode(tone(1.0))


@pytest.fixture(scope="module")
def url(start_server, tiny_checkpoint):
    arguments = ["--device", "cpu", "--decode-workers", "1", "--api-keys", KEY]
    with start_server("--model", tiny_checkpoint, *arguments) as (_, client):
        yield str(client.base_url)


@pytest.fixture
def client(url):
    with Client(url, api_key=KEY) as client:
        yield client


def test_a_recording_is_transcribed_from_bytes_and_from_a_path(client, tmp_path):
    path = tmp_path / "tone.wav"
    path.write_bytes(RECORDING)
    answers = [client.transcribe(each) for each in (RECORDING, path, str(path))]
    assert len({answer.text for answer in answers}) == 1
    assert answers[0].duration_s == pytest.approx(1.0)
    assert answers[0].timings.total > 0
    assert answers[0].segments is None
    assert answers[0].request_id


def test_options_bring_segments_and_logprobs(client):
    answer = client.transcribe(RECORDING, timestamps="segment", logprobs=True, vad=False)
    assert [(each.start_s, each.text) for each in answer.segments] == [(0.0, answer.text)]
    text = b"".join(token.text for token in answer.logprobs).decode(errors="replace")
    assert text.strip() == answer.text
    assert all(token.logprob <= 0 for token in answer.logprobs)


def test_a_transcript_comes_in_the_servers_formats(client):
    (subtitle,) = srt.parse(client.transcribe_to("srt", RECORDING, vad=False))
    assert subtitle.content
    assert client.transcribe_to("vtt", RECORDING).startswith("WEBVTT\n")
    assert json.loads(client.transcribe_to("verbose_json", RECORDING))["duration"] == 1.0


def test_a_stream_tells_pieces_and_then_the_whole(client):
    *deltas, whole = client.stream(RECORDING, vad=False)
    assert deltas
    assert all(isinstance(delta, TextDelta) for delta in deltas)
    assert "".join(delta.text for delta in deltas).strip() == whole.text


def test_a_stream_may_be_left_early(client):
    stream = client.stream(RECORDING, vad=False)
    next(stream)
    stream.close()
    assert client.transcribe(RECORDING).duration_s == 1.0


def test_the_asynchronous_client_says_the_same(url, client):
    async def ask():
        async with AsyncClient(url, api_key=KEY) as other:
            answers = await asyncio.gather(*(other.transcribe(RECORDING) for _ in range(3)))
            events = [event async for event in other.stream(RECORDING)]
            text = await other.transcribe_to("text", RECORDING)
            return answers, events, await other.models(), text

    answers, events, models, text = asyncio.run(ask())
    expected = client.transcribe(RECORDING).text
    assert {answer.text for answer in answers} == {expected}
    assert events[-1].text == expected
    assert text == f"{expected}\n"
    assert models == client.models()
    assert len(models) == 1


def test_refusals_say_what_the_server_says(client):
    with pytest.raises(RequestRefusedError, match="not audio") as refusal:
        client.transcribe(b"Dear Sir or Madam, " * 20)
    error = refusal.value
    assert (error.status, error.code, error.param) == (415, "audio_unrecognised", "file")
    with pytest.raises(RequestRefusedError, match="not audio"):
        next(client.stream(b"Dear Sir or Madam, " * 20))
    with pytest.raises(RequestRefusedError) as refusal:
        client.transcribe(RECORDING, language="fr")
    assert refusal.value.param == "language"


def test_a_wrong_key_is_told(url):
    with Client(url, api_key="wrong") as client, pytest.raises(AuthenticationError):
        client.models()


def test_nobody_there_is_told():
    with Client("http://127.0.0.1:1") as client, pytest.raises(ConnectionFailedError):
        client.transcribe(RECORDING)


@contextmanager
def answering(*answers):
    """An HTTP server that gives these answers, (status, headers, body), and holds the last."""
    waiting = list(answers)
    seen = []
    released = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            seen.append(self.rfile.read(int(self.headers["Content-Length"])))
            if not waiting:
                released.wait(30)
                return
            status, headers, body = waiting.pop(0)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        released.set()
        server.shutdown()
        thread.join()
        server.server_close()


def refusal(status, **headers):
    error = {"message": "full", "type": "capacity_error", "code": "queue_full"}
    return status, headers, json.dumps({"error": error}).encode()


TIMINGS = {"decode": 0, "queue": 0, "encode": 0, "generate": 0, "total": 0}
ANSWER = {"text": "Yes.", "language": "en", "duration": 1.0, "timings": TIMINGS}
SUCCESS = (200, {}, json.dumps(ANSWER).encode())


def test_refusals_for_now_are_tried_again_with_the_whole_recording():
    answers = [refusal(429, **{"Retry-After": "0"}), refusal(503, **{"Retry-After": "0"}), SUCCESS]
    with answering(*answers) as (url, seen), Client(url) as client:
        assert client.transcribe(RECORDING).text == "Yes."
    assert len(seen) == 3
    assert all(RECORDING in body for body in seen)


def test_the_asynchronous_client_tries_again_too():
    async def ask(url):
        async with AsyncClient(url) as client:
            return (await client.transcribe(RECORDING)).text

    with answering(refusal(429, **{"Retry-After": "0"}), SUCCESS) as (url, seen):
        assert asyncio.run(ask(url)) == "Yes."
    assert len(seen) == 2


def test_retries_have_an_end():
    answers = [refusal(429, **{"Retry-After": "0"})] * 3
    with (
        answering(*answers) as (url, seen),
        Client(url, retry=Retry(max_retries=2)) as client,
        pytest.raises(OverloadedError) as error,
    ):
        client.transcribe(RECORDING)
    assert (len(seen), error.value.code, error.value.retry_after_s) == (3, "queue_full", 0.0)


def test_an_answer_that_does_not_come_times_out():
    with (
        answering() as (url, _),
        Client(url, timeout_s=0.2) as client,
        pytest.raises(RequestTimeoutError),
    ):
        client.transcribe(RECORDING)


def test_another_program_at_the_address_is_told():
    answers = [(200, {}, b"<h1>Welcome</h1>"), (418, {}, b"<h1>teapot</h1>")]
    with answering(*answers) as (url, _), Client(url) as client:
        for _ in answers:
            with pytest.raises(UnexpectedAnswerError):
                client.transcribe(RECORDING)


def test_the_command_line_transcribes_at_a_server(url, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.wav").write_bytes(RECORDING)
    (tmp_path / "c.wav").write_bytes(b"Dear Sir or Madam, " * 20)
    output = tmp_path / "out"
    ended = CliRunner().invoke(
        app,
        ["transcribe", str(tmp_path), "--server", url, "--format", "jsonl", "--output",
         str(output)],
        env={"SPEECHLLM_API_KEY": KEY},
    )  # fmt: skip
    assert ended.exit_code == 1, ended.output
    text = (output / "transcripts.jsonl").read_text(encoding="utf-8")
    lines = {line["file"][-5:]: line for line in map(json.loads, text.splitlines())}
    assert lines["a.wav"]["text"] == lines["b.wav"]["text"]
    assert lines["c.wav"]["error"]["code"] == "audio_unrecognised"
    refused = CliRunner().invoke(app, ["transcribe", str(tmp_path), "--server", url])
    assert (refused.exit_code, "API key" in refused.stderr) == (1, True)
