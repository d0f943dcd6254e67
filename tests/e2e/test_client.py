"""The client, and the command line through it, against a real server over real sockets."""

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import termios
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
    Progress,
    RequestRefusedError,
    RequestTimeoutError,
    Retry,
    ServerFailedError,
    TextDelta,
    UnexpectedAnswerError,
)
from tests.recordings import encode, speechlike

KEY = "a-key-of-this-test"
RECORDING = encode(speechlike(1.0))


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
    path = tmp_path / "speech.wav"
    path.write_bytes(RECORDING)
    answers = [client.transcribe(each) for each in (RECORDING, path, str(path))]
    assert len({answer.text for answer in answers}) == 1
    assert answers[0].duration_s == pytest.approx(1.0)
    assert answers[0].timings.total > 0
    assert answers[0].segments is None
    assert answers[0].request_id


def test_options_bring_segments_and_logprobs(client):
    answer = client.transcribe(RECORDING, timestamps="segment", logprobs=True)
    (segment,) = answer.segments
    assert segment.text == answer.text
    assert 0 <= segment.start_s < segment.end_s <= answer.duration_s
    text = b"".join(token.text for token in answer.logprobs).decode(errors="replace")
    assert text.strip() == answer.text
    assert all(token.logprob <= 0 for token in answer.logprobs)


def test_a_transcript_comes_in_the_servers_formats(client):
    (subtitle,) = srt.parse(client.transcribe_to("srt", RECORDING))
    assert subtitle.content
    assert client.transcribe_to("vtt", RECORDING).startswith("WEBVTT\n")
    assert json.loads(client.transcribe_to("verbose_json", RECORDING))["duration"] == 1.0


def test_a_stream_tells_pieces_and_then_the_whole(client):
    *deltas, whole = client.stream(RECORDING)
    assert deltas
    assert all(isinstance(delta, TextDelta) for delta in deltas)
    assert "".join(delta.text for delta in deltas).strip() == whole.text


def test_a_stream_may_be_left_early(client):
    stream = client.stream(RECORDING)
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


@pytest.fixture(scope="module")
def long_recording():
    return encode(speechlike(45.0))  # longer than the model takes in one piece


def test_of_a_long_recording_its_progress_is_told_and_the_answer_is_the_same(
    client, url, long_recording
):
    told = []
    answer = client.transcribe(long_recording, on_progress=told.append, timestamps="segment")
    expected = client.transcribe(long_recording, timestamps="segment")
    assert (answer.text, answer.segments) == (expected.text, expected.segments)
    assert answer.request_id
    assert len(told) > 1
    assert all(isinstance(each, Progress) and each.duration_s == 45.0 for each in told)
    assert told == sorted(told, key=lambda each: each.processed_s)

    async def ask():
        async with AsyncClient(url, api_key=KEY) as other:
            return await other.transcribe_to("srt", long_recording, on_progress=again.append)

    again = []
    assert asyncio.run(ask()) == client.transcribe_to("srt", long_recording)
    # Pieces that are done at once are told together.
    assert len(again) > 1
    assert again[-1] == told[-1]
    assert again == sorted(again, key=lambda each: each.processed_s)


def test_of_a_short_recording_there_is_no_progress(client):
    answer = client.transcribe_to("text", RECORDING, on_progress=pytest.fail)
    assert answer == client.transcribe_to("text", RECORDING)


def test_refusals_say_what_the_server_says(client):
    with pytest.raises(RequestRefusedError, match="not audio") as refusal:
        client.transcribe(b"Dear Sir or Madam, " * 20)
    error = refusal.value
    assert (error.status, error.code, error.param) == (415, "audio_unrecognised", "file")
    with pytest.raises(RequestRefusedError, match="not audio"):
        next(client.stream(b"Dear Sir or Madam, " * 20))
    with pytest.raises(RequestRefusedError, match="not audio"):
        client.transcribe(b"Dear Sir or Madam, " * 20, on_progress=pytest.fail)
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


def events(*values):
    frames = [f"data: {value if isinstance(value, str) else json.dumps(value)}" for value in values]
    return 200, {}, "".join(f"{frame}\n\n" for frame in frames).encode()


PROGRESS = {"type": "transcript.progress", "processed": 30.0, "duration": None}
DONE = {"type": "transcript.done", "body": json.dumps(ANSWER)}


def test_with_progress_refusals_for_now_are_tried_again_too():
    async def ask(url):
        async with AsyncClient(url) as client:
            return await client.transcribe(RECORDING, on_progress=told.append)

    answers = [refusal(429, **{"Retry-After": "0"}), refusal(503, **{"Retry-After": "0"})]
    told = []
    success = events(PROGRESS, DONE, "[DONE]")
    with answering(*answers, success, *answers, success) as (url, seen), Client(url) as client:
        assert client.transcribe(RECORDING, on_progress=told.append).text == "Yes."
        assert asyncio.run(ask(url)).text == "Yes."
    assert told == [Progress(30.0, None)] * 2
    assert len(seen) == 6
    assert all(RECORDING in body for body in seen)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (events(PROGRESS, DONE), ConnectionFailedError),
        (events(PROGRESS, "[DONE]"), UnexpectedAnswerError),
        (events(PROGRESS, {"type": "transcript.done"}, "[DONE]"), UnexpectedAnswerError),
        (events(PROGRESS, json.loads(refusal(500)[2])), ServerFailedError),
    ],
)
def test_with_progress_half_an_answer_is_none(answer, error):
    with answering(answer) as (url, _), Client(url) as client, pytest.raises(error):
        client.transcribe(RECORDING, on_progress=lambda _: None)


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


def test_the_command_line_says_in_process_what_the_server_says(
    client, tiny_checkpoint, tmp_path, long_recording
):
    path = tmp_path / "speech.wav"
    path.write_bytes(long_recording)
    arguments = ["transcribe", path, "--model", tiny_checkpoint, "--device", "cpu"]
    ended = CliRunner().invoke(app, [*map(str, arguments), "--format", "srt"])
    assert ended.exit_code == 0, ended.output
    assert ended.stdout == client.transcribe_to("srt", path)
    assert len(list(srt.parse(ended.stdout))) > 1


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


def test_the_command_lines_bar_moves_within_a_long_recording(url, client, long_recording, tmp_path):
    path = tmp_path / "speech.wav"
    path.write_bytes(long_recording)
    terminal, its_end = os.openpty()
    termios.tcsetwinsize(its_end, (24, 100))
    with subprocess.Popen(
        [sys.executable, "-m", "server.cli", "transcribe", path, "--server", url],
        stdout=subprocess.PIPE,
        stderr=its_end,
        env=os.environ | {"SPEECHLLM_API_KEY": KEY},
        text=True,
    ) as process:
        os.close(its_end)
        drawn = b""
        with contextlib.suppress(OSError):  # Linux' word for the end of a terminal
            while chunk := os.read(terminal, 4096):
                drawn += chunk
        assert process.stdout.read() == client.transcribe_to("text", path)
    os.close(terminal)
    assert process.returncode == 0
    counts = [float(count) for count in re.findall(r"([\d.]+)/1 ", drawn.decode())]
    assert counts == sorted(counts)
    assert counts[-1] == 1.0
    assert any(0 < count < 1 for count in counts)
