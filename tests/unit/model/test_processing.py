"""The token sequence, built in one place."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, WhisperFeatureExtractor

from model.assembly import prepare_tokenizer
from model.checkpoint import load_config, load_processor
from model.configuration import DEFAULT_PROMPT
from model.modeling import IGNORED_LABEL
from model.processing import SpeechLLMProcessor, previous_text_tail, token_budget


@pytest.fixture(scope="module")
def processor(tiny_checkpoint: Path) -> SpeechLLMProcessor:
    return load_processor(tiny_checkpoint)


def clip(seconds: float) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(int(16_000 * seconds)).astype(np.float32) / 10


def test_sequence_is_prefix_audio_suffix_target_eos(processor: SpeechLLMProcessor) -> None:
    target = processor.text_ids("Нягтлан бодох.")
    ids = processor.prompt_ids()
    batch = processor.sequences([3], [target])
    audio, eos = [processor.audio_token_id] * 3, [processor.tokenizer.eos_token_id]
    assert batch["input_ids"][0].tolist() == ids.prefix + audio + ids.suffix + target + eos


def test_loss_is_on_target_and_eos_only(processor: SpeechLLMProcessor) -> None:
    targets = [processor.text_ids("zero one"), processor.text_ids("two")]
    batch = processor.sequences([2, 5], targets)
    for row, target in zip(batch["labels"].tolist(), targets, strict=True):
        learnt = [label for label in row if label != IGNORED_LABEL]
        assert learnt == [*target, processor.tokenizer.eos_token_id]
    labelled = batch["labels"] != IGNORED_LABEL
    assert torch.equal(batch["labels"][labelled], batch["input_ids"][labelled])
    assert torch.all(batch["attention_mask"][labelled] == 1)


def test_an_empty_transcript_teaches_eos_alone(processor: SpeechLLMProcessor) -> None:
    labels = processor.sequences([2], [[]])["labels"]
    assert labels[labels != IGNORED_LABEL].tolist() == [processor.tokenizer.eos_token_id]


def test_training_pads_right_and_generation_left(processor: SpeechLLMProcessor) -> None:
    pad = processor.tokenizer.pad_token_id
    training = processor.sequences([1, 4], [[5], [5]])
    generating = processor.sequences([1, 4])
    assert training["input_ids"][0, -3:].tolist() == [pad] * 3
    assert training["attention_mask"][0, -4:].tolist() == [1, 0, 0, 0]
    assert generating["input_ids"][0, :3].tolist() == [pad] * 3
    assert generating["attention_mask"][0, :4].tolist() == [0, 0, 0, 1]
    assert "labels" not in generating


def test_parts_are_tokenised_separately(processor: SpeechLLMProcessor) -> None:
    # A tokenizer that saw prompt and answer together could merge "nine" with what precedes it.
    target = processor.text_ids("nine")
    ids = processor.sequences(
        [1], [target], prompts=["zero one two three four five six seven eight"]
    )
    assert ids["input_ids"][0, -len(target) - 1 : -1].tolist() == target


@pytest.mark.parametrize("text", ["<|im_end|>", "say <|audio|> now", "<|endoftext|>"])
def test_special_tokens_in_text_from_outside_are_plain_text(
    processor: SpeechLLMProcessor, text: str
) -> None:
    special = set(processor.tokenizer.all_special_ids)
    assert not special & set(processor.text_ids(text))
    assert processor.tokenizer.decode(processor.text_ids(text)) == text
    suffix = processor.prompt_ids(text).suffix
    assert processor.audio_token_id not in suffix
    assert sum(token in special for token in suffix) == sum(
        token in special for token in processor.prompt_ids("").suffix
    )


def test_prompt_is_configurable_and_per_clip(processor: SpeechLLMProcessor) -> None:
    assert processor.prompt == DEFAULT_PROMPT
    batch = processor.sequences([1, 1], prompts=["two", None])
    rows = [processor.tokenizer.decode(row) for row in batch["input_ids"]]
    assert "two" in rows[0]
    assert DEFAULT_PROMPT not in rows[0]
    assert DEFAULT_PROMPT in rows[1]


def test_call_makes_everything_generate_needs(processor: SpeechLLMProcessor) -> None:
    batch = processor([clip(1.0), clip(0.5)], ["one", "two"])
    assert batch["input_features"].shape == (2, 80, 100)
    assert batch["feature_lens"].tolist() == [100, 50]
    audio = (batch["input_ids"] == processor.audio_token_id).sum(1)
    assert audio.tolist() == [13, 7]  # 100 mel frames -> 50 encoder frames -> stacks of 4
    assert set(batch) == {
        "input_features", "feature_lens", "input_ids", "attention_mask", "labels",
    }  # fmt: skip


def test_another_sampling_rate_is_refused(processor: SpeechLLMProcessor) -> None:
    with pytest.raises(ValueError, match="16000 Hz, got 8000"):
        processor(clip(1), sampling_rate=8_000)


def test_as_many_texts_as_clips_are_wanted(processor: SpeechLLMProcessor) -> None:
    with pytest.raises(ValueError, match="2 clips need as many texts"):
        processor([clip(1), clip(1)], ["one"])


def test_pad_equal_to_eos_is_refused(processor: SpeechLLMProcessor, tiny_checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.raises(ValueError, match="must exist and differ"):
        SpeechLLMProcessor(WhisperFeatureExtractor(), tokenizer)


def test_a_tokenizer_without_the_audio_token_is_refused(tiny_checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    with pytest.raises(ValueError, match="no entry '<sound>'"):
        SpeechLLMProcessor(WhisperFeatureExtractor(), tokenizer, audio_token="<sound>")  # noqa: S106 - a token, not a password


def test_a_tokenizer_without_chat_template_gets_a_plain_sequence(tiny_checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    tokenizer.chat_template = None
    plain = SpeechLLMProcessor(WhisperFeatureExtractor(), tokenizer, prompt="zero")
    ids = plain.prompt_ids()
    assert ids.prefix == []
    assert plain.tokenizer.decode(ids.suffix) == "zero\n"


@pytest.fixture(scope="module")
def qwen(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> SpeechLLMProcessor:
    """A processor on Qwen2.5's tokenizer; its template adds a system turn, as Qwen's does."""
    folder = tmp_path_factory.mktemp("qwen")
    (folder / "tokenizer.json").symlink_to(shared_data / "qwen2.5-tokenizer" / "tokenizer.json")
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": (
            "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
            "{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
            "<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        ),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = prepare_tokenizer(str(folder))
    made = SpeechLLMProcessor(WhisperFeatureExtractor(), tokenizer)
    made.save_pretrained(folder / "saved")
    return SpeechLLMProcessor.from_pretrained(folder / "saved")


def test_qwen_tokenizer_is_prepared_on_spare_ids(qwen: SpeechLLMProcessor) -> None:
    assert 151_643 <= qwen.audio_token_id < 151_936  # Qwen2.5's embedding has spare rows
    ends = (qwen.tokenizer.pad_token, qwen.tokenizer.eos_token)
    assert ends == ("<|endoftext|>", "<|im_end|>")
    row = qwen.sequences([2], [qwen.text_ids("Сайн уу?")])["input_ids"][0]
    assert qwen.tokenizer.decode(row) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n"
        "<|im_start|>user\n<|audio|><|audio|>Юу гэж хэлсэн бэ?<|im_end|>\n"
        "<|im_start|>assistant\nСайн уу?<|im_end|>"
    )


def test_qwen_merges_do_not_cross_the_parts_boundaries(qwen: SpeechLLMProcessor) -> None:
    prompt, target = "trans", "late"
    joint = qwen.tokenizer(prompt + target, add_special_tokens=False).input_ids
    apart = qwen.text_ids(prompt) + qwen.text_ids(target)
    assert joint != apart  # jointly tokenised, the labels would shift
    qwen.tokenizer.chat_template, kept = None, qwen.tokenizer.chat_template
    try:
        ids = qwen.sequences([1], [qwen.text_ids("\n")], prompts=["x"])["input_ids"][0].tolist()
    finally:
        qwen.tokenizer.chat_template = kept
    newline = qwen.text_ids("\n")
    # The template's own newline and the target's stay two tokens.
    assert ids == [
        qwen.audio_token_id, *qwen.text_ids("x"), *newline, *newline, qwen.tokenizer.eos_token_id,
    ]  # fmt: skip


def test_qwen_reads_special_tokens_in_text_as_plain_text(qwen: SpeechLLMProcessor) -> None:
    text = "a<|im_end|>b<|audio|>"
    assert max(qwen.text_ids(text)) < 151_643
    assert qwen.decode_transcript(qwen.text_ids(text)) == text
    marks = [qwen.audio_token_id, *qwen.text_ids("a"), qwen.tokenizer.eos_token_id]
    assert qwen.decode_transcript(marks) == "a"


def test_a_template_that_loses_the_turn_is_refused(tiny_checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    tokenizer.chat_template = "{{ messages[0].role }}"
    broken = SpeechLLMProcessor(WhisperFeatureExtractor(), tokenizer)
    with pytest.raises(ValueError, match="drops or reorders the user's turn"):
        broken.prompt_ids()


def test_token_budget_grows_with_duration(tiny_checkpoint: Path) -> None:
    config = load_config(tiny_checkpoint)
    assert token_budget(config, 0.1) == 5
    assert token_budget(config, 10.0) == 44


def test_before_the_audio_stands_what_the_model_was_trained_to_read(tiny_checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    made = SpeechLLMProcessor(
        WhisperFeatureExtractor(), tokenizer, prompt="Say.", context_templates={"hotwords": "[{}] "}
    )
    context = made.context(hotwords="zero, one")
    assert context == "[zero, one] "
    assert made.context(hotwords="{} {}") == "[{} {}] "
    assert not made.context(hotwords="")
    plain, extended = made.prompt_ids(), made.prompt_ids(context=context)
    assert extended.prefix == plain.prefix + made.text_ids(context)
    assert extended.suffix == plain.suffix
    batch = made.sequences([2, 2], contexts=["", context])
    rows = [
        row[mask.bool()].tolist()
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    audio = [made.audio_token_id] * 2
    assert rows == [[*ids.prefix, *audio, *ids.suffix] for ids in (plain, extended)]
    with pytest.raises(ValueError, match="takes no previous_text"):
        made.context(previous_text="zero")


@pytest.mark.parametrize(
    ("text", "tail"),
    [
        ("short", "short"),
        ("first " + "x" * 155, "x" * 155),
        ("ө" * 100, "ө" * 80),
        ("аа " * 60, ("аа " * 32).strip()),
        ("б " + "аа " * 31 + "ббббб", "аа " * 30 + "ббббб"),
    ],
)
def test_of_the_text_before_the_last_whole_words_are_kept(text: str, tail: str) -> None:
    assert previous_text_tail(text) == tail


@pytest.mark.parametrize(
    ("additions", "reason"),
    [
        ({"keywords": "{}"}, "not 'keywords'"),
        ({"hotwords": "Words:"}, "needs {} once"),
        ({"hotwords": "{} {}"}, "needs {} once"),
        ({"hotwords": 5}, "needs {} once"),
    ],
)
def test_an_addition_needs_a_known_name_and_one_place(
    tiny_checkpoint: Path, additions: dict[str, Any], reason: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    with pytest.raises(ValueError, match=reason):
        SpeechLLMProcessor(WhisperFeatureExtractor(), tokenizer, context_templates=additions)
