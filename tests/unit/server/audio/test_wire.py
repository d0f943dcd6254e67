import asyncio
import io
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.audio import wire

MESSAGES = st.dictionaries(
    st.text(max_size=8), st.integers() | st.text() | st.lists(st.floats(allow_nan=False))
)


@given(st.lists(MESSAGES, max_size=5))
def test_messages_arrive_as_they_were_sent(messages):
    sent = b"".join(map(wire.pack, messages))
    stream = io.BytesIO(sent)
    assert [wire.read_blocking(stream) for _ in messages] == messages
    assert wire.read_blocking(stream) is None

    async def read():
        reader = asyncio.StreamReader()
        reader.feed_data(sent)
        return [await wire.read_async(reader) for _ in messages]

    assert asyncio.run(read()) == messages


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        (b"\xff\xff\xff\xff", ValueError),  # four gigabytes are to come
        (b"\x00\x00\x00\x02[]", ValueError),
        (b"\x00\x00\x00\x02{\xff", ValueError),
        (b"\x00\x00\x00\x09{}", asyncio.IncompleteReadError),
    ],
)
def test_what_is_no_message_is_refused(sent, error):
    async def read():
        reader = asyncio.StreamReader()
        reader.feed_data(sent)
        reader.feed_eof()
        await wire.read_async(reader)

    with pytest.raises(error):
        asyncio.run(read())


def test_samples_are_read_whole_or_refused():
    file = wire.open_memory()
    try:
        samples = np.arange(100_000, dtype=np.float32)
        wire.write_at(file, samples.view(np.uint8).data)
        np.testing.assert_array_equal(wire.read_samples(file, 100_000), samples)
        np.testing.assert_array_equal(wire.read_samples(file, 7), samples[:7])
        assert wire.read_samples(file, 0).size == 0
        assert wire.read_samples(file, 7).flags.writeable
        with pytest.raises(ValueError, match="100001 samples are announced, and 400000 bytes"):
            wire.read_samples(file, 100_001)
        os.ftruncate(file, 0)
        with pytest.raises(ValueError, match="0 bytes are there"):
            wire.read_samples(file, 1)
    finally:
        os.close(file)


def test_memory_has_no_name_where_there_are_no_files_in_memory(monkeypatch):
    monkeypatch.delattr(os, "memfd_create", raising=False)
    file = wire.open_memory()
    try:
        wire.write_at(file, memoryview(b"abc"), 2)
        assert os.pread(file, 9, 0) == b"\0\0abc"
        assert os.fstat(file).st_nlink == 0
    finally:
        os.close(file)
