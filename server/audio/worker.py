"""One decoding process: `python -m server.audio.worker`, driven by `server.audio.pool`.

Reads uploads from stdin and writes waveforms to stdout until stdin ends.
"""

from __future__ import annotations

import os
import resource
import sys
from typing import Any

from server import errors
from server.audio import wire
from server.audio.decode import decode
from server.audio.limits import AudioLimits

_MEMORY_BYTES = 2 << 30  # address space; the libraries alone take about a quarter


def main() -> None:
    """Answer messages until the server closes the pipe."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Decoding libraries print; the answers get a descriptor of their own.
    answers = os.fdopen(os.dup(1), "wb")
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    answers.write(wire.pack({"ready": True}, 0))
    answers.flush()
    os.dup2(silence, 2)
    while (message := wire.read_blocking(sys.stdin.buffer)) is not None:
        header, payload = _answer(*message)
        answers.write(wire.pack(header, len(payload)) + payload)
        answers.flush()


def _answer(request: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    try:
        audio = decode(data, AudioLimits(**request))
    except errors.AudioError as error:
        return {"error": type(error).__name__, "message": error.message}, b""
    except MemoryError:
        message = "decoding the audio takes more memory than allowed"
        return {"error": errors.AudioUnreadableError.__name__, "message": message}, b""
    header = {"sample_rate_hz": audio.sample_rate_hz, "channels": audio.channels}
    return header, audio.waveform.tobytes()


if __name__ == "__main__":
    main()
