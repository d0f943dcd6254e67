"""Whether all of a long recording is there, and whether that is noticed."""

import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

from benchmarks.long_recording import Sentence, count_words, join, resident_mb
from model.data.manifest import Utterance

SENTENCES = [
    Sentence("They were apart.", 0.0, 2.0),
    Sentence("Where is it?", 3.0, 5.0),
    Sentence("Here.", 6.0, 7.0),
]


def spoken(text: str, start_s: float) -> list[dict[str, object]]:
    return [
        {"word": word, "start": start_s + 0.1 * index, "end": start_s + 0.1 * index + 0.1}
        for index, word in enumerate(text.split())
    ]


def test_a_whole_transcript_has_each_sentence_in_its_place() -> None:
    words = [word for each in SENTENCES for word in spoken(each.text.lower(), each.start_s + 0.2)]
    found = count_words(SENTENCES, words)
    assert (found.reference_words, found.words, found.wer) == (7, 7, 0.0)
    assert found.empty == found.overfull == []


def test_what_is_missing_or_said_again_is_noticed() -> None:
    words = spoken("they were apart", 0.2) + spoken("here here here here here", 6.1)
    found = count_words(SENTENCES, words)
    assert found.empty == ["Where is it?"]
    assert found.overfull == ["Here."]
    assert found.wer > 0


def test_recordings_are_joined_once_each_with_their_places(tmp_path: Path) -> None:
    utterances = []
    for number in range(4):
        path = tmp_path / f"{number}.wav"
        soundfile.write(path, np.full(16_000, 0.1 * (number + 1)), 16_000)
        utterances.append(Utterance(str(number), path, f"text {number}", None, "en", 1.0))
    waveform, sentences = join(utterances, 60.0)
    assert sorted(each.text for each in sentences) == [f"text {number}" for number in range(4)]
    for each in sentences:
        middle = waveform[int(16_000 * (each.start_s + each.end_s) / 2)]
        assert middle == pytest.approx(0.1 * (int(each.text[-1]) + 1), abs=1e-3)
    assert len(join(utterances, 3.0)[1]) <= 2


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux' /proc")
def test_memory_is_that_of_a_process() -> None:
    assert 10 < resident_mb(os.getpid()) < 10_000
