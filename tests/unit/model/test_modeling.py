"""The speech LLM: what it computes depends on the clip alone, and it learns."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    GemmaConfig,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
)

from model.checkpoint import load_model, load_processor
from model.configuration import SpeechLLMConfig
from model.modeling import SpeechLLMForConditionalGeneration, beside_text
from model.processing import SpeechLLMProcessor
from model.transcription import Transcriber
from tests.conftest import make_tiny_checkpoint
from tests.speech_models import cover_only

SECONDS = (0.3, 1.7, 0.9)
TEXTS = ["zero one", "Өнөөдөр хүйтэн байна, ёстой!", "They were apart."]


def clips() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [(0.1 * rng.standard_normal(int(16_000 * s))).astype(np.float32) for s in SECONDS]


@pytest.fixture(scope="module", params=["sequence", "ctc"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    make_tiny_checkpoint(
        folder,
        audio_positions=request.param,
        connector={"stack_size": 4, "hidden_size": 64, "convolutions": 1},
    )
    return folder


@pytest.fixture(scope="module")
def processor(checkpoint: Path) -> SpeechLLMProcessor:
    return load_processor(checkpoint)


@pytest.fixture
def model(checkpoint: Path) -> SpeechLLMForConditionalGeneration:
    return load_model(checkpoint)


@torch.inference_mode()
def test_logits_of_a_batch_equal_those_of_each_clip_alone(
    model: SpeechLLMForConditionalGeneration, processor: SpeechLLMProcessor
) -> None:
    batch = processor(clips(), TEXTS)
    logits = model(**batch).logits
    for index, waveform in enumerate(clips()):
        alone = processor([waveform], [TEXTS[index]])
        expected = model(**alone).logits[0]
        torch.testing.assert_close(logits[index, : len(expected)], expected, atol=1e-4, rtol=1e-3)


@torch.inference_mode()
def test_generate_of_a_batch_equals_each_clip_alone(
    model: SpeechLLMForConditionalGeneration, processor: SpeechLLMProcessor
) -> None:
    options = {"max_new_tokens": 12, "do_sample": False}
    batch = processor(clips())
    together = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    assert len({tuple(row) for row in together.tolist()}) > 1
    for row, waveform in zip(together, clips(), strict=True):
        alone = processor([waveform])
        expected = model.generate(**alone, **options)[0, alone["input_ids"].shape[1] :]
        assert row[: len(expected)].tolist() == expected.tolist()


@torch.inference_mode()
def test_answers_are_decoded_jointly_with_the_ctc_head(
    model: SpeechLLMForConditionalGeneration, processor: SpeechLLMProcessor
) -> None:
    options = {"max_new_tokens": 12, "do_sample": False}

    def answers(batch: dict[str, torch.Tensor], **more: int) -> list[list[int]]:
        ids = model.generate(**batch, **options, **more)[:, batch["input_ids"].shape[1] :]
        return [[token for token in row if token > 1] for row in ids.tolist()]

    batch = processor(clips())
    alone = answers(batch)
    model.config.ctc_decoding_weight = 0.9
    jointly = answers(batch)
    assert jointly != alone
    assert jointly == [answers(processor([clip]))[0] for clip in clips()]
    searched = answers(batch, num_beams=3)
    assert searched == [answers(processor([clip]), num_beams=3)[0] for clip in clips()]
    frames, frame_lens = model.encode(batch["input_features"], batch["feature_lens"])
    cached = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert answers({**cached, "encoder_frames": frames, "frame_lens": frame_lens}) == jointly


def test_joint_decoding_takes_the_options_of_generate(
    model: SpeechLLMForConditionalGeneration, processor: SpeechLLMProcessor
) -> None:
    model.config.ctc_decoding_weight = 0.5
    batch = processor(clips()[:1])
    several = model.generate(**batch, max_new_tokens=4, num_beams=3, num_return_sequences=3)
    assert len(several) == 3
    assert not several.requires_grad
    plain = model.generate(**batch, max_new_tokens=6, do_sample=False)
    ends = plain[0, batch["input_ids"].shape[1] + 2].item()
    given = GenerationConfig(eos_token_id=[2, ends], pad_token_id=0)
    by_config = model.generate(**batch, max_new_tokens=6, do_sample=False, generation_config=given)
    by_option = model.generate(
        **batch, max_new_tokens=6, do_sample=False, eos_token_id=torch.tensor([2, ends])
    )
    assert by_config.tolist() == by_option.tolist()
    endless = model.generate(**batch, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert endless.shape[1] == batch["input_ids"].shape[1] + 6
    with pytest.raises(ValueError, match="no assisted decoding"):
        model.generate(**batch, prompt_lookup_num_tokens=2)


@torch.inference_mode()
def test_generate_without_a_cache_and_with_beams_reads_the_audio_too(
    model: SpeechLLMForConditionalGeneration, processor: SpeechLLMProcessor
) -> None:
    batch = processor(clips()[:2])
    greedy = model.generate(**batch, max_new_tokens=6, do_sample=False)
    uncached = model.generate(**batch, max_new_tokens=6, do_sample=False, use_cache=False)
    assert uncached.tolist() == greedy.tolist()
    beams = model.generate(**batch, max_new_tokens=6, do_sample=False, num_beams=2)
    alone = processor([clips()[1]])
    expected = model.generate(**alone, max_new_tokens=6, do_sample=False, num_beams=2)
    n_new = expected.shape[1] - alone["input_ids"].shape[1]
    assert beams[1, batch["input_ids"].shape[1] :][:n_new].tolist() == expected[0, -n_new:].tolist()


@torch.inference_mode()
def test_cached_encoder_frames_give_the_same_logits_as_the_audio(
    model: SpeechLLMForConditionalGeneration, processor: SpeechLLMProcessor
) -> None:
    batch = processor(clips(), TEXTS)
    expected = model(**batch).logits
    frames, frame_lens = model.encode(batch.pop("input_features"), batch.pop("feature_lens"))
    again = model(**batch, encoder_frames=frames, frame_lens=frame_lens).logits
    torch.testing.assert_close(again, expected)


@torch.inference_mode()
def test_what_lies_past_a_clip_changes_nothing(
    model: SpeechLLMForConditionalGeneration, processor: SpeechLLMProcessor
) -> None:
    batch = processor(clips(), TEXTS)
    expected = model(**batch).logits
    features = batch["input_features"]
    for row, length in zip(features, batch["feature_lens"], strict=True):
        row[:, length:] = 1e3
    torch.testing.assert_close(model(**batch).logits, expected, atol=1e-4, rtol=1e-3)


@torch.inference_mode()
def test_teacher_forced_logits_equal_step_by_step_logits(
    model: SpeechLLMForConditionalGeneration, processor: SpeechLLMProcessor
) -> None:
    batch = processor([clips()[1]], [TEXTS[1]])
    expected = model(**batch).logits[0]
    n_target = int((batch["labels"] != -100).sum())
    n_prompt = batch["input_ids"].shape[1] - n_target
    output = model(
        input_ids=batch["input_ids"][:, :n_prompt],
        attention_mask=batch["attention_mask"][:, :n_prompt],
        input_features=batch["input_features"],
        feature_lens=batch["feature_lens"],
        use_cache=True,
    )
    steps = [output.logits[0, -1]]
    beside = model.config.audio_positions == "ctc"
    offset = int((batch["input_ids"] == processor.audio_token_id).sum()) if beside else 0
    for position in range(n_prompt, batch["input_ids"].shape[1]):
        output = model(
            input_ids=batch["input_ids"][:, position : position + 1],
            attention_mask=batch["attention_mask"][:, : position + 1],
            position_ids=torch.tensor([[position - offset]]),
            past_key_values=output.past_key_values,
            use_cache=True,
        )
        steps.append(output.logits[0, -1])
    torch.testing.assert_close(torch.stack(steps), expected[n_prompt - 1 :], atol=1e-4, rtol=1e-3)


def test_overfit_on_one_batch_then_generate_returns_the_texts(
    model: SpeechLLMForConditionalGeneration, processor: SpeechLLMProcessor
) -> None:
    torch.manual_seed(0)
    batch = processor(clips(), TEXTS)
    optimiser = torch.optim.AdamW(model.train().parameters(), lr=4e-3)
    for _ in range(150):
        loss = model(**batch).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        if loss < 0.01:
            break
    assert loss < 0.05
    prompt = processor(clips())
    with torch.inference_mode():
        output = model.eval().generate(**prompt, max_new_tokens=60, do_sample=False)
    rows = output[:, prompt["input_ids"].shape[1] :].tolist()
    assert [processor.decode_transcript(row) for row in rows] == TEXTS
    # EOS was learnt: every answer ends before the cap.
    assert all(processor.tokenizer.eos_token_id in row for row in rows)


@torch.inference_mode()
def test_the_answer_depends_on_the_text_before_it(
    model: SpeechLLMForConditionalGeneration, processor: SpeechLLMProcessor
) -> None:
    # Targets fed as zeros sank the first system: then the last logits would be the same.
    first, second = (processor([clips()[0]], [text]) for text in ("zero", "nine"))
    one, other = (model(**batch).logits[0, -2:] for batch in (first, second))
    assert not torch.allclose(one, other, atol=1e-3)


@torch.inference_mode()
def test_audio_beside_the_text_takes_no_positions() -> None:
    is_audio = torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0, 0]], dtype=torch.bool)
    counts = torch.tensor([[0, 0, 0, 1, 1, 2, 0, 0, 0]])
    positions = beside_text(is_audio, counts, None)
    assert positions.tolist() == [[0, 1, 2, 3, 3, 4, 2, 3, 4]]
    padded = beside_text(
        torch.nn.functional.pad(is_audio, (2, 0)),
        torch.nn.functional.pad(counts, (2, 0)),
        torch.tensor([[0, 0] + [1] * 9]),
    )
    assert padded[:, 2:].tolist() == positions.tolist()


def test_a_cached_sequence_with_audio_beside_it_does_not_go_on_without_positions(
    tmp_path: Path,
) -> None:
    make_tiny_checkpoint(tmp_path / "model", audio_positions="ctc")
    model, processor = load_model(tmp_path / "model"), load_processor(tmp_path / "model")
    first = model(**processor(clips()[:1]), use_cache=True)
    with pytest.raises(ValueError, match="needs position_ids"):
        model(input_ids=torch.tensor([[5]]), past_key_values=first.past_key_values)


def test_audio_positions_must_match_the_audio(
    model: SpeechLLMForConditionalGeneration, processor: SpeechLLMProcessor
) -> None:
    batch = processor([clips()[0]])
    batch["input_ids"] = batch["input_ids"][:, 8:]
    batch["attention_mask"] = batch["attention_mask"][:, 8:]
    with pytest.raises(ValueError, match="audio positions, but the audio makes"):
        model(**batch)


def test_audio_without_lengths_is_refused(model: SpeechLLMForConditionalGeneration) -> None:
    with pytest.raises(ValueError, match="belong together"):
        model(input_ids=torch.tensor([[1]]), input_features=torch.zeros(1, 80, 10))


@torch.inference_mode()
def test_blanks_embed_to_nothing_and_a_certain_token_to_its_embedding(
    model: SpeechLLMForConditionalGeneration,
) -> None:
    vocab = model.get_input_embeddings().weight.shape[0]
    blank, token = model.config.pad_token_id, 77
    path = torch.tensor([[blank] * 4 + [blank, token, blank, blank] + [token] * 4])
    logits = 60.0 * torch.nn.functional.one_hot(path, vocab).float()
    embeds = model._expected_token_embeds(model.ctc_head, logits, torch.tensor([12]))
    expected = model.get_input_embeddings().weight[token]
    torch.testing.assert_close(embeds[0, 0], torch.zeros_like(expected))
    torch.testing.assert_close(embeds[0, 1], expected)
    torch.testing.assert_close(embeds[0, 2], expected)  # four frames of it are still one mean


@torch.inference_mode()
def test_a_head_over_some_tokens_says_what_one_says_that_never_hears_the_others(
    model: SpeechLLMForConditionalGeneration,
    checkpoint: Path,
    processor: SpeechLLMProcessor,
) -> None:
    tokens = {*range(20, 200)} - {model.config.pad_token_id}
    never = [i for i in range(320) if i not in tokens and i != model.config.pad_token_id]
    whole = load_model(checkpoint)
    assert whole.ctc_head is not None
    whole.ctc_head.bias[never] = -1e4
    some = cover_only(model, tokens)
    batch = processor(clips(), TEXTS)
    expected, got = whole(**batch), some(**batch)
    assert got.ctc_logits is not None
    assert got.ctc_logits.shape[-1] == 1 + len(tokens)
    torch.testing.assert_close(got.logits, expected.logits, atol=1e-4, rtol=1e-4)
    read = [
        Transcriber(each, processor).transcribe(clips(), with_ctc=True).transcripts
        for each in (whole, some)
    ]
    assert read[0] == read[1]
    assert any(transcript.ctc_text for transcript in read[0])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
@torch.inference_mode()
def test_any_causal_lm_works(tmp_path: Path, family: str) -> None:
    configs = {
        "llama": LlamaConfig(
            vocab_size=320, hidden_size=40, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2,
            bos_token_id=None, eos_token_id=2, pad_token_id=0,
        ),
        "gpt2": GPT2Config(
            vocab_size=320, n_embd=40, n_layer=2, n_head=4, n_positions=512,
            bos_token_id=2, eos_token_id=2, pad_token_id=0,
        ),
        # Its decoder scales the embeddings it is given.
        "gemma": GemmaConfig(
            vocab_size=320, hidden_size=40, intermediate_size=64, num_hidden_layers=2, head_dim=8,
            num_attention_heads=4, num_key_value_heads=1,
            bos_token_id=None, eos_token_id=2, pad_token_id=0,
        ),
    }  # fmt: skip
    make_tiny_checkpoint(tmp_path, llm_config=configs[family])
    model, processor = load_model(tmp_path), load_processor(tmp_path)
    batch = processor(clips())
    together = model.generate(**batch, max_new_tokens=6, do_sample=False)
    alone = processor([clips()[0]])
    expected = model.generate(**alone, max_new_tokens=6, do_sample=False)
    n_new = expected.shape[1] - alone["input_ids"].shape[1]
    assert (
        together[0, batch["input_ids"].shape[1] :][:n_new].tolist() == expected[0, -n_new:].tolist()
    )


def test_auto_classes_know_the_model(tiny_checkpoint: Path) -> None:
    assert isinstance(AutoConfig.from_pretrained(tiny_checkpoint), SpeechLLMConfig)
    for auto in (AutoModel, AutoModelForSpeechSeq2Seq):
        loaded = auto.from_pretrained(tiny_checkpoint)
        assert isinstance(loaded, SpeechLLMForConditionalGeneration)
    assert isinstance(AutoProcessor.from_pretrained(tiny_checkpoint), SpeechLLMProcessor)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"encoder_mode": "cropped"}, "encoder_mode must be one of padded, trimmed"),
        ({"ctc": "maybe"}, "ctc must be one of none, auxiliary, fused"),
        ({"audio_positions": "time"}, "audio_positions must be one of sequence, ctc"),
        ({"audio_positions": "ctc"}, "needs a CTC head"),
        ({"ctc_decoding_weight": 0.9}, "needs a CTC head"),
        ({"ctc_decoding_weight": 1.0}, "ctc_decoding_weight must lie in"),
        ({"lexicon_penalty": 1.0}, "of joint decoding, and ctc_decoding_weight is 0"),
        ({"lexicon_penalty": -1.0}, "lexicon_penalty must not be below 0"),
        ({"ctc": "fused"}, "needs pad_token_id"),
        (
            {"ctc": "fused", "pad_token_id": 0, "ctc_tokens": 0},
            "ctc_tokens is 0: it must be at least",
        ),
        ({"ctc_tokens": 9}, "ctc_tokens is 9: .* ctc not 'none'"),
        ({"max_audio_s": 31}, r"max_audio_s must lie in \(0, 30\], got 31"),
        ({"pad_token_id": 3, "eos_token_id": 3}, "EOS would be padding"),
        ({"max_tokens_per_audio_s": 0}, "must be positive"),
    ],
)
def test_configuration_refuses_what_cannot_work(fields: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        SpeechLLMConfig(**fields)
