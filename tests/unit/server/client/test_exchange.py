import io
import json
import os

import httpx
import pytest

from server.client import (
    AuthenticationError,
    ClientError,
    ConnectionFailedError,
    OverloadedError,
    Progress,
    RequestRefusedError,
    ServerFailedError,
    TextDelta,
    Transcription,
    UnexpectedAnswerError,
)
from server.client.exchange import (
    EventReader,
    answer_of,
    http_options,
    model_names,
    read_audio,
    refusal,
    transcribe_request,
    transcription_of,
)
from server.client.results import transcription_from

TIMINGS = {"decode": 0.0, "queue": 0.0, "encode": 0.1, "generate": 0.2, "total": 0.3}
BODY = {
    "text": "Өнөөдөр хүйтэн", "language": "mn", "duration": 2.5, "timings": TIMINGS,
    "alignment": "ctc",
    "segments": [
        {
            "start": 0.5, "end": 2.0, "text": "Өнөөдөр хүйтэн", "finish_reason": "stop",
            "words": [{"word": "Өнөөдөр", "start": 0.5, "end": 1.0}],
            "hypotheses": [{"text": "Өнөөдөр хүйтэн", "score": -0.1}],
        }
    ],
    "logprobs": [{"token": "�", "bytes": [211], "logprob": -0.5}],
}  # fmt: skip


def error_answer(status, family, headers=None, **fields):
    error = {"message": "why", "type": family, "code": "a_code", "param": None, "request_id": "r1"}
    return httpx.Response(status, json={"error": error | fields}, headers=headers)


def test_options_are_written_as_the_form_takes_them():
    request = transcribe_request(
        ("a.wav", b"RIFF"), {"hotwords": ["Улаанбаатар", "Hovd"], "vad": False, "n_best": 3}
    )
    assert request["data"] == {"hotwords": "Улаанбаатар,Hovd", "vad": "false", "n_best": "3"}


