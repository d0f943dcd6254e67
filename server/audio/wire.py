"""What passes between the server and one of its decoding processes.

Messages are JSON behind their length, through pipes; uploads and samples, which are large, lie in
two files in memory meanwhile. No pickle, and nothing mapped: a decoder that a hostile file has
taken over can say something wrong, but can run nothing in the server, and take no memory from it.
"""

from __future__ import annotations

import json
import os
import struct
import tempfile
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

if TYPE_CHECKING:
    import asyncio

    from numpy.typing import NDArray

_LENGTH = struct.Struct(">I")
MAX_MESSAGE_BYTES = 1 << 16


def pack(message: dict[str, Any]) -> bytes:
    """Return what goes through a pipe."""
    encoded = json.dumps(message).encode()
    return _LENGTH.pack(len(encoded)) + encoded


def read_blocking(stream: BinaryIO) -> dict[str, Any] | None:
    """Read a message in a decoding process; None once the server has closed the pipe."""
    length = stream.read(_LENGTH.size)
    if len(length) < _LENGTH.size:
        return None
    message: dict[str, Any] = json.loads(stream.read(*_LENGTH.unpack(length)))
    return message


async def read_async(stream: asyncio.StreamReader) -> dict[str, Any]:
    """Read a message in the server.

    Raises:
        asyncio.IncompleteReadError: the process is gone.
        ValueError: the message is longer than any, or no JSON object.
    """
    (length,) = _LENGTH.unpack(await stream.readexactly(_LENGTH.size))
    if length > MAX_MESSAGE_BYTES:
        raise ValueError(f"a decoder's message of {length} bytes")
    message = json.loads(await stream.readexactly(length))
    if not isinstance(message, dict):
        raise ValueError("a decoder's message is no object")
    return message


def open_memory() -> int:
    """Open an empty file in memory, or one without a name where there are none such."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("speechllm-decoding")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def write_at(file: int, data: memoryview, place: int = 0) -> None:
    """Write all bytes of `data` to a file, from a place on."""
    while data:
        written = os.pwrite(file, data, place)
        data, place = data[written:], place + written


def read_samples(file: int, count: int) -> NDArray[np.float32]:
    """Read samples (count,) from the beginning of a file; they are the caller's own.

    Raises:
        ValueError: there are not so many.
    """
    samples = np.empty(count, np.float32)
    view, place = samples.view(np.uint8).data, 0
    while place < len(view):
        size = os.preadv(file, [view[place:]], place)
        if not size:
            raise ValueError(f"{count} samples are announced, and {place} bytes are there")
        place += size
    return samples
