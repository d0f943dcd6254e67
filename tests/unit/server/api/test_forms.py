import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.forms import OpenAIForm, TranscribeForm, fold_chunking, parse_form
from server.engine.decoding import Decoding
from server.engine.interface import Capabilities
from server.errors import InvalidRequestError, LanguageUnsupportedError, RequestError
from server.options import TranscribeOptions

CAPABILITIES = Capabilities(max_audio_s=30.0, languages=("en", "mn"))


def own(**fields):
    return parse_form(TranscribeForm, fields.items()).options(CAPABILITIES)


def openai(*fields):
    return parse_form(OpenAIForm, fold_chunking(fields)).options(CAPABILITIES)


def test_nothing_said_is_the_default():
    assert own() == TranscribeOptions()
    assert openai() == TranscribeOptions()


def test_every_field_reaches_the_options():
    options = own(
        language="mn", prompt="Юу вэ?", hotwords="Дорж, Bat\nBat,", timestamps="word",
        previous_text="Өмнө",
        num_beams="4", n_best="2", logprobs="true", deadline_ms="1500", vad="false",
    )  # fmt: skip
    assert options == TranscribeOptions(
        language="mn", prompt="Юу вэ?", hotwords=("Дорж", "Bat"), timestamps="word",
        previous_text="Өмнө",
        decoding=Decoding(num_beams=4, n_best=2, logprobs=True), vad=False, deadline_s=1.5,
    )  # fmt: skip


def test_openais_prompt_is_the_text_before_where_the_checkpoint_reads_that():
    reader = Capabilities(30.0, context_templates=frozenset({"previous_text"}))
    form = parse_form(OpenAIForm, [("prompt", "So he left.")])
    assert form.options(reader) == TranscribeOptions(previous_text="So he left.")
    assert form.options(CAPABILITIES) == TranscribeOptions(prompt="So he left.")
    assert parse_form(OpenAIForm, [("prompt", " ")]).options(reader) == TranscribeOptions()


def test_n_best_brings_as_many_beams():
    assert own(n_best="3").decoding.num_beams == 3


@pytest.mark.parametrize(
    ("fields", "beams"),
    [
        ({}, 4),
        ({"num_beams": "1"}, 1),
        ({"num_beams": "2"}, 2),
        ({"n_best": "3"}, 4),
        ({"n_best": "5"}, 5),
        ({"response_format": "verbose_json"}, 4),
        # A search can be neither streamed nor sampled.
        ({"stream": "true"}, 1),
        ({"temperature": "0.5"}, 1),
        ({"progress": "true"}, 4),
    ],
)
def test_what_does_not_say_is_searched_as_the_checkpoint_wants(fields, beams):
    searching = Capabilities(30.0, num_beams=4)
    asked = parse_form(TranscribeForm, fields.items()).options(searching)
    assert asked.decoding.num_beams == beams
    if fields.keys() <= OpenAIForm.model_fields.keys():
        asked = parse_form(OpenAIForm, fields.items()).options(searching)
        assert asked.decoding.num_beams == beams


def test_times_are_wanted_where_an_answer_shows_them():
    assert not own().places_text
    assert not own(response_format="text").places_text
    assert own(timestamps="segment").places_text
    assert own(n_best="2").places_text
    assert own(response_format="srt", timestamps="none").timestamps == "segment"


