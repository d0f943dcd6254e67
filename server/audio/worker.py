"""One decoding process: `python -m server.audio.worker UPLOAD SAMPLES`, driven by the pool.

The two are open files in memory. A request on stdin says how long the upload is that lies in the
first; excerpts, in the second one after another, and progress are told on stdout until it is done.
An excerpt waits until the one before has been taken. Ends when stdin does.
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, BinaryIO

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
_FILE_BYTES = 64 << 20  # of samples, 17 minutes; files in memory are not address space
_NICENESS = 10  # where cores are scarce, the event loop and the engine go first
_KEPT_BYTES = 8 << 20  # of an upload's file; the memory of a larger one is given back
_PROGRESS_S = 30.0  # of audio between two reports


def main() -> None:
    """Answer messages until the server closes the pipe."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (_FILE_BYTES, _FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(_NICENESS)
    # Decoding libraries print; the answers get a descriptor of their own.
    answers = os.fdopen(os.dup(1), "wb")
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    upload, samples = map(int, sys.argv[1:])
    server = _Server(sys.stdin.buffer, answers, samples)
    server.tell({"ready": True})
    os.dup2(silence, 2)
    with contextlib.suppress(EOFError):
        while (request := server.next()) is not None:
            data = os.pread(upload, request["bytes"], 0)
            if len(data) > _KEPT_BYTES:
                os.ftruncate(upload, 0)
            _decode(data, request, server)


class _Server:
    """The other end."""

    def __init__(self, messages: BinaryIO, answers: BinaryIO, samples: int) -> None:
        self._messages = messages
        self._answers = answers
        self._samples = samples

    def next(self) -> dict[str, Any] | None:
        """Wait for a message; None once the server has closed the pipe."""
        return wire.read_blocking(self._messages)

    def tell(self, message: dict[str, Any]) -> None:
        self._answers.write(wire.pack(message))
        self._answers.flush()

    def give(self, excerpt: Excerpt, *, is_first: bool) -> None:
        """Lay an excerpt down, where the one before has been taken from; EOFError if nobody is."""
        if not is_first:
            self.tell({"waits": True})
            if self.next() is None:
                raise EOFError
        waveform = np.ascontiguousarray(excerpt.waveform, np.float32)
        wire.write_at(self._samples, waveform.view(np.uint8).data)
        speech = [excerpt.speech_start, excerpt.speech_end]
        self.tell({"start": excerpt.start, "speech": speech, "samples": len(waveform)})


def _decode(data: bytes, request: dict[str, Any], server: _Server) -> None:
    """Give the excerpts of an upload, and tell of progress, or of why there is none."""
    try:
        decoder = StreamDecoder(data, AudioLimits(**request["limits"]))
        found = excerpts(
            decoder.blocks(),
            whole_samples=request["whole_samples"],
            max_samples=request["max_samples"],
            finds_speech=request["finds_speech"],
            places_speech=request["places_speech"],
        )
        is_first = True
        for each in _thinned(found):
            if isinstance(each, Progress):
                server.tell(asdict(each))
            else:
                server.give(each, is_first=is_first)
                is_first = False
    except errors.AudioError as error:
        server.tell({"error": type(error).__name__, "message": error.message})
    except MemoryError:
        message = "decoding the audio takes more memory than allowed"
        server.tell({"error": errors.AudioUnreadableError.__name__, "message": message})


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