def test_a_recording_may_be_bytes_a_path_or_a_file(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(b"RIFF")
    assert read_audio(b"RIFF") == ("recording", b"RIFF")
    assert read_audio(io.BytesIO(b"RIFF")) == ("recording", b"RIFF")
    assert read_audio(path) == read_audio(str(path)) == ("a.wav", b"RIFF")
    with path.open("rb") as file:
        assert read_audio(file) == ("a.wav", b"RIFF")


def test_the_key_comes_from_the_environment_unless_one_is_given(monkeypatch):
    monkeypatch.setenv("SPEECHLLM_API_KEY", "from-the-environment")
    url = "http://127.0.0.1:8000"
    headers = http_options(url, None, 1.0)["headers"]
    assert headers["Authorization"] == "Bearer from-the-environment"
    assert http_options(url, "given", 1.0)["headers"]["Authorization"] == "Bearer given"
    assert "Authorization" not in http_options(url, "", 1.0)["headers"]


def test_a_key_s_line_end_is_no_part_of_it(monkeypatch):
    monkeypatch.setenv("SPEECHLLM_API_KEY", "secret\n")
    headers = http_options("http://127.0.0.1:8000", None, 1.0)["headers"]
    assert headers["Authorization"] == "Bearer secret"
    with pytest.raises(ClientError) as refused:
        http_options("http://127.0.0.1:8000", "sec\nret", 1.0)
    assert "sec" not in str(refused.value)


def test_an_address_needs_its_scheme():
    with pytest.raises(ClientError, match="is no address of a server"):
        http_options("127.0.0.1:8000", None, 1.0)


def test_what_is_no_unicode_is_refused_or_replaced(tmp_path):
    with pytest.raises(ClientError, match="prompt"):
        transcribe_request(("a.wav", b""), {"prompt": os.fsdecode(b"\xff")})
    path = tmp_path / os.fsdecode(b"m\xff.wav")
    path.write_bytes(b"RIFF")
    assert read_audio(path) == ("m?.wav", b"RIFF")


def test_another_server_s_error_is_told_as_such():
    answer = httpx.Response(404, json={"status": 404, "error": "Not Found"})
    assert isinstance(refusal(answer), UnexpectedAnswerError)


def test_everything_of_an_answer_is_read():
    answer = transcription_of(
        answer_of(httpx.Response(200, json=BODY, headers={"X-Request-ID": "r1"}))
    )
    assert (answer.text, answer.language, answer.duration_s) == ("Өнөөдөр хүйтэн", "mn", 2.5)
    assert (answer.timings.total, answer.alignment, answer.request_id) == (0.3, "ctc", "r1")
    (segment,) = answer.segments
    assert (segment.start_s, segment.end_s, segment.words[0].text) == (0.5, 2.0, "Өнөөдөр")
    assert segment.hypotheses[0].score == -0.1
    assert answer.logprobs[0].text == b"\xd3"


def test_what_was_not_asked_for_is_none():
    plain = {name: BODY[name] for name in ("text", "language", "duration", "timings")}
    answer = transcription_of(answer_of(httpx.Response(200, json=plain)))
    assert answer.segments is answer.alignment is answer.logprobs is answer.request_id is None


@pytest.mark.parametrize("answer", [b"<html>", b"[]", b"{}", b'{"text": "", "timings": 3}'])
def test_an_answer_of_another_program_is_told_as_such(answer):
    with pytest.raises(UnexpectedAnswerError):
        transcription_of(answer_of(httpx.Response(200, content=answer)))
    with pytest.raises(UnexpectedAnswerError):
        model_names(httpx.Response(200, content=answer))


@pytest.mark.parametrize(
    ("status", "family", "kind"),
    [
        (401, "invalid_request_error", AuthenticationError),
        (415, "invalid_request_error", RequestRefusedError),
        (429, "rate_limit_error", OverloadedError),
        (503, "capacity_error", OverloadedError),
        (504, "capacity_error", ServerFailedError),
        (500, "internal_error", ServerFailedError),
    ],
)
def test_errors_are_typed_and_keep_what_the_server_says(status, family, kind):
    error = refusal(error_answer(status, family, {"Retry-After": "3"}, param="file"))
    assert type(error) is kind
    assert (str(error), error.code, error.param, error.request_id) == (
        "why",
        "a_code",
        "file",
        "r1",
    )
    assert (error.status, error.retry_after_s) == (status, 3.0)


def test_a_proxys_refusal_is_tried_again_and_its_other_errors_are_not():
    assert isinstance(refusal(httpx.Response(503, html="<h1>busy</h1>")), OverloadedError)
    assert isinstance(refusal(httpx.Response(502, html="<h1>gone</h1>")), UnexpectedAnswerError)


def stream_of(*events):
    frames = [json.dumps(event, ensure_ascii=False) for event in events]
    return "".join(f"data: {frame}\n\n" for frame in [*frames, "[DONE]"]).encode()


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_events_may_be_cut_anywhere_and_hold_any_character(size):
    delta = "a b\x85c Өнөөдөр"
    data = stream_of(
        {"type": "transcript.text.delta", "delta": delta},
        {"type": "transcript.progress", "processed": 1.5, "duration": None},
        {"type": "transcript.text.done", **BODY},
    )
    reader = EventReader(httpx.Response(200), transcription_from)
    chunks = [data[at : at + size] for at in range(0, len(data), size)]
    events = [event for chunk in chunks for event in reader.feed(chunk)]
    reader.end()
    assert events[0] == TextDelta(delta)
    assert events[1] == Progress(1.5, None)
    assert isinstance(events[2], Transcription)
    assert len(events) == 3


def test_a_stream_that_breaks_off_is_no_whole_one():
    reader = EventReader(httpx.Response(200), transcription_from)
    list(reader.feed(b'data: {"type":"transcript.text.delta","delta":"Where"}\n\n'))
    with pytest.raises(ConnectionFailedError, match="broke off"):
        reader.end()


def test_an_error_within_a_stream_is_raised():
    reader = EventReader(httpx.Response(200), transcription_from)
    body = error_answer(500, "internal_error").json()
    with pytest.raises(ServerFailedError, match="why"):
        list(reader.feed(stream_of(body)))
