import itertools
import json

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.alignment import ENCODER_FRAME_S, align_tokens, align_words, token_scores, word_spans
from model.transcription import Transcriber
from tests.conftest import REPOSITORY
from tests.speech_models import cover_only


def best_of_all_paths(scores, token_ids):
    """Try every path there is."""
    symbols = range(1 + len(token_ids))

    def reads_the_transcript(path):
        read = [group for group, _ in itertools.groupby(path) if group]
        return read == list(range(1, len(token_ids) + 1)) and all(
            token_ids[a - 1] != token_ids[b - 1]
            for a, b in itertools.pairwise(path)
            if a and b and a != b
        )

    paths = [p for p in itertools.product(symbols, repeat=len(scores)) if reads_the_transcript(p)]
    totals = {p: sum(scores[frame, symbol] for frame, symbol in enumerate(p)) for p in paths}
    return max(totals.values()) if totals else None


@given(st.integers(1, 5), st.lists(st.integers(0, 1), min_size=1, max_size=3), st.integers(0, 1000))
def test_no_path_is_likelier(n_frames, token_ids, seed):
    scores = np.random.default_rng(seed).normal(size=(n_frames, 1 + len(token_ids)))
    spans = align_tokens(scores.astype(np.float32), token_ids)
    expected = best_of_all_paths(scores, token_ids)
    if expected is None:
        assert spans is None
        return
    path = np.zeros(n_frames, int)
    for token, (start, end) in enumerate(spans):
        assert start < end
        path[start:end] = token + 1
    assert scores[np.arange(n_frames), path].sum() == pytest.approx(expected, abs=1e-5)


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=20))
def test_tokens_are_found_where_they_stand(runs):
    """Each token after a gap of blanks, in frames that leave no doubt."""
    token_ids = [index % 3 for index in range(len(runs))]
    n_frames = sum(gap + length for gap, length in runs)
    scores = np.zeros((n_frames, 1 + len(runs)), np.float32)
    expected, at = [], 0
    for token, (gap, length) in enumerate(runs):
        scores[at : at + gap, 0] = 10
        scores[at + gap : at + gap + length, token + 1] = 10
        expected.append((at + gap, at + gap + length))
        at += gap + length
    assert align_tokens(scores, token_ids) == expected


def test_no_tokens_take_no_frames():
    assert align_tokens(np.zeros((3, 1), np.float32), []) == []


def test_the_frames_normaliser_changes_nothing():
    torch.manual_seed(0)
    head, frames, ids = torch.nn.Linear(8, 20), torch.randn(30, 8), [3, 3, 7, 1]
    with torch.inference_mode():
        scores = token_scores(head, frames, ids, blank=0)
        posteriors = head(frames).log_softmax(-1)[:, [0, *ids]].numpy()
    assert align_tokens(scores, ids) == align_tokens(posteriors, ids)


def test_words_are_what_whitespace_parts():
    # "we| are|,| here"; a token's offsets may hold the space in front of it.
    offsets = [(0, 2), (2, 6), (6, 7), (7, 12)]
    spans = [(1, 2), (4, 6), (6, 7), (9, 12)]
    words = word_spans("we are, here", offsets, spans, n_frames=14)
    assert [(w.text, w.start_frame, w.end_frame) for w in words] == [
        ("we", 1, 2), ("are,", 4, 7), ("here", 9, 12),
    ]  # fmt: skip


def test_a_comma_in_the_pause_hardly_lengthens_its_word():
    offsets = [(0, 1), (1, 4), (4, 5), (5, 9), (9, 11)]
    spans = [(1, 2), (4, 6), (30, 31), (40, 44), (60, 61)]
    words = word_spans('"are, not -', offsets, spans, n_frames=70)
    assert [(w.start_frame, w.end_frame) for w in words] == [(4, 18), (40, 44), (60, 61)]


def test_letters_of_several_tokens_make_one_word(tiny_checkpoint):
    transcriber = Transcriber.from_pretrained(tiny_checkpoint, "cpu")
    head = transcriber.model.ctc_head
    frames = torch.randn(200, head.in_features)
    with torch.inference_mode():
        words = align_words("Өнөөдөр хүйтэн  байна", transcriber.processor, head, frames)
    assert [word.text for word in words] == ["Өнөөдөр", "хүйтэн", "байна"]
    edges = [edge for word in words for edge in (word.start_frame, word.end_frame)]
    assert edges == sorted(edges)


