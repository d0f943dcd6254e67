import subprocess
import sys

import pytest

from server.board import Board, Seat
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs memfd_create")

TIMES = 2000


def test_each_writes_its_own_and_reads_the_sum():
    board = Board.create(3, 2)
    first, second = (board.tally("requests", place) for place in (0, 2))
    first.add(2)
    second.add(3)
    first.add(-1)
    assert (first.own, second.own) == (1, 3)
    assert first.total == second.total == 4
    assert board.tally("audio_s", 0).total == 0
    assert board.key_tally(1, 0).total == 0
    board.clear(2)
    assert (first.total, second.own) == (1, 0)


def test_alone_a_seat_counts_for_itself():
    one, other = Seat().tally("sessions"), Seat().tally("sessions")
    one.add(1)
    assert (one.total, other.total) == (1, 0)


SPEND = f"""
import sys
from server.board import Board, Seat
from server.keys import KeyLimits

file, place = map(int, sys.argv[1:])
board = Board(file, 2, 2)
limits = KeyLimits(
    max_concurrency=0,
    audio_s_per_minute=1e6,
    use_of=lambda owner: Seat(board, place).key_use(owner, ["a", "b"]),
    clock=lambda: 1.0,
)
for _ in range({TIMES}):
    with limits.hold("b", 1.0) as charge:
        charge.measure(2.0)
"""


def test_no_second_of_a_key_is_lost_between_processes():
    board = Board.create(2, 2)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SPEND, str(board.file), str(place)],
            pass_fds=[board.file],
            cwd=REPOSITORY,
        )
        for place in (0, 1)
    ]
    assert [process.wait(60) for process in processes] == [0, 0]
    with board.bucket(1).opened() as cells:
        assert cells[0] == 1e6 - 2 * 2 * TIMES
    assert board.key_tally(1, 0).total == 0
    with board.bucket(0).opened() as cells:
        assert cells[2] == 0  # never used
