"""One engine and several front ends: a supervisor, its children, and real sockets."""

import os
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.e2e.test_serve import metric, run_serve
from tests.recordings import encode, speechlike

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/task").exists() or not hasattr(os, "memfd_create"), reason="needs Linux"
)

KEY, OTHER_KEY = "k" * 32, "o" * 32


@pytest.fixture(scope="module")
def options(tiny_checkpoint):
    return (
        "--model", tiny_checkpoint, "--device", "cpu", "--front-ends", "2",
        "--decode-workers", "2", "--decode-timeout-s", "120",
    )  # fmt: skip


@pytest.fixture(scope="module")
def server(start_server, options):
    with start_server(*options) as (process, client):
        until_all_are_up(process, client)
        yield process, client


def children(process):
    """Ids of the front ends."""
    pid = process.process.pid
    tasks = Path(f"/proc/{pid}/task").iterdir()
    ids = {int(each) for task in tasks for each in (task / "children").read_text().split()}
    return sorted(
        each
        for each in ids
        if "server.front_end" in Path(f"/proc/{each}/cmdline").read_bytes().decode()
    )


def anew(client):
    """A connection of its own, which any front end may accept."""
    return httpx.Client(base_url=client.base_url, timeout=60, headers={"connection": "close"})


def until_all_are_up(process, client):
    """Wait until both front ends live and take requests, each of which is asked by the other."""
    pause = threading.Event()
    for _ in range(1200):
        try:
            with anew(client) as each:
                counts = [metric(each, f"speechllm_{name}") for name in ("front_ends", "ready")]
        except httpx.TransportError:
            counts = []
        if counts == [2, 1]:
            return
        pause.wait(0.05)
    pytest.fail("the front ends did not become ready:\n" + "".join(process.log))


def ask(client, recording, **options):
    with anew(client) as each:
        return each.post("/transcribe", files={"file": ("recording", recording)}, **options)


def test_all_front_ends_give_the_same_answers_from_one_engine(server):
    process, client = server
    clips = [encode(speechlike(seconds)) for seconds in (1.0, 2.0, 3.5)]
    with ThreadPoolExecutor(6) as clients:
        answers = list(clients.map(lambda i: ask(client, clips[i % 3]), range(24)))
    assert {answer.status_code for answer in answers} == {200}
    for kind in range(3):
        assert len({answer.json()["text"] for answer in answers[kind::3]}) == 1
    assert len(children(process)) == 2


def test_a_stream_and_its_end_come_from_the_engine(server):
    _, client = server
    whole = ask(client, encode(speechlike(2.0)), data={"logprobs": "true"}).json()
    with (
        anew(client) as each,
        each.stream(
            "POST", "/transcribe", files={"file": ("a", encode(speechlike(2.0)))},
            data={"stream": "true"},
        ) as response,
    ):  # fmt: skip
        body = "".join(response.iter_text())
    assert body.count("transcript.text.delta") > 1
    assert "transcript.text.done" in body
    assert whole["text"]


def test_metrics_are_those_of_all_processes_whoever_is_asked(server):
    _, client = server
    before = metric(client, "speechllm_clip_seconds_count")
    heard = metric(client, "speechllm_audio_seconds_total")
    for _ in range(8):
        assert ask(client, encode(speechlike(1.0))).status_code == 200
    for _ in range(6):
        with anew(client) as each:
            assert metric(each, "speechllm_clip_seconds_count") == before + 8
            assert metric(each, "speechllm_audio_seconds_total") == pytest.approx(heard + 8)
            assert metric(each, "speechllm_requests_admitted") == 0
            assert metric(each, "speechllm_ready") == 1


def test_a_front_end_that_dies_is_replaced_and_what_it_counted_stays(server):
    process, client = server
    counted = metric(client, "speechllm_clip_seconds_count")
    before = children(process)
    os.kill(before[0], signal.SIGKILL)
    pause = threading.Event()
    for _ in range(1200):
        if len(children(process)) == 2 and children(process) != before:
            break
        pause.wait(0.05)
    until_all_are_up(process, client)
    assert before[0] not in children(process)
    assert ask(client, encode(speechlike(1.0))).status_code == 200
    with anew(client) as each:
        assert metric(each, "speechllm_clip_seconds_count") == counted + 1
        assert metric(each, "speechllm_requests_admitted") == 0
    assert any("is replaced" in line for line in process.log)


def test_without_the_engine_s_process_the_front_ends_end(server):
    process, _ = server
    left = children(process)
    process.process.kill()
    process.process.wait()
    pause = threading.Event()
    for _ in range(1200):
        if not any(Path(f"/proc/{each}").exists() for each in left):
            return
        pause.wait(0.05)
    pytest.fail("front ends live on")


def test_keys_are_counted_by_all_together_and_sigterm_waits_for_what_is_in_flight(
    start_server, options
):
    limits = ("--api-keys", f"a:{KEY},b:{OTHER_KEY}", "--key-audio-s-per-minute", "3")
    slow = ("--max-excerpts-in-flight", "1", "--drain-timeout-s", "300")
    with start_server(*options, *limits, *slow) as (process, client):
        until_all_are_up(process, client)
        began_s = time.monotonic()
        headers = {"authorization": f"Bearer {KEY}"}
        clip = encode(speechlike(1.0))
        statuses = [ask(client, clip, headers=headers).status_code for _ in range(16)]
        earned = (time.monotonic() - began_s) * 3 / 60
        assert set(statuses) == {200, 429}
        # The last one may go into debt; each front end by itself would have given as much.
        assert statuses.count(200) <= 4 + earned
        files = {"file": ("a", encode(speechlike(45), form="mp3"))}
        headers = {"authorization": f"Bearer {OTHER_KEY}"}
        form = {"stream": "true"}
        with (
            anew(client) as each,
            each.stream("POST", "/transcribe", files=files, data=form, headers=headers) as response,
        ):
            lines = response.iter_lines()
            next(lines)
            process.process.send_signal(signal.SIGTERM)
            assert "transcript.text.done" in "".join(lines)
        assert process.process.wait(60) == 0


def test_weights_that_cannot_be_loaded_end_all_processes(tmp_path, tiny_checkpoint):
    shutil.copytree(tiny_checkpoint, tmp_path / "broken")
    weights = tmp_path / "broken" / "connector.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    ended = run_serve(
        "--model", tmp_path / "broken", "--device", "cpu", "--port", 0, "--front-ends", 2
    )
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"error: cannot serve {tmp_path / 'broken'}: {weights}: ")


def test_a_bad_key_is_told_of_before_anything_starts(tiny_checkpoint):
    ended = run_serve(
        "--model", tiny_checkpoint, "--port", 0, "--front-ends", 2, "--api-keys", "short"
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: --api-keys / SPEECHLLM_API_KEYS: ")
