import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from model.token_bytes import TokenBytes
from model.training.tokenizer import train_tokenizer
from tests.conftest import SENTENCES

TOKENIZER = train_tokenizer(SENTENCES * 4, vocab_size=320)


@given(st.text(st.characters(codec="utf-8"), max_size=30))
@example("a<|endoftext|>b")  # spelt in a text, it is the special token
def test_the_bytes_of_a_texts_tokens_are_the_texts(text):
    token_bytes = TokenBytes(TOKENIZER)
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    normalised = TOKENIZER.decode(ids, skip_special_tokens=True)
    assert b"".join(map(token_bytes, ids)).decode(errors="replace") == normalised


@pytest.mark.parametrize("character", ["ё", "語", "🙂"])
def test_a_part_of_a_character_is_its_bytes(character):
    token_bytes = TokenBytes(TOKENIZER)
    ids = TOKENIZER(character, add_special_tokens=False)["input_ids"]
    assert b"".join(map(token_bytes, ids)) == character.encode()


def test_a_special_token_writes_nothing():
    assert TokenBytes(TOKENIZER)(TOKENIZER.eos_token_id) == b""


def test_an_id_that_stands_for_no_token_writes_nothing():
    """An LLM's vocabulary may be padded: Qwen2.5's is, by 271 rows."""
    assert TokenBytes(TOKENIZER)(len(TOKENIZER) + 7) == b""


def test_another_kind_of_tokenizer_tells_its_text():
    words = Tokenizer(models.WordLevel({"hello": 0}, "hello"))
    words.decoder = decoders.Fuse()
    assert TokenBytes(PreTrainedTokenizerFast(tokenizer_object=words))(0) == b"hello"


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.Metaspace(),
        decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        ),
    ],
)
def test_spaces_and_bytes_of_sentencepiece_are_kept(decoder):
    """Llama's and Gemma's kind of tokenizer, whose decoder drops a space that stands first."""
    pieces = ["<unk>", "▁where", "▁did", "ever", "▁", "<0xD0>", "<0xB9>"]
    spelt = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    spelt.pre_tokenizer, spelt.decoder = pre_tokenizers.Metaspace(), decoder
    token_bytes = TokenBytes(PreTrainedTokenizerFast(tokenizer_object=spelt))
    assert [token_bytes(i) for i in range(1, 5)] == [b" where", b" did", b"ever", b" "]
    if not isinstance(decoder, decoders.Metaspace):
        assert token_bytes(5) + token_bytes(6) == "й".encode()
