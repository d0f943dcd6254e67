"""One decoding process: `python -m server.audio.worker`, driven by `server.audio.pool`.

Reads uploads from stdin, and for each writes excerpts and progress to stdout until it is done;
while nobody reads, the pipe fills and it waits. Ends when stdin does.
"""

from __future__ import annotations

import os
import resource
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from server import errors
from server.audio import wire
from server.audio.clip import Excerpt, Progress
from server.audio.decode import StreamDecoder
from server.audio.limits import AudioLimits
from server.audio.segmentation import excerpts

if TYPE_CHECKING:
    from collections.abc import Iterator

_MEMORY_BYTES = 2 << 30  # address space; the libraries alone take about a quarter
_NICENESS = 10  # where cores are scarce, the event loop and the engine go first
_PROGRESS_S = 30.0  # of audio between two reports


def main() -> None:
    """Answer messages until the server closes the pipe."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(_NICENESS)
    # Decoding libraries print; the answers get a descriptor of their own.
    answers = os.fdopen(os.dup(1), "wb")
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    answers.write(wire.pack({"ready": True}, 0))
    answers.flush()
    os.dup2(silence, 2)
    while (message := wire.read_blocking(sys.stdin.buffer)) is not None:
        for header, payload in _answers(*message):
            answers.write(wire.pack(header, len(payload)))
            answers.write(payload)
            answers.flush()


def _answers(
    request: dict[str, Any], data: bytes
) -> Iterator[tuple[dict[str, Any], bytes | memoryview]]:
    try:
        decoder = StreamDecoder(data, AudioLimits(**request["limits"]))
        found = excerpts(
            decoder.blocks(),
            whole_samples=request["whole_samples"],
            max_samples=request["max_samples"],
            finds_speech=request["finds_speech"],
            places_speech=request["places_speech"],
        )
        for each in _thinned(found):
            if isinstance(each, Progress):
                yield asdict(each), b""
            else:
                header = {"start": each.start, "speech": [each.speech_start, each.speech_end]}
                yield header, np.ascontiguousarray(each.waveform).view(np.uint8).data
    except errors.AudioError as error:
        yield {"error": type(error).__name__, "message": error.message}, b""
    except MemoryError:
        message = "decoding the audio takes more memory than allowed"
        yield {"error": errors.AudioUnreadableError.__name__, "message": message}, b""


def _thinned(found: Iterator[Excerpt | Progress]) -> Iterator[Excerpt | Progress]:
    """Leave out progress that comes sooner than it is worth a message."""
    told_s = -_PROGRESS_S
    for each in found:
        if isinstance(each, Progress):
            if not each.is_done and each.decoded_s < told_s + _PROGRESS_S:
                continue
            told_s = each.decoded_s
        yield each


if __name__ == "__main__":
    main()
