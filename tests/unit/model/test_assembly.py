"""A new speech LLM is put together from an encoder, a connector and an LLM."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, WhisperConfig, WhisperModel

from model import assembly
from model.assembly import Parts, assemble, cover_transcripts, prepare_tokenizer
from model.checkpoint import CheckpointError, check_processor, load_model, save_model
from model.training.tokenizer import train_tokenizer
from model.whisper_baseline import CTC_HEAD_FILE
from tests.conftest import SENTENCES


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole Whisper, fine-tuned on trimmed audio, with a CTC head beside it."""
    folder = tmp_path_factory.mktemp("whisper")
    torch.manual_seed(7)
    config = WhisperConfig(
        d_model=32, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=64,
        decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=64, vocab_size=320,
        pad_token_id=0, bos_token_id=2, eos_token_id=2, decoder_start_token_id=1,
        encoder_mode="trimmed",
    )  # fmt: skip
    WhisperModel(config).save_pretrained(folder)
    head = {"weight": torch.randn(320, 32), "bias": torch.randn(320)}
    save_file(head, folder / CTC_HEAD_FILE)
    train_tokenizer(SENTENCES * 4, vocab_size=320).save_pretrained(folder)
    return folder


def write_llm(folder: Path, vocab_size: int) -> None:
    config = Qwen2Config(
        vocab_size=vocab_size, hidden_size=40, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2,
        bos_token_id=None, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    train_tokenizer(SENTENCES * 4, vocab_size=320).save_pretrained(folder)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llm")
    write_llm(folder, vocab_size=320)
    return folder


def test_parts_keep_their_weights_and_give_the_dimensions(whisper: Path, llm: Path) -> None:
    model, processor = assemble(
        Parts(str(whisper), str(llm), {"stack_size": 3, "hidden_size": 24}, languages=("mn",))
    )
    stored = load_file(whisper / "model.safetensors")
    for name, tensor in model.encoder.state_dict().items():
        assert torch.equal(tensor, stored[f"encoder.{name}"]), name
    assert model.connector.linear_in.weight.shape == (24, 3 * 32)
    assert model.connector.linear_out.weight.shape == (40, 24)
    assert model.config.encoder_mode == "trimmed"  # what the encoder was fine-tuned for
    assert model.config.languages == ["mn"]
    assert model.ctc_head is None
    check_processor(processor, model.config, "assembled")


def test_the_ctc_head_beside_the_encoder_is_taken_over(whisper: Path, llm: Path) -> None:
    model, _ = assemble(Parts(str(whisper), str(llm), ctc="fused"))
    head = load_file(whisper / CTC_HEAD_FILE)
    assert model.ctc_head is not None
    assert torch.equal(model.ctc_head.weight, head["weight"])
    assert torch.equal(model.ctc_head.bias, head["bias"])


def test_the_ctc_head_covers_the_transcripts_tokens(whisper: Path, llm: Path) -> None:
    parts = Parts(str(whisper), str(llm), ctc="fused")
    model, processor = assemble(parts, ["zero one", "yards"])
    head, stored = model.ctc_head, load_file(whisper / CTC_HEAD_FILE)
    assert head is not None
    assert head.token_ids is not None
    blank, *tokens = head.token_ids.tolist()
    joined = {*processor.text_ids("zero one"), *processor.text_ids("yards zero one yards")}
    assert blank == processor.tokenizer.pad_token_id
    assert {*tokens} == joined | {*processor.text_ids("yards")} | {*processor.text_ids(" ")}
    assert model.config.ctc_tokens == head.out_features == 1 + len(tokens)
    assert torch.equal(head.weight, stored["weight"][[blank, *tokens]])
    assert torch.equal(head.bias, stored["bias"][[blank, *tokens]])


def test_transcripts_of_most_tokens_make_a_head_over_all(whisper: Path, llm: Path) -> None:
    vocabulary = AutoTokenizer.from_pretrained(llm)
    texts = [vocabulary.decode([token]) for token in range(3, 320)]
    model, _ = assemble(Parts(str(whisper), str(llm), ctc="fused"), texts)
    assert model.config.ctc_tokens is None
    assert model.ctc_head is not None
    assert model.ctc_head.out_features == 320


def test_a_ctc_head_over_other_tokens_is_left_with_a_warning(
    whisper: Path, llm: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(whisper, tmp_path, dirs_exist_ok=True)
    train_tokenizer(["другой текст"] * 9, vocab_size=300).save_pretrained(tmp_path)
    model, _ = assemble(Parts(str(tmp_path), str(llm), ctc="auxiliary"))
    stored = load_file(whisper / CTC_HEAD_FILE)["weight"]
    assert model.ctc_head is not None
    assert not torch.equal(model.ctc_head.weight, stored)
    assert "its tokens are not the LLM's" in caplog.text


def test_a_head_grows_with_new_transcripts_and_keeps_what_it_knows(
    whisper: Path, llm: Path
) -> None:
    parts = Parts(str(whisper), str(llm), ctc="fused")
    model, processor = assemble(parts, ["zero one"])
    before = model.ctc_head
    assert before is not None
    cover_transcripts(model, processor, ["one zero"], seed=0)
    assert model.ctc_head is before
    cover_transcripts(model, processor, ["Өнөөдөр"], seed=0)
    after = model.ctc_head
    assert after is not None
    assert {*processor.text_ids("Өнөөдөр")} <= after.covered().keys()
    assert model.config.ctc_tokens == after.out_features > before.out_features
    kept = [after.covered()[token] for token in before.covered()]
    assert torch.equal(after.weight[kept], before.weight)
    whole, _ = assemble(parts)
    head = whole.ctc_head
    cover_transcripts(whole, processor, ["Өнөөдөр"], seed=0)
    assert whole.ctc_head is head


def test_a_random_encoder_takes_no_weights(whisper: Path, llm: Path) -> None:
    model, _ = assemble(Parts(str(whisper), str(llm), random_encoder=True))
    stored = load_file(whisper / "model.safetensors")["encoder.conv1.weight"]
    assert not torch.equal(model.encoder.conv1.weight, stored)


def test_a_random_encoder_is_saved_though_its_shape_comes_from_the_hub(
    whisper: Path, llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve = assembly.resolve
    monkeypatch.setattr(
        assembly, "resolve", lambda source: whisper if source == "some/whisper" else resolve(source)
    )
    model, processor = assemble(Parts("some/whisper", str(llm), random_encoder=True))
    save_model(model, tmp_path / "model", processor=processor)
    loaded = load_model(tmp_path / "model").encoder.conv1.weight
    assert torch.equal(loaded, model.encoder.conv1.weight)


def test_new_weights_follow_the_seed(whisper: Path, llm: Path) -> None:
    first, same, other = (
        assemble(Parts(str(whisper), str(llm), seed=seed))[0].connector.linear_in.weight
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_an_assembled_model_is_saved_and_loaded(whisper: Path, llm: Path, tmp_path: Path) -> None:
    model, processor = assemble(Parts(str(whisper), str(llm), ctc="auxiliary"))
    save_model(model, tmp_path, processor=processor)
    again = load_model(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert again.generation_config.eos_token_id == processor.tokenizer.eos_token_id


def test_an_llm_without_a_spare_embedding_is_refused(whisper: Path, tmp_path: Path) -> None:
    write_llm(tmp_path, vocab_size=319)
    with pytest.raises(CheckpointError, match="319 embeddings leave no spare id"):
        assemble(Parts(str(whisper), str(tmp_path)))


def test_a_part_without_a_config_is_refused(whisper: Path, llm: Path, tmp_path: Path) -> None:
    (tmp_path / "encoder").mkdir()
    with pytest.raises(CheckpointError, match=r"encoder/config\.json: there is no such file"):
        assemble(Parts(str(tmp_path / "encoder"), str(llm)))
    AutoTokenizer.from_pretrained(llm).save_pretrained(tmp_path / "llm")
    with pytest.raises(CheckpointError, match=r"llm/config\.json: there is no such file"):
        assemble(Parts(str(whisper), str(tmp_path / "llm")))


def test_an_llm_without_its_tokenizer_is_refused(whisper: Path, llm: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(llm / name)
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        assemble(Parts(str(whisper), str(tmp_path)))


def test_a_tokenizer_whose_pad_is_eos_gets_a_pad_of_its_own(llm: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llm)
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token": tokenizer.eos_token}))
    prepared = prepare_tokenizer(str(tmp_path))
    assert prepared.eos_token_id == tokenizer.eos_token_id
    assert prepared.pad_token_id != prepared.eos_token_id
    assert prepared.pad_token_id == 320  # the next spare id


def test_qwen_base_ends_with_its_turn_and_keeps_its_pad(llm: Path, tmp_path: Path) -> None:
    # Qwen2.5's base models have <|endoftext|> both as pad and as EOS.
    AutoTokenizer.from_pretrained(llm).save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    ends = {"pad_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **ends}))
    prepared = prepare_tokenizer(str(tmp_path))
    assert (prepared.pad_token, prepared.eos_token) == ("<|endoftext|>", "<|im_end|>")
