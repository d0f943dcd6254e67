"""The project's own byte-level BPE."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.processing import SpeechLLMProcessor
from model.training.tokenizer import SPECIAL_TOKENS, train_tokenizer
from tests.conftest import SENTENCES

TOKENIZER = train_tokenizer(SENTENCES * 4, vocab_size=320)
# Lone surrogates are no text: UTF-8 cannot encode them.
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def ids_of(text):
    return TOKENIZER(text, add_special_tokens=False, split_special_tokens=True).input_ids


@given(TEXTS)
def test_any_text_comes_back_in_nfc(text):
    assert TOKENIZER.decode(ids_of(text)) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("text", ["ёстой хүйтэн", "й", "Й Ё Ө Ү", "e\u0301", "И\u0306"])
def test_diacritics_survive(text):
    assert TOKENIZER.decode(ids_of(text)) == unicodedata.normalize("NFC", text)


def test_composed_and_decomposed_letters_are_the_same_tokens():
    assert ids_of("й ё") == ids_of(unicodedata.normalize("NFD", "й ё"))


def test_special_tokens_come_first_and_pad_differs_from_eos():
    assert TOKENIZER.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3]
    assert TOKENIZER.pad_token_id == 0
    assert TOKENIZER.eos_token_id == 2


@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_special_tokens_written_in_a_text_stay_text(token):
    ids = ids_of(f"a {token} b")
    assert min(ids) >= len(SPECIAL_TOKENS)
    assert TOKENIZER.decode(ids) == f"a {token} b"


def test_digits_stand_alone():
    assert len(ids_of("20261234")) == 8


def test_saved_tokenizer_reads_the_same_and_keeps_its_chat_template(tmp_path):
    from transformers import AutoTokenizer, WhisperFeatureExtractor

    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in SENTENCES:
        assert loaded(text).input_ids == ids_of(text)
    around = SpeechLLMProcessor(WhisperFeatureExtractor(), loaded, prompt="?").prompt_ids()
    assert around.prefix == [1]
    assert around.suffix == [*ids_of("?"), 2, 1]


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(ValueError, match="at least 260, got 200"):
        train_tokenizer(SENTENCES, 200)
