"""The official SDK against a real server: only the address differs from OpenAI's."""

import asyncio
import io

import openai
import pytest
import srt
import webvtt
from openai import AsyncOpenAI, OpenAI

from tests.recordings import encode, speechlike

CLIP = encode(speechlike(1.5))
KEY, OTHER_KEY = "alice-0123456789abcdef", "bob-0123456789abcdefgh"


@pytest.fixture(scope="module")
def server(open_server):
    _, client = open_server
    return client


@pytest.fixture(scope="module")
def sdk(server):
    with connect(server) as client:
        yield client


def connect(server, key="none"):
    return OpenAI(base_url=f"{server.base_url}/v1", api_key=key, max_retries=0, timeout=60)


def create(sdk, file=CLIP, **options):
    options = {"model": "whisper-1", **options}
    return sdk.audio.transcriptions.create(file=("clip.wav", file), **options)


@pytest.fixture(scope="module")
def text(server):
    """What the server's own endpoint says of the clip."""
    said = server.post("/transcribe", files={"file": ("a", CLIP)}).json()["text"]
    assert said
    return said


def letters(text):
    return [c for c in text if c.isalnum()]


def test_json(sdk, text):
    answer = create(sdk)
    assert answer.text == text
    assert (answer.usage.type, answer.usage.seconds) == ("duration", 1.5)
    assert answer.logprobs is None


def test_json_with_logprobs(sdk, text):
    answer = create(sdk, include=["logprobs"], response_format="json")
    assert answer.text == text
    spelt = b"".join(bytes(map(int, each.bytes)) for each in answer.logprobs)
    assert spelt.decode(errors="replace").strip() == text
    assert all(each.logprob <= 0 for each in answer.logprobs)


def test_text(sdk, text):
    assert create(sdk, response_format="text") == text + "\n"


def test_srt(sdk, text):
    cues = list(srt.parse(create(sdk, response_format="srt")))
    assert letters("".join(cue.content for cue in cues)) == letters(text)
    times_s = [each.total_seconds() for cue in cues for each in (cue.start, cue.end)]
    assert times_s == sorted(times_s)
    assert 0.0 <= times_s[0] < times_s[-1] <= 1.5


def test_vtt(sdk, text):
    answer = create(sdk, response_format="vtt")
    assert answer.startswith("WEBVTT\n")
    cues = webvtt.from_buffer(io.StringIO(answer)).captions
    assert letters("".join(cue.text for cue in cues)) == letters(text)


def test_verbose_json(sdk, text):
    answer = create(sdk, response_format="verbose_json")
    assert (answer.text, answer.duration) == (text, 1.5)
    assert isinstance(answer.duration, float)
    (segment,) = answer.segments
    assert (segment.id, segment.end, segment.text) == (0, 1.5, text)
    assert 0 <= segment.start < 0.1  # where the voice begins
    assert segment.avg_logprob < 0
    assert segment.tokens
    assert answer.words is None


def test_verbose_json_with_words(sdk):
    answer = create(
        sdk, response_format="verbose_json", timestamp_granularities=["word", "segment"]
    )
    assert answer.segments
    assert "words" in answer.model_fields_set
    only_words = create(sdk, response_format="verbose_json", timestamp_granularities=["word"])
    assert only_words.segments is None


def test_a_stream(sdk, text):
    *deltas, done = create(sdk, stream=True)
    assert len(deltas) > 1
    assert {event.type for event in deltas} == {"transcript.text.delta"}
    assert "".join(event.delta for event in deltas) == text
    assert (done.type, done.text) == ("transcript.text.done", text)
    assert done.usage.seconds == 1.5


def test_a_stream_with_logprobs(sdk):
    *_, done = create(sdk, stream=True, include=["logprobs"])
    assert done.logprobs


def test_the_asynchronous_client(server, text):
    async def streamed():
        url = f"{server.base_url}/v1"
        async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as sdk:
            stream = await sdk.audio.transcriptions.create(
                model="whisper-1", file=("a.wav", CLIP), stream=True
            )
            return [event async for event in stream]

    assert asyncio.run(streamed())[-1].text == text


