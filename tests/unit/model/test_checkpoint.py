"""A checkpoint folder is written, read, and refused by name where it does not fit."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from model.checkpoint import (
    CheckpointError,
    load_config,
    load_model,
    load_processor,
    resolve,
    save_model,
    write_lexicon,
)
from model.modeling import SpeechLLMForConditionalGeneration
from tests.speech_models import cover_only


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


def edit_tensors(file: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def damage(file: Path, tensor: str, fault: str) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        if fault == "missing":
            del tensors[tensor]
        elif fault == "extra":
            tensors[f"{tensor}_twice"] = torch.zeros(3)
        else:
            tensors[tensor] = torch.zeros(7, 7)

    edit_tensors(file, change)


def edit_json(file: Path, **fields: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def logits(model: SpeechLLMForConditionalGeneration, folder: Path) -> torch.Tensor:
    waveform = 0.1 * np.random.default_rng(0).standard_normal(8_000).astype(np.float32)
    batch = load_processor(folder)([waveform], ["zero one"])
    with torch.inference_mode():
        return model(**batch).logits


def test_round_trip_is_bit_exact(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = load_model(tiny_checkpoint)
    save_model(model, tmp_path, processor=load_processor(tiny_checkpoint))
    again = load_model(tmp_path)
    assert model.state_dict().keys() == again.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert torch.equal(logits(model, tiny_checkpoint), logits(again, tmp_path))


def test_stored_dtype_halves_the_files_and_loads_as_asked(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    model = load_model(tiny_checkpoint)
    processor = load_processor(tiny_checkpoint)
    save_model(model, tmp_path, processor=processor, dtype=torch.float16)
    files = ("connector.safetensors", "encoder/model.safetensors", "llm/model.safetensors")
    for name in files:
        assert all(t.dtype == torch.float16 for t in load_file(tmp_path / name).values())
    for dtype, expected in ((None, torch.float16), (torch.float32, torch.float32)):
        assert {p.dtype for p in load_model(tmp_path, dtype=dtype).parameters()} == {expected}


def test_bfloat16_storage_is_read_back_bit_for_bit(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = load_model(tiny_checkpoint, dtype=torch.bfloat16)
    save_model(model, tmp_path, processor=load_processor(tiny_checkpoint))
    for name, tensor in load_model(tmp_path).state_dict().items():
        assert tensor.dtype == torch.bfloat16, name
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_a_model_keeps_no_file_mapped(tiny_checkpoint: Path) -> None:
    model = load_model(tiny_checkpoint)
    assert next(model.parameters()).device.type == "cpu"
    assert str(tiny_checkpoint) not in Path("/proc/self/maps").read_text()


def test_an_llm_keeps_its_generation_config(folder: Path) -> None:
    edit_json(folder / "llm" / "generation_config.json", max_new_tokens=77)
    assert load_model(folder).llm.generation_config.max_new_tokens == 77


def test_tied_weights_are_stored_once(tiny_checkpoint: Path, tmp_path: Path) -> None:
    save_model(load_model(tiny_checkpoint), tmp_path, dtype=torch.float16)
    assert "lm_head.weight" not in load_file(tmp_path / "llm" / "model.safetensors")


def test_saving_and_loading_print_nothing(
    tiny_checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save_model(load_model(tiny_checkpoint), tmp_path, processor=load_processor(tiny_checkpoint))
    load_model(tmp_path)
    assert capfd.readouterr() == ("", "")


def test_weights_are_as_readable_as_the_other_files(adapted: Path) -> None:
    # A server that runs as another user reads them.
    files = list(adapted.rglob("*.safetensors"))
    assert len(files) == 4
    assert {file.stat().st_mode for file in files} == {(adapted / "config.json").stat().st_mode}


def test_a_connector_is_published_alone(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = load_model(tiny_checkpoint)
    model.config.encoder = str(tiny_checkpoint / "encoder")
    model.config.llm = str(tiny_checkpoint / "llm")
    save_model(model, tmp_path, processor=load_processor(tiny_checkpoint))
    assert not (tmp_path / "encoder").exists()
    assert not (tmp_path / "llm").exists()
    again = load_model(tmp_path)
    assert torch.equal(logits(model, tiny_checkpoint), logits(again, tmp_path))


def test_parts_at_a_relative_path_are_found_again_from_elsewhere(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "first")
    for part in ("encoder", "llm"):
        (tmp_path / "first" / part).rename(tmp_path / part)
    config = tmp_path / "first" / "config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps(fields | {"encoder": "../encoder", "llm": "../llm"}))
    second = tmp_path / "some" / "where" / "second"
    save_model(load_model(tmp_path / "first"), second, processor=load_processor(tiny_checkpoint))
    assert not (second / "llm").exists()
    load_model(second)


def test_a_sharded_llm_loads(folder: Path) -> None:
    model = load_model(folder)
    expected = logits(model, folder)
    shutil.rmtree(folder / "llm")
    model.llm.save_pretrained(folder / "llm", max_shard_size="40KB")
    assert len(list((folder / "llm").glob("*.safetensors"))) > 1
    assert torch.equal(logits(load_model(folder), folder), expected)


def test_a_missing_shard_is_named(folder: Path) -> None:
    load_model(folder).llm.save_pretrained(folder / "llm", max_shard_size="40KB")
    (folder / "llm" / "model.safetensors").unlink(missing_ok=True)
    shard = sorted((folder / "llm").glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        load_model(folder)


def test_weights_are_not_initialised_before_they_are_loaded(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(tensor: torch.Tensor, *_args: object, **_kwargs: object) -> torch.Tensor:
        assert tensor.is_meta, "random numbers drawn for weights that are about to be loaded"
        return tensor

    for name in ("normal_", "uniform_"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    assert load_model(tiny_checkpoint).connector.linear_in.weight.abs().sum() > 0


@pytest.mark.parametrize(
    ("file", "tensor"),
    [
        ("connector.safetensors", "connector.linear_in.weight"),
        ("connector.safetensors", "ctc_head.bias"),
        ("encoder/model.safetensors", "layers.1.fc1.bias"),
        ("llm/model.safetensors", "model.layers.0.mlp.up_proj.weight"),
    ],
)
@pytest.mark.parametrize("fault", ["missing", "extra", "shape"])
def test_a_tensor_that_does_not_fit_is_named(
    folder: Path, file: str, tensor: str, fault: str
) -> None:
    damage(folder / file, tensor, fault)
    with pytest.raises(CheckpointError) as refusal:
        load_model(folder)
    wanted = {"missing": "is missing", "extra": "is not part of", "shape": "has shape (7, 7)"}
    assert tensor in str(refusal.value)
    assert wanted[fault] in str(refusal.value)


@pytest.mark.parametrize(
    "file", ["connector.safetensors", "encoder/model.safetensors", "llm/model.safetensors"]
)
def test_a_file_cut_short_is_named(folder: Path, file: str) -> None:
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_model(folder)


@pytest.mark.parametrize(
    "place", ["pytorch_model.bin", "encoder/weights.pt", "llm/pytorch_model.bin", "lora/x.pkl"]
)
def test_a_pickle_is_refused_even_beside_safetensors(folder: Path, place: str) -> None:
    (folder / place).parent.mkdir(exist_ok=True)
    (folder / place).write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match=f"{Path(place).name}: a pickle file"):
        load_model(folder)


def test_a_part_with_nothing_but_a_pickle_is_refused(folder: Path) -> None:
    model = load_model(folder)
    elsewhere = folder.parent / "elsewhere"
    (folder / "llm").rename(elsewhere)
    (elsewhere / "model.safetensors").rename(elsewhere / "pytorch_model.bin")
    model.config.llm = str(elsewhere)
    model.config.save_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: a pickle file"):
        load_model(folder)


@pytest.mark.parametrize("content", ["{", "{}", "[]"])
def test_a_broken_index_of_shards_is_named(folder: Path, content: str) -> None:
    (folder / "llm" / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json: not an index"):
        load_model(folder)


@pytest.mark.parametrize("part", ["encoder", "llm"])
def test_a_missing_part_is_named_and_not_looked_for_on_the_hub(
    folder: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        pytest.fail("asked the hub for a part of the checkpoint's own")

    monkeypatch.setattr("model.checkpoint.snapshot_download", refuse)
    shutil.rmtree(folder / part)
    with pytest.raises(CheckpointError, match=f"checkpoint/{part}: there is no such folder"):
        load_model(folder)


def test_a_broken_generation_config_is_named(folder: Path) -> None:
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        load_model(folder)


@pytest.mark.parametrize("name", ["config.json", "connector.safetensors", "llm/config.json"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    if name == "llm/config.json":  # the checkpoint's own config describes the LLM
        load_model(folder)
        return
    with pytest.raises(CheckpointError, match=name):
        load_model(folder)


def test_another_model_type_is_refused(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="whisper")
    with pytest.raises(CheckpointError, match="model_type is 'whisper', wanted 'speech_llm'"):
        load_config(folder)


@pytest.mark.parametrize(("content", "reason"), [("{", "not JSON"), ("[]", "not a JSON object")])
def test_broken_json_is_refused(folder: Path, content: str, reason: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=reason):
        load_config(folder)


def test_a_value_out_of_range_is_refused(folder: Path) -> None:
    edit_json(folder / "config.json", max_audio_s=99)
    with pytest.raises(CheckpointError, match="max_audio_s"):
        load_config(folder)


def test_a_folder_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="no/such folder: no such folder"):
        resolve("no/such folder")


@pytest.mark.parametrize(
    ("field", "value"), [("pad_token_id", 5), ("eos_token_id", 6), ("encoder_mode", "padded")]
)
def test_a_processor_that_disagrees_with_the_model_is_refused(
    folder: Path, field: str, value: object
) -> None:
    edit_json(folder / "config.json", **{field: value})
    with pytest.raises(CheckpointError, match=field):
        load_processor(folder)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [({"pad_token_id": 2}, "EOS would be padding"), ({"connector": "stack"}, "must be an object")],
)
def test_a_configuration_that_cannot_work_is_refused(
    folder: Path, fields: dict[str, object], reason: str
) -> None:
    edit_json(folder / "config.json", **fields)
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{reason}"):
        load_config(folder)


@pytest.mark.parametrize("content", ["{", "{}", '{"version": "1.0", "model": null}'])
def test_a_broken_tokenizer_is_refused(folder: Path, content: str) -> None:
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match="cannot read the processor"):
        load_processor(folder)


def test_a_tokenizer_with_more_ids_than_embeddings_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit_json(folder / "config.json", llm_config={**config["llm_config"], "vocab_size": 300})
    with pytest.raises(CheckpointError, match="ids up to 319, the LLM only 300 embeddings"):
        load_processor(folder)


def test_missing_tokenizer_files_are_refused(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="cannot read the processor"):
        load_processor(folder)


@pytest.fixture
def adapted(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint with an adapter that changes its answers."""
    model = load_model(tiny_checkpoint)
    model.llm = get_peft_model(model.llm, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(1)
    for name, parameter in model.llm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.config.lora = "lora"
    expected = logits(model.eval(), tiny_checkpoint)
    save_file({"logits": expected}, tmp_path / "expected.safetensors")
    save_model(model, tmp_path / "adapted", processor=load_processor(tiny_checkpoint))
    return tmp_path / "adapted"


def test_lora_loads_merged_and_trainable(adapted: Path, tiny_checkpoint: Path) -> None:
    expected = load_file(adapted.parent / "expected.safetensors")["logits"]
    plain = logits(load_model(tiny_checkpoint), tiny_checkpoint)
    assert not torch.allclose(expected, plain, atol=1e-3)
    merged, unmerged = load_model(adapted), load_model(adapted, merge_lora=False)
    torch.testing.assert_close(logits(merged, adapted), expected, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(logits(unmerged, adapted), expected, atol=1e-4, rtol=1e-3)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    trainable = {name for name, p in unmerged.llm.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora_" in name for name in trainable)


def test_a_merged_checkpoint_is_saved_with_its_own_llm(adapted: Path, tmp_path: Path) -> None:
    edit_json(adapted / "config.json", llm=str(adapted / "llm"))  # as a hub id would be
    merged = load_model(adapted)
    save_model(merged, tmp_path / "merged", processor=load_processor(adapted))
    assert not (tmp_path / "merged" / "lora").exists()
    again = load_model(tmp_path / "merged")
    assert torch.equal(logits(again, adapted), logits(merged, adapted))


def test_an_adapter_names_no_path_of_the_machine_that_made_it(adapted: Path) -> None:
    for file in (adapted / "lora").glob("*.*"):
        assert str(adapted.parent).encode() not in file.read_bytes(), file.name
    assert (
        json.loads((adapted / "lora" / "adapter_config.json").read_text())[
            "base_model_name_or_path"
        ]
        == "llm"
    )


@pytest.mark.parametrize("fault", ["missing", "extra", "shape", "cut short", "config"])
def test_an_adapter_that_does_not_fit_is_refused(adapted: Path, fault: str) -> None:
    file = adapted / "lora" / "adapter_model.safetensors"
    tensor = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    if fault == "cut short":
        file.write_bytes(file.read_bytes()[:500])
    elif fault == "config":
        (adapted / "lora" / "adapter_config.json").write_text("{")
    else:
        damage(file, tensor, fault)
    reason = {
        "missing": f"{tensor} is missing",
        "extra": f"{tensor}_twice is not part of",
        "shape": f"{tensor} has shape (7, 7)",
        "cut short": "adapter_model.safetensors: not a whole safetensors file",
        "config": "cannot read the adapter",
    }[fault]
    with pytest.raises(CheckpointError, match=re.escape(reason)):
        load_model(adapted)


@pytest.fixture
def narrow(folder: Path) -> Path:
    """A checkpoint whose CTC head covers some of the LLM's tokens."""
    model = cover_only(load_model(folder), {*range(100, 160)})
    save_model(model, folder)
    return folder


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_ctc_head_s_tokens_are_saved_and_loaded(
    narrow: Path, tmp_path: Path, dtype: torch.dtype | None
) -> None:
    model = load_model(narrow, dtype=dtype)
    assert model.ctc_head is not None
    assert model.config.ctc_tokens == 61
    assert model.ctc_head.to_token_ids(range(61)) == [0, *range(100, 160)]
    save_model(model, tmp_path / "again", dtype=dtype)
    again = load_model(tmp_path / "again", dtype=dtype)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_ctc_tokens_that_do_not_fit_are_refused(narrow: Path) -> None:
    file = narrow / "connector.safetensors"

    def reverse(tensors: dict[str, torch.Tensor]) -> None:
        tensors["ctc_head.token_ids"] = tensors["ctc_head.token_ids"].flip(0)

    edit_tensors(file, reverse)
    with pytest.raises(CheckpointError, match=r"connector\.safetensors: .* begin with 159, wanted"):
        load_model(narrow)
    edit_tensors(file, reverse)
    edit_json(narrow / "config.json", ctc_tokens=60)
    with pytest.raises(CheckpointError, match=r"token_ids has shape \(61,\), .* wants \(60,\)"):
        load_model(narrow)
    edit_json(narrow / "config.json", ctc_tokens=None)
    with pytest.raises(CheckpointError, match=r"ctc_head\.token_ids is not part of this model"):
        load_model(narrow)
    edit_json(narrow / "config.json", ctc_tokens=61)
    damage(file, "ctc_head.token_ids", "missing")
    with pytest.raises(CheckpointError, match=r"ctc_head\.token_ids is missing"):
        load_model(narrow)


@pytest.fixture
def spelling(folder: Path) -> Path:
    """A checkpoint with a lexicon."""
    edit_json(folder / "config.json", ctc_decoding_weight=0.3)
    write_lexicon(folder, ["zero", "өндөр", "one", "zero"], 2.5)
    return folder


def test_a_lexicon_is_loaded_and_saved(spelling: Path, tmp_path: Path) -> None:
    model = load_model(spelling)
    assert model.lexicon is not None
    assert (model.lexicon.words, model.lexicon.penalty) == ({"zero", "one", "өндөр"}, 2.5)
    save_model(model, tmp_path / "again")
    stored = tmp_path / "again" / "lexicon.txt"
    assert stored.read_text(encoding="utf-8") == "one\nzero\nөндөр\n"
    write_lexicon(spelling, ["two"], 1.0)  # in the place of the other
    again = load_model(spelling).lexicon
    assert again is not None
    assert (again.words, again.penalty) == ({"two"}, 1.0)


def test_a_model_that_lost_its_lexicon_is_saved_without_a_penalty(
    spelling: Path, tmp_path: Path
) -> None:
    model = load_model(spelling)
    model.lexicon = None
    save_model(model, tmp_path / "again")
    assert load_model(tmp_path / "again").lexicon is None


@pytest.mark.parametrize("beams", [-1, 0, "4", 2.5])
def test_beams_that_cannot_be_are_refused(folder: Path, beams: object) -> None:
    edit_json(folder / "generation_config.json", num_beams=beams)
    with pytest.raises(CheckpointError, match=r"generation_config\.json: .*"):
        load_model(folder)


def test_a_lexicon_without_a_penalty_is_not_read(spelling: Path) -> None:
    edit_json(spelling / "config.json", lexicon_penalty=0.0)
    (spelling / "lexicon.txt").unlink()
    assert load_model(spelling).lexicon is None


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        (b"", "needs a word"),
        (b"one\nTwo", "'Two' is not a word"),
        (b"one\n\xff", "utf-8"),
    ],
)
def test_a_broken_lexicon_is_named(spelling: Path, content: bytes | None, reason: str) -> None:
    file = spelling / "lexicon.txt"
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"lexicon\.txt: .*{reason}"):
        load_model(spelling)


def test_a_lexicon_needs_joint_decoding_and_a_penalty(folder: Path) -> None:
    before = (folder / "config.json").read_text()
    with pytest.raises(CheckpointError, match="ctc_decoding_weight is 0"):
        write_lexicon(folder, ["one"], 2.0)
    edit_json(folder / "config.json", ctc_decoding_weight=0.3)
    before = (folder / "config.json").read_text()
    for words, penalty, reason in [
        (["one"], 0.0, "above 0"),
        (["one"], float("inf"), "finite"),
        ([], 2.0, "needs a word"),
        (["One"], 2.0, "is not a word"),
    ]:
        with pytest.raises(ValueError, match=reason):
            write_lexicon(folder, words, penalty)
    assert (folder / "config.json").read_text() == before
    assert not (folder / "lexicon.txt").exists()
