import multiprocessing
from dataclasses import replace

import numpy as np
import pytest
import soundfile

from model.data.checking import DecodingCrashError, DropReason, check_candidates
from model.data.manifest import Candidate

RATE_HZ = 16_000


@pytest.fixture
def clip(tmp_path):
    def write(name="a.wav", seconds=1.0, amplitude=0.1, *, text="нэг", claimed_s=None):
        noise = np.random.default_rng(0).normal(0, 1, int(seconds * RATE_HZ)) * amplitude
        soundfile.write(tmp_path / name, noise.clip(-1, 1), RATE_HZ)
        return Candidate(name, tmp_path / name, text, "s", "mn", claimed_s)

    return write


def check(*candidates, keep_unlabelled=False, max_duration_s=3.0):
    return check_candidates(
        candidates,
        max_duration_s=max_duration_s,
        keep_unlabelled=keep_unlabelled,
        on_progress=lambda done, total: None,
    )


def reasons(checked):
    return {dropped.id: dropped.reason for dropped in checked.dropped}


def test_kept_utterances_come_in_order_with_the_duration_that_was_measured(clip):
    checked = check(clip("b.wav", 1.5, claimed_s=1.4), clip("a.mp3", 1.0), clip("c.flac", 0.5))
    assert [utterance.id for utterance in checked.kept] == ["b.wav", "a.mp3", "c.flac"]
    assert [round(utterance.duration, 2) for utterance in checked.kept] == [1.5, 1.0, 0.5]
    assert checked.dropped == []


def test_each_fault_is_dropped_for_its_own_reason(clip, tmp_path):
    broken = clip("broken.mp3")
    broken.audio.write_bytes(b"this is no audio")
    truncated = clip("cut.wav", 2.0, claimed_s=2.0)
    truncated.audio.write_bytes(truncated.audio.read_bytes()[: RATE_HZ * 2])
    checked = check(
        clip("ok.wav"),
        broken,
        truncated,
        Candidate("gone", tmp_path / "gone.wav", "нэг", None, None, None),
        clip("empty.wav", 0.0),
        clip("silent.wav", amplitude=0.0),
        clip("short.wav", 0.05),
        clip("long.wav", 3.5),
        clip("null.wav", text=None),
        clip("blank.wav", text=" \t"),
        replace(clip("again.wav"), id="ok.wav"),
    )
    assert [utterance.id for utterance in checked.kept] == ["ok.wav"]
    assert reasons(checked) == {
        "broken.mp3": DropReason.UNREADABLE,
        "cut.wav": DropReason.DURATION_MISMATCH,
        "gone": DropReason.UNREADABLE,
        "empty.wav": DropReason.EMPTY,
        "silent.wav": DropReason.EMPTY,
        "short.wav": DropReason.TOO_SHORT,
        "long.wav": DropReason.TOO_LONG,
        "null.wav": DropReason.NO_TEXT,
        "blank.wav": DropReason.NO_TEXT,
        "ok.wav": DropReason.DUPLICATE_ID,
    }
    details = {dropped.id: dropped.detail for dropped in checked.dropped}
    assert "no such file" in details["gone"]
    assert details["long.wav"] == "3.500 s, more than 3 s"
    assert details["cut.wav"].endswith("where the data set says 2.000 s")


def test_silence_whose_text_is_empty_is_kept_as_non_speech(clip):
    checked = check(clip(amplitude=0.0, text=""))
    assert [utterance.text for utterance in checked.kept] == [""]


def test_unlabelled_recordings_are_kept_when_asked_for(clip):
    checked = check(clip("a.wav", text=None), clip("b.wav", text="нэг"), keep_unlabelled=True)
    assert [utterance.text for utterance in checked.kept] == [None, "нэг"]


def test_progress_counts_the_files_to_decode(clip):
    calls = []
    check_candidates(
        [clip("a.wav"), clip("b.wav"), clip("c.wav", text=None)],
        max_duration_s=30.0,
        keep_unlabelled=False,
        on_progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(1, 2), (2, 2)]


def test_a_decoding_process_that_dies_is_reported_and_does_not_hang(clip):
    recording = clip("a.flac", 2.0)
    candidates = [replace(recording, id=str(number)) for number in range(400)]

    def kill_the_processes(done, total):
        for process in multiprocessing.active_children():
            process.kill()

    with pytest.raises(DecodingCrashError, match=r"after \d+ of 400 files.*a\.flac"):
        check_candidates(
            candidates,
            max_duration_s=30.0,
            keep_unlabelled=False,
            on_progress=kill_the_processes,
        )