@pytest.mark.parametrize(
    "options",
    [
        {"language": "en"},
        {"prompt": "Юу вэ?"},
        {"temperature": 0.5},
        {"languages": ["en", "mn"]},
        {"chunking_strategy": "auto"},
        {"chunking_strategy": {"type": "server_vad", "threshold": 0.5, "prefix_padding_ms": 300}},
        {"extra_query": {"api-version": "2025-01-01"}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_options_are_taken(sdk, options):
    assert isinstance(create(sdk, **options).text, str)


def test_keywords_that_the_checkpoint_cannot_use_are_refused(sdk):
    with pytest.raises(openai.BadRequestError, match="takes no hotwords"):
        create(sdk, keywords=["Дорж", "Bat"])


def test_models(sdk):
    (model,) = sdk.models.list().data
    assert model.id == "checkpoint"  # its folder
    assert sdk.models.retrieve("whisper-1").id == model.id
    assert create(sdk, model=model.id).text
    with pytest.raises(openai.NotFoundError):
        sdk.models.retrieve("nope")


@pytest.mark.parametrize(
    ("arguments", "kind", "code", "param"),
    [
        ({"model": "gpt-9"}, openai.NotFoundError, "model_not_found", "model"),
        ({"file": b""}, openai.BadRequestError, "audio_empty", "file"),
        ({"file": b"a letter " * 50}, openai.APIStatusError, "audio_unrecognised", "file"),
        ({"language": "de"}, openai.BadRequestError, "language_unsupported", "language"),
        ({"temperature": 3.0}, openai.BadRequestError, "invalid_request", "temperature"),
        ({"extra_body": {"x": 1}}, openai.BadRequestError, "invalid_request", "x"),
        ({"known_speaker_names": ["a"]}, openai.BadRequestError, "invalid_request",
         "known_speaker_names"),
        ({"stream": True, "file": b"a letter " * 50}, openai.APIStatusError, "audio_unrecognised",
         "file"),
    ],
)  # fmt: skip
def test_errors_are_the_sdks_own(sdk, arguments, kind, code, param):
    with pytest.raises(kind) as raised:
        create(sdk, **arguments)
    assert (raised.value.code, raised.value.param) == (code, param)
    assert raised.value.type == "invalid_request_error"
    assert raised.value.request_id


def test_translations_are_refused_clearly(sdk):
    with (
        pytest.warns(DeprecationWarning, match="deprecated"),  # says the SDK
        pytest.raises(openai.BadRequestError, match="does not translate"),
    ):
        sdk.audio.translations.create(model="whisper-1", file=("a.wav", CLIP))


def test_keys_and_their_limits(start_server, tiny_checkpoint, tmp_path, text):
    keys = tmp_path / "keys"
    keys.write_text(f"# the team's\nalice:{KEY}\n{OTHER_KEY}\n")
    with start_server(
        "--model", tiny_checkpoint, "--device", "cpu", "--decode-workers", "1",
        "--api-keys-file", keys, "--key-audio-s-per-minute", "2",
    ) as (process, server):  # fmt: skip
        with connect(server, "wrong-0123456789abcdef") as sdk:
            with pytest.raises(openai.AuthenticationError) as refused:
                create(sdk)
            assert refused.value.code == "invalid_api_key"
            with pytest.raises(openai.AuthenticationError):
                sdk.models.list()
        with connect(server, KEY) as sdk:
            assert create(sdk).text == text
            assert create(sdk).text == text
            with pytest.raises(openai.RateLimitError) as refused:
                create(sdk)
            assert refused.value.code == "rate_limit_exceeded"
            assert 1 <= int(refused.value.response.headers["retry-after"]) <= 60
        with connect(server, OTHER_KEY) as sdk:
            assert create(sdk).text == text
        assert process.process.poll() is None
    assert not any(KEY in line for line in process.log)
