import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.evaluation.normalisation import normalise_basic, normalise_english, normaliser_for


@pytest.mark.parametrize("language", ["en", "EN", "en-US", "en_GB", "english"])
def test_english_tags_choose_whispers_english_normaliser(language):
    assert normaliser_for(language) is normalise_english


@pytest.mark.parametrize("language", ["mn", "mn-MN", "kk", "de", "enm", "", None])
def test_other_tags_choose_the_basic_normaliser(language):
    assert normaliser_for(language) is normalise_basic


@pytest.mark.parametrize(
    ("spoken", "expected"),
    [
        ("Colour", "color"),
        ("archaeology", "archeology"),
        ("twenty five", "25"),
        ("one oh one", "101"),
        ("Mr. Smith won't go.", "mister smith will not go"),
        ("uh, I'm analysing it", "i am analyzing it"),
        ("It cost twenty dollars.", "it cost $20"),
        ("", ""),
        ("Hmm.", ""),
    ],
)
def test_english_is_normalised_as_whisper_does(spoken, expected):
    assert normalise_english(spoken) == expected


def test_mongolian_letters_with_marks_survive():
    text = "Йод, ёлк, ӨНДӨР — Үүл!"
    assert normalise_basic(text) == "йод ёлк өндөр үүл"


def test_decomposed_mongolian_equals_composed():
    composed = "Хайрт ёотой найз"
    decomposed = unicodedata.normalize("NFD", composed)
    assert decomposed != composed
    assert normalise_basic(decomposed) == normalise_basic(composed) == composed.lower()


def test_short_i_and_io_stay_different_from_their_bare_letters():
    assert normalise_basic("сайн") != normalise_basic("саин")
    assert normalise_basic("ёс") != normalise_basic("ес")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("«Сайн уу?»", "сайн уу"),
        ("аав-ээж", "аав ээж"),
        ("100 ₮", "100"),
        ("  нэг\t\nхоёр  ", "нэг хоёр"),
        ("мо\u00adнгол\ufeff", "монгол"),
        ("नमस्ते।", "नमस्ते"),
        ("ДОМ́", "дом́"),
    ],
)
def test_basic_strips_punctuation_and_keeps_letters(text, expected):
    assert normalise_basic(text) == expected


@given(st.text())
def test_basic_is_idempotent(text):
    once = normalise_basic(text)
    assert normalise_basic(once) == once


@given(st.text())
def test_basic_does_not_depend_on_the_unicode_composition_of_its_input(text):
    decomposed = unicodedata.normalize("NFD", text)
    recomposed = unicodedata.normalize("NFC", decomposed)
    assert normalise_basic(recomposed) == normalise_basic(unicodedata.normalize("NFC", text))


@given(st.text(alphabet="абвгдеёжзийклмноөпрстуүфхцчшщъыьэюя", min_size=1))
def test_basic_leaves_every_mongolian_letter_as_it_is(word):
    assert normalise_basic(word) == word