def test_a_text_too_long_for_its_audio_is_not_placed(tiny_checkpoint):
    transcriber = Transcriber.from_pretrained(tiny_checkpoint, "cpu")
    head = transcriber.model.ctc_head
    with torch.inference_mode():
        text = "They were three hundred yards apart."
        assert align_words(text, transcriber.processor, head, torch.randn(3, 32)) is None


def test_words_that_the_head_cannot_hear_share_what_their_neighbours_leave():
    text, offsets = "ab c d ef g", [(0, 1), (1, 2), (3, 4), (5, 6), (7, 8), (8, 9), (10, 11)]
    spans = [None, (10, 12), None, None, (40, 41), None, None]
    words = word_spans(text, offsets, spans, n_frames=50)
    assert [(w.start_frame, w.end_frame) for w in words] == [
        (10, 12), (12, 26), (26, 40), (40, 41), (41, 50),
    ]  # fmt: skip
    first, *_ = word_spans("a b", [(0, 1), (2, 3)], [None, (7, 9)], n_frames=20)
    assert (first.start_frame, first.end_frame) == (0, 7)


def test_tokens_outside_of_the_head_leave_the_others_where_they_are(tiny_checkpoint):
    transcriber = Transcriber.from_pretrained(tiny_checkpoint, "cpu")
    model, processor = transcriber.model, transcriber.processor
    frames = torch.randn(200, model.ctc_head.in_features)
    heard, unheard = "zero one two", "three"
    with torch.inference_mode():
        expected = align_words(heard, processor, model.ctc_head, frames)
        tokens = {*processor.text_ids(heard)}
        cover_only(model, tokens)
        assert not tokens & {*processor.text_ids(" " + unheard)}
        assert align_words(heard, processor, model.ctc_head, frames) == expected
        *same, last = align_words(f"{heard} {unheard}", processor, model.ctc_head, frames)
        # Mostly guesses are no times.
        guesses = " ".join([heard[:4]] + [unheard] * 9)
        assert align_words(guesses, processor, model.ctc_head, frames) is None
    assert same == expected
    assert (last.text, last.start_frame, last.end_frame) == (unheard, same[-1].end_frame, 200)


def trimmed(waveform):
    """Where in a recording its loud part begins and ends, seconds."""
    power = np.convolve(waveform**2, np.ones(400) / 400, "same")
    loud = np.flatnonzero(power > 2e-3 * power.max())
    return loud[0] / 16_000, loud[-1] / 16_000


def test_words_of_real_speech_are_found_within_a_quarter_of_a_second(shared_data):
    transcriber = Transcriber.from_pretrained(REPOSITORY / "weights/default", "cpu")
    lines = (shared_data / "manifests/kathleen_test.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines[:5]]
    pieces, edges, at_s = [], [], 0.0
    for row in rows:
        waveform, _ = soundfile.read(shared_data / row["audio"], dtype="float32")
        start_s, end_s = trimmed(waveform)
        edges.append((at_s + start_s, at_s + end_s))
        pieces += [waveform, np.zeros(11_200, np.float32)]
        at_s += len(waveform) / 16_000 + 0.7
    model, processor = transcriber.model, transcriber.processor
    with torch.inference_mode():
        frames, lens = model.encode(*processor.features([np.concatenate(pieces)]))
        text = " ".join(row["text"] for row in rows)
        words = align_words(text, processor, model.ctc_head, frames[0, : lens[0]])
    assert [word.text for word in words] == text.split()
    for row, (start_s, end_s) in zip(rows, edges, strict=True):
        own, words = (words[: len(row["text"].split())], words[len(row["text"].split()) :])
        assert own[0].start_frame * ENCODER_FRAME_S == pytest.approx(start_s, abs=0.2)
        assert own[-1].end_frame * ENCODER_FRAME_S == pytest.approx(end_s, abs=0.25)
