"""A real server process on a free port."""

import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 120


class ServerProcess:
    """`speechllm serve` as a user starts it."""

    def __init__(self, *arguments, env=None):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "server.cli", "serve", "--port", "0", *map(str, arguments)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | (env or {}),
        )
        self.log = []
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()

    def _read_log(self):
        for line in self.process.stderr:
            self.log.append(line)

    def announced_url(self):
        line = self.process.stdout.readline()
        assert " at http://" in line, line + "".join(self.log)
        return line.split(" at ")[1].split()[0]

    def end(self, number=signal.SIGTERM):
        """Signal the process and return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(60)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            self._reader.join(10)
            self.process.stdout.close()
            self.process.stderr.close()


@contextmanager
def serve(*arguments, env=None):
    """Yield a ready server's process and a client for it."""
    server = ServerProcess(*arguments, env=env)
    try:
        url = server.announced_url()
        # One transport retry covers the moment between the announcement and listening.
        transport = httpx.HTTPTransport(retries=10)
        with httpx.Client(base_url=url, timeout=60, transport=transport) as client:
            wait_until_ready(server, client)
            yield server, client
    finally:
        server.end()


def wait_until_ready(server, client):
    pause = threading.Event()
    for _ in range(START_TIMEOUT_S * 10):
        if client.get("/health/ready").status_code == 200:
            return
        assert server.process.poll() is None, "".join(server.log)
        pause.wait(0.1)
    pytest.fail("the server did not become ready:\n" + "".join(server.log))


@pytest.fixture(scope="session")
def open_server(tiny_checkpoint):
    """A server that asks for no keys, and a client; shared, so tests leave it as it was."""
    # A loaded machine must not look like a fault of the server's.
    with serve(
        "--model", tiny_checkpoint, "--device", "cpu", "--decode-workers", "1",
        "--decode-timeout-s", "120",
    ) as (process, client):  # fmt: skip
        yield process, client


@pytest.fixture(scope="session")
def start_server():
    return serve


@pytest.fixture(scope="session")
def server_process():
    return ServerProcess
