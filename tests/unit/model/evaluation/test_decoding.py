import json

import numpy as np
import pytest
import torch

from model.evaluation.decoding import (
    BatchLimits,
    Clip,
    FailedClip,
    load_transcriber,
    transcribe_clips,
)
from model.evaluation.errors import EvaluationError, UnreadableClipError
from model.transcription import Transcript, TranscriptBatch


class ScriptedTranscriber:
    """Says how many samples each clip has, and remembers the batches it was given."""

    max_audio_s = 30.0
    device = torch.device("cpu")
    num_beams = 1

    def __init__(self, ctc_text=None):
        self.batches = []
        self.ctc_text = ctc_text

    def transcribe(self, waveforms, *, with_ctc=False, num_beams=1):
        self.batches.append([len(waveform) / 16_000 for waveform in waveforms])
        transcripts = [
            Transcript(str(len(waveform)), [], "stop", None, self.ctc_text)
            for waveform in waveforms
        ]
        return TranscriptBatch(transcripts, encode_s=0.5, generate_s=0.25)


def make_clip(clip_id, duration_s, load=None, claimed_s=None):
    def silence():
        return np.zeros(round(duration_s * 16_000), dtype=np.float32)

    return Clip(clip_id, "words", "en", "s1", claimed_s or duration_s, load or silence)


def unreadable():
    raise UnreadableClipError("no audio stream")


def test_longest_clips_come_first_and_results_keep_the_order_of_the_clips():
    transcriber = ScriptedTranscriber()
    clips = [make_clip("a", 1), make_clip("b", 3), make_clip("c", 2)]
    decoding = transcribe_clips(transcriber, clips, BatchLimits(max_clips=2))
    assert transcriber.batches == [[3, 2], [1]]
    assert [result.id for result in decoding.results] == ["a", "b", "c"]
    assert [result.hypothesis for result in decoding.results] == ["16000", "48000", "32000"]
    assert [result.duration_s for result in decoding.results] == [1, 3, 2]


def test_padded_audio_of_a_batch_stays_within_the_budget():
    transcriber = ScriptedTranscriber()
    clips = [make_clip(str(i), duration_s) for i, duration_s in enumerate([9, 8, 4, 4, 1, 1, 1])]
    transcribe_clips(transcriber, clips, BatchLimits(max_clips=3, max_audio_s=10))
    assert transcriber.batches == [[9], [8], [4, 4], [1, 1, 1]]


def test_budget_holds_when_the_manifest_claims_too_short_durations():
    transcriber = ScriptedTranscriber()
    clips = [make_clip(str(i), 8, claimed_s=0.1) for i in range(3)]
    transcribe_clips(transcriber, clips, BatchLimits(max_audio_s=16))
    assert transcriber.batches == [[8, 8], [8]]


def test_timings_and_audio_are_summed_over_batches():
    decoding = transcribe_clips(
        ScriptedTranscriber(), [make_clip("a", 1), make_clip("b", 2)], BatchLimits(max_clips=1)
    )
    assert (decoding.encode_s, decoding.generate_s, decoding.audio_s) == (1.0, 0.5, 3.0)
    assert decoding.transcribe_s > 0
    assert decoding.rtfx == pytest.approx(3.0 / decoding.transcribe_s)


def test_clips_that_cannot_be_used_are_reported_and_the_others_transcribed():
    clips = [
        make_clip("missing", 1, load=unreadable),
        make_clip("good", 1),
        make_clip("empty", 0, claimed_s=1.0),
        make_clip("long", 31),
        make_clip("nan", 1, load=lambda: np.full(16_000, np.nan, dtype=np.float32)),
    ]
    decoding = transcribe_clips(ScriptedTranscriber(), clips, BatchLimits())
    assert [result.id for result in decoding.results] == ["good"]
    assert decoding.failed == [
        FailedClip("missing", "no audio stream"),
        FailedClip("empty", "the audio has no samples"),
        FailedClip("long", "the audio is 31.0 s long, the model takes 30.0 s"),
        FailedClip("nan", "the audio has samples that are not finite numbers"),
    ]


def test_progress_counts_failures_as_done():
    done = []
    clips = [make_clip("a", 3, load=unreadable), make_clip("b", 2), make_clip("c", 1)]
    transcribe_clips(
        ScriptedTranscriber(),
        clips,
        BatchLimits(max_clips=1),
        on_progress=lambda count, _: done.append(count),
    )
    assert done == [2, 3]


def test_ctc_text_is_taken_only_when_asked_for():
    clips = [make_clip("a", 1)]
    without = transcribe_clips(ScriptedTranscriber("ctc"), clips, BatchLimits())
    assert without.results[0].ctc_hypothesis is None
    asked = transcribe_clips(ScriptedTranscriber("ctc"), clips, BatchLimits(), with_ctc=True)
    assert asked.results[0].ctc_hypothesis == "ctc"


def test_ctc_text_of_a_model_without_the_head_is_refused():
    with pytest.raises(EvaluationError, match="no CTC head"):
        transcribe_clips(ScriptedTranscriber(), [make_clip("a", 1)], BatchLimits(), with_ctc=True)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (None, "no config.json"),
        ("{", "cannot be read"),
        ("[]", "model_type is None"),
        (json.dumps({"model_type": "bert"}), "model_type is 'bert'"),
    ],
)
def test_folder_without_a_known_model_is_refused_with_the_reason(tmp_path, config, reason):
    if config is not None:
        (tmp_path / "config.json").write_text(config, encoding="utf-8")
    with pytest.raises(EvaluationError, match=reason):
        load_transcriber(tmp_path, "cpu")