@pytest.mark.parametrize(
    ("form", "timestamps"),
    [
        ("json", "none"),
        ("text", "none"),
        ("verbose_json", "segment"),
        ("srt", "word"),
        ("vtt", "word"),
    ],
)
def test_a_format_asks_for_the_times_that_it_can_show(form, timestamps):
    assert own(response_format=form).timestamps == timestamps
    assert openai(("response_format", form)).timestamps == timestamps


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"lang": "en"}, "lang"),
        ({"temperature": "warm"}, "temperature"),
        ({"temperature": "nan"}, "temperature"),
        ({"temperature": "2.1"}, "temperature"),
        ({"num_beams": "9"}, "num_beams"),
        ({"num_beams": "2", "n_best": "3"}, "n_best"),
        ({"n_best": "2", "response_format": "srt"}, "n_best"),
        ({"num_beams": "2", "temperature": "1"}, "num_beams"),
        ({"response_format": "xml"}, "response_format"),
        ({"timestamps": "syllable"}, "timestamps"),
        ({"stream": "maybe"}, "stream"),
        ({"stream": "1", "response_format": "srt"}, "stream"),
        ({"stream": "1", "progress": "1"}, "progress"),
        ({"logprobs": "1", "response_format": "text"}, "logprobs"),
        ({"deadline_ms": "0"}, "deadline_ms"),
        ({"vad": ""}, "vad"),
        ({"hotwords": "a" * 51}, "hotwords"),
        ({"hotwords": ",".join(map(str, range(101)))}, "hotwords"),
        ({"hotwords": "a\x00b"}, "hotwords"),
        ({"prompt": " "}, "prompt"),
        ({"prompt": "a" * 1001}, "prompt"),
        ({"language": "English!"}, "language"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(fields, param):
    with pytest.raises(InvalidRequestError) as raised:
        own(**fields)
    assert raised.value.param == param


def test_a_field_that_comes_twice_is_refused():
    with pytest.raises(InvalidRequestError, match="twice"):
        parse_form(TranscribeForm, [("vad", "true"), ("vad", "false")])


def test_a_language_that_the_checkpoint_does_not_name_is_refused_with_those_that_it_does():
    with pytest.raises(LanguageUnsupportedError, match="en, mn") as raised:
        own(language="de")
    assert raised.value.param == "language"
    assert (
        parse_form(TranscribeForm, [("language", "de")]).options(Capabilities(30.0)).language
        == "de"
    )


def test_the_sdks_lists_and_objects_are_understood():
    fields = [
        ("model", "whisper-1"), ("language", "en"), ("response_format", "verbose_json"),
        ("timestamp_granularities[]", "word"), ("timestamp_granularities[]", "segment"),
        ("keywords[]", "Дорж"), ("keywords[]", "Bat"),
        ("chunking_strategy[type]", "server_vad"), ("chunking_strategy[threshold]", "0.5"),
    ]  # fmt: skip
    form = parse_form(OpenAIForm, fold_chunking(fields))
    assert (form.words, form.segments) == (True, True)
    options = form.options(CAPABILITIES)
    assert (options.language, options.timestamps) == ("en", "word")
    assert options.hotwords == ("Дорж", "Bat")


@pytest.mark.parametrize("strategy", ["auto", "", '{"type": "server_vad", "threshold": 0.4}'])
def test_a_chunking_strategy_is_taken(strategy):
    openai(("chunking_strategy", strategy))


@pytest.mark.parametrize(
    "strategy",
    ["none", "[1]", "{", '{"type": "x"}', '{"type": "server_vad", "threshold": "loud"}', "[" * 9999,
     '{"type": "server_vad", "threshold": NaN}', '{"type": "server_vad", "other": 1}',
     '{"type": "server_vad", "threshold": ' + "9" * 400 + "}"],
)  # fmt: skip
def test_another_chunking_strategy_is_refused(strategy):
    with pytest.raises(InvalidRequestError) as raised:
        openai(("chunking_strategy", strategy))
    assert raised.value.param == "chunking_strategy"


def test_one_of_several_possible_languages_is_left_to_the_model():
    assert openai(("languages[]", "en"), ("languages[]", "mn")).language is None
    assert openai(("languages[]", "mn")).language == "mn"
    with pytest.raises(LanguageUnsupportedError):
        openai(("languages[]", "en"), ("languages[]", "de"))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ([("include[]", "logprobs"), ("response_format", "text")], "include"),
        ([("include[]", "tokens")], "include"),
        ([("timestamp_granularities[]", "word")], "timestamp_granularities"),
        ([("known_speaker_names[]", "agent")], "known_speaker_names"),
        ([("response_format", "diarized_json")], "response_format"),
        ([("response_format", "tsv")], "response_format"),
    ],
)
def test_what_openais_api_refuses_is_refused_here(fields, param):
    with pytest.raises(InvalidRequestError) as raised:
        openai(*fields)
    assert raised.value.param == param


NAMES = st.sampled_from([*TranscribeForm.model_fields, *OpenAIForm.model_fields, "x[]", "a[b"])


@given(st.lists(st.tuples(NAMES, st.text(max_size=20))))
def test_any_fields_are_options_or_a_refusal(fields):
    for form in (TranscribeForm, OpenAIForm):
        with contextlib.suppress(RequestError):
            options = parse_form(form, fold_chunking(fields)).options(CAPABILITIES)
            assert isinstance(options, TranscribeOptions)


def test_the_examples_in_the_api_document_are_taken():
    for form in (TranscribeForm, OpenAIForm):
        for name, field in form.model_fields.items():
            for example in field.examples:
                values = example if isinstance(example, list) else [example]
                texts = [v if isinstance(v, str) else json.dumps(v) for v in values]
                parse_form(form, [(field.alias or name, text) for text in texts])
