import pytest

from benchmarks.host import LEFT_OUT, PARTS, REST, TOKENS_PER_AUDIO_S, transcribe
from benchmarks.shapes import make_checkpoint
from model.transcription import Transcriber
from server.engine.runner import SpeechRunner


def test_the_parts_add_up_to_all_that_the_engine_takes_beside_encoding(tmp_path):
    checkpoint = make_checkpoint("thin", tmp_path / "thin", TOKENS_PER_AUDIO_S)
    thin = Transcriber.from_pretrained(checkpoint, device="cpu", dtype="fp32")
    runner = SpeechRunner(thin, max_slots=4, pads_batches=True, runs_ahead=True)
    measured = transcribe(runner, 9)
    parts = {*PARTS.values(), REST} - {LEFT_OUT}
    assert measured.keys() == parts | {"all"}
    assert all(measured[part] > 0 for part in parts)
    assert measured["all"] == pytest.approx(sum(measured[part] for part in parts))
    assert transcribe(runner, 4).keys() == measured.keys()  # nothing is left behind
