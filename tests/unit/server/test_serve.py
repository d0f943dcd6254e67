"""The listening socket of `speechllm serve`."""

import asyncio
import socket

from server.cli.serve import _listen


def test_answers_do_not_wait_for_acknowledgements():
    async def option_of_an_accepted_connection():
        accepted = asyncio.get_running_loop().create_future()

        async def handle(_reader, writer):
            connection = writer.get_extra_info("socket")
            accepted.set_result(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        listener = _listen("127.0.0.1", 0)
        async with await asyncio.start_server(handle, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            option = await accepted
            writer.close()
            await writer.wait_closed()
            return option

    assert asyncio.run(option_of_an_accepted_connection()) != 0
