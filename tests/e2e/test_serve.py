"""`speechllm serve` as a process of its own, over real sockets."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest

from tests.recordings import FORMATS, encode, speechlike, tone

LONG_CLIP_S = 29.0


@pytest.fixture(scope="module")
def server(start_server, tiny_checkpoint):
    with start_server(
        "--model", tiny_checkpoint, "--device", "cpu", "--decode-workers", "1",
        "--max-queue-size", "4", "--max-batch-size", "1", "--upload-idle-timeout-s", "2",
        "--max-audio-s", "30",
    ) as (process, client):  # fmt: skip
        yield process, client


def post(client, data, **options):
    return client.post("/transcribe", files={"file": ("recording", data)}, **options)


def metric(client, line):
    for each in client.get("/metrics").text.splitlines():
        if each.startswith(line + " "):
            return float(each.split()[-1])
    return 0.0


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_transcribed(server, form):
    _, client = server
    response = post(client, encode(tone(1.0, 48_000), 48_000, form))
    assert response.status_code == 200, response.text
    assert isinstance(response.json()["text"], str)
    assert response.json()["duration"] == pytest.approx(1.0, abs=0.08)


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (b"", 400, "audio_empty"),
        (b"a letter " * 50, 415, "audio_unrecognised"),
        (encode(tone(1.0))[:9000], 400, "audio_truncated"),
        (encode(np.full(999, np.nan, np.float32), form="wav-float"), 400, "audio_not_finite"),
        (encode(tone(31.0)), 413, "audio_too_long"),
        (b"RIFF" + bytes(26 * 2**20), 413, "upload_too_large"),
    ],
)  # fmt: skip
def test_bad_uploads_get_a_reason_and_the_server_lives_on(server, data, status, code):
    process, client = server
    response = post(client, data)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert response.json()["error"]["message"]
    assert post(client, encode(tone(0.2))).status_code == 200
    assert process.process.poll() is None


def test_hours_of_opus_in_a_small_file_are_refused(server):
    _, client = server
    # 200 s of silence in a few hundred kB at most; the length is cut out of its last page.
    opus = bytearray(encode(np.zeros(200 * 16_000, np.float32), form="ogg-opus"))
    last = opus.rindex(b"OggS")
    opus[last + 6 : last + 14] = (48_000).to_bytes(8, "little")
    response = post(client, bytes(opus))
    assert response.status_code == 413, response.text
    assert response.json()["error"]["code"] == "audio_too_long"


def test_health_answers_while_uploads_are_decoded_and_transcribed(server):
    _, client = server
    clip = encode(speechlike(LONG_CLIP_S), form="mp3")
    with ThreadPoolExecutor(3) as clients:
        work = [clients.submit(post, client, clip) for _ in range(3)]
        answers = 0
        while not all(each.done() for each in work):
            assert client.get("/health/live").status_code == 200
            answers += 1
    assert answers > 3
    assert [each.result().status_code for each in work] == [200] * 3


def test_overload_is_refused_at_once_with_retry_after(server):
    _, client = server
    clip = encode(speechlike(LONG_CLIP_S))
    with ThreadPoolExecutor(24) as clients:
        responses = list(clients.map(lambda _: post(client, clip), range(24)))
    statuses = {response.status_code for response in responses}
    assert statuses == {200, 429}
    refused = [response for response in responses if response.status_code == 429]
    assert all(1 <= int(response.headers["retry-after"]) <= 60 for response in refused)
    assert refused[0].json()["error"]["code"] == "queue_full"
    assert post(client, encode(tone(0.2))).status_code == 200


def test_a_client_that_leaves_frees_its_slot(server):
    _, client = server
    url = urlsplit(str(client.base_url))
    clip = encode(speechlike(LONG_CLIP_S))
    request = client.build_request("POST", "/transcribe", files={"file": ("a", clip)})
    body = request.read()
    head = (
        f"POST /transcribe HTTP/1.1\r\nhost: {url.netloc}\r\ncontent-length: {len(body)}\r\n"
        f"content-type: {request.headers['content-type']}\r\n\r\n"
    ).encode()
    left = 'speechllm_requests_total{endpoint="/transcribe",method="POST",status="499"}'
    before = metric(client, left)
    for _ in range(3):
        with socket.create_connection((url.hostname, url.port)) as connection:
            connection.sendall(head + body)
    pause = threading.Event()
    for _ in range(600):
        if metric(client, left) == before + 3:
            break
        pause.wait(0.05)
    assert metric(client, left) == before + 3
    assert metric(client, "speechllm_requests_admitted") == 0
    assert metric(client, "speechllm_requests_in_flight") == 1  # this one


def test_a_client_that_leaves_a_stream_frees_its_slot(start_server, tiny_checkpoint):
    left = 'speechllm_requests_total{endpoint="/transcribe",method="POST",status="499"}'
    cancelled = 'speechllm_engine_requests_total{reason="cancelled"}'
    # Five minutes, a piece at a time: much is left to do when the first piece is heard of.
    files = {"file": ("a", encode(speechlike(300), form="mp3"))}
    options = ("--model", tiny_checkpoint, "--device", "cpu", "--max-excerpts-in-flight", "1")
    with start_server(*options) as (_, client):
        with (
            httpx.Client(base_url=client.base_url, timeout=60) as other,
            other.stream("POST", "/transcribe", files=files, data={"stream": "true"}) as response,
        ):
            assert response.headers["content-type"].startswith("text/event-stream")
            next(response.iter_lines())  # and leaves
        pause = threading.Event()
        for _ in range(600):
            # The engine lets go of the piece that runs after its next step.
            if metric(client, left) == 1 and metric(client, "speechllm_requests_running") == 0:
                break
            pause.wait(0.05)
        assert metric(client, left) == 1
        assert metric(client, cancelled) <= 1  # the piece that ran, if one did
        assert metric(client, "speechllm_requests_running") == 0
        assert metric(client, "speechllm_requests_admitted") == 0


def test_an_upload_that_stalls_is_refused(server):
    _, client = server
    url = urlsplit(str(client.base_url))
    head = (
        f"POST /transcribe HTTP/1.1\r\nhost: {url.netloc}\r\ncontent-length: 5000\r\n"
        "content-type: multipart/form-data; boundary=part\r\n\r\n--part\r\n"
    ).encode()
    with socket.create_connection((url.hostname, url.port), timeout=30) as connection:
        connection.sendall(head)
        answer = b"".join(iter(lambda: connection.recv(65_536), b"")).decode()
    assert answer.startswith("HTTP/1.1 408 ")
    assert '"code":"upload_stalled"' in answer
    assert post(client, encode(tone(0.2))).status_code == 200


def test_sigterm_finishes_what_is_in_flight_and_exits_with_0(start_server, tiny_checkpoint):
    with (
        start_server(
            "--model", tiny_checkpoint, "--device", "cpu", "--decode-workers", "1",
            "--max-batch-size", "8", "--max-wait-ms", "10000",
        ) as (process, client),
        ThreadPoolExecutor(1) as clients,
    ):  # fmt: skip
        # The wait for a fuller batch keeps the request in flight until the signal ends it.
        work = clients.submit(post, client, encode(speechlike(1.0)))
        pause = threading.Event()
        with httpx.Client(base_url=client.base_url) as other:
            while metric(other, "speechllm_requests_waiting") == 0:
                pause.wait(0.02)
            assert process.end(signal.SIGTERM) == 0
        assert work.result().status_code == 200


def test_who_comes_while_the_server_drains_is_told_so(start_server, tiny_checkpoint):
    # A piece at a time: much is left to do when the signal comes.
    files = {"file": ("a", encode(speechlike(60), form="mp3"))}
    with (
        start_server(
            "--model", tiny_checkpoint, "--device", "cpu", "--decode-workers", "1",
            "--max-excerpts-in-flight", "1", "--drain-timeout-s", "300",
        ) as (process, client),
        client.stream("POST", "/transcribe", files=files, data={"stream": "true"}) as response,
    ):  # fmt: skip
        lines = response.iter_lines()
        next(lines)
        process.process.send_signal(signal.SIGTERM)
        with httpx.Client(base_url=client.base_url, timeout=60) as other:
            while other.get("/health/ready").json()["status"] == "ready":
                pass  # the signal is on its way
            ready = other.get("/health/ready")
            refused = post(other, encode(tone(0.2)))
        assert (ready.status_code, ready.json()["status"]) == (503, "draining")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert "transcript.text.done" in "".join(lines)
        assert process.process.wait(60) == 0


def test_a_port_in_use_is_one_clear_line(tiny_checkpoint):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = run_serve("--model", tiny_checkpoint, "--port", port)
    assert ended.returncode == 1
    assert ended.stderr == f"error: cannot listen on 127.0.0.1:{port}: Address already in use\n"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max-batch-size", "0"),
        ("dtype", "int3"),
        ("device", "gpu"),
        ("device", "cuda:99"),
        ("model", "/nothing/here"),
        ("model", "docs"),
        ("api-keys", "short"),
        ("api-keys-file", "/nothing/here"),
    ],
)
def test_a_bad_option_is_one_line_that_names_it_and_nothing_listens(option, value):
    ended = run_serve("--port", 0, f"--{option}", value)
    assert (ended.returncode, ended.stdout) == (2, "")
    (line,) = ended.stderr.splitlines()
    variable = f"SPEECHLLM_{option.replace('-', '_').upper()}"
    assert line.startswith(f"error: --{option} / {variable}: ")


def test_a_bad_variable_is_one_line_that_names_it():
    ended = run_serve("--port", 0, env={"SPEECHLLM_DEVICE": "gpu"})
    assert (ended.returncode, ended.stdout) == (2, "")
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: --device / SPEECHLLM_DEVICE: ")


def test_weights_that_cannot_be_loaded_end_the_process(tmp_path, tiny_checkpoint):
    shutil.copytree(tiny_checkpoint, tmp_path / "broken")
    weights = tmp_path / "broken" / "connector.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    ended = run_serve("--model", tmp_path / "broken", "--device", "cpu", "--port", 0)
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"error: cannot serve {tmp_path / 'broken'}: {weights}: ")


def test_a_hub_id_is_served_from_the_hubs_cache(start_server, tmp_path, tiny_checkpoint):
    cached = tmp_path / "models--someone--speech-llm"
    shutil.copytree(tiny_checkpoint, cached / "snapshots" / "0123abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123abc")
    options = ("--model", "someone/speech-llm", "--device", "cpu")
    with start_server(*options, env={"HF_HUB_CACHE": str(tmp_path)}) as (_, client):
        names = [model["id"] for model in client.get("/v1/models").json()["data"]]
        assert "someone/speech-llm" in names
        assert post(client, encode(tone(0.2))).status_code == 200


def test_a_hub_id_that_is_not_to_be_had_ends_the_process(tmp_path):
    ended = run_serve(
        "--model", "someone/nothing", "--port", 0, env={"HF_HUB_CACHE": str(tmp_path)}
    )
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: cannot serve someone/nothing: someone/nothing: no such folder")


def test_variables_without_the_effect_that_their_names_promise_are_warned_of(
    start_server, tiny_checkpoint
):
    env = {
        "SPEECHLLM_MAX_BATCH_SIZ": "secret", "SPEECHLLM_KUBERNETES": "secret",
        "SPEECHLLM_API_KEY": "secret", "SPEECHLLM_SHARED_DATA": "secret", "SPEECHLLM_DEVICE": "cpu",
    }  # fmt: skip
    with start_server("--model", tiny_checkpoint, env=env) as (process, _):
        pass
    lines = [json.loads(line) for line in process.log]
    warnings = [line["message"] for line in lines if line["level"] == "warning"]
    assert len(warnings) == 3, warnings
    assert warnings[0] == "SPEECHLLM_KUBERNETES sets nothing: there is no such setting"
    assert "is SPEECHLLM_MAX_BATCH_SIZE meant?" in warnings[1]
    assert warnings[2].startswith("SPEECHLLM_API_KEY ")
    assert "is SPEECHLLM_API_KEYS meant?" in warnings[2]
    assert "secret" not in "".join(process.log)


def test_a_clients_key_beside_the_servers_is_nothing_to_warn_of():
    env = {"SPEECHLLM_API_KEY": "a-key-of-a-client", "SPEECHLLM_API_KEYS": "too-short"}
    ended = run_serve("--port", 0, env=env)
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: ")


def run_serve(*arguments, env=None):
    command = [sys.executable, "-m", "server.cli", "serve", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | (env or {}),
    )  # fmt: skip
