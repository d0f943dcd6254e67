import json
import unicodedata
from pathlib import Path

import pytest

from model.data.manifest import (
    ManifestError,
    Utterance,
    read_candidates,
    read_manifest,
    write_manifest,
)

ROW = {"audio": "a.wav", "text": "сайн", "speaker": "s", "language": "mn", "duration": 1.5}


@pytest.fixture
def manifest(tmp_path):
    def write(*lines):
        path = tmp_path / "manifest.jsonl"
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path.write_text("\n".join(texts) + "\n", encoding="utf-8")
        return path

    return write


def test_reads_every_field_and_ignores_unknown_keys(manifest):
    path = manifest(ROW | {"id": "x", "licence": "CC0", "slots": {"size": "large"}})
    assert read_manifest(path) == [
        Utterance("x", path.parent / "a.wav", "сайн", "s", "mn", 1.5),
    ]


def test_id_defaults_to_the_audio_path_so_that_equal_names_in_two_folders_differ(manifest):
    path = manifest(ROW | {"audio": "s1/001.wav"}, ROW | {"audio": "s2/001.wav"})
    assert [utterance.id for utterance in read_manifest(path)] == ["s1/001.wav", "s2/001.wav"]


def test_audio_root_replaces_the_manifests_folder_but_not_an_absolute_path(manifest, tmp_path):
    path = manifest(ROW, ROW | {"audio": "/data/b.wav"})
    audio = [utterance.audio for utterance in read_manifest(path, tmp_path / "clips")]
    assert audio == [tmp_path / "clips" / "a.wav", Path("/data/b.wav")]


def test_text_is_composed_and_keeps_its_letters(manifest):
    decomposed = unicodedata.normalize("NFD", "Ёстой хийх үү, өөй")
    assert decomposed != "Ёстой хийх үү, өөй"
    (utterance,) = read_manifest(manifest(ROW | {"text": decomposed}))
    assert utterance.text == "Ёстой хийх үү, өөй"


def test_empty_text_is_non_speech_and_null_or_absent_text_is_unlabelled(manifest):
    absent = {key: value for key, value in ROW.items() if key != "text"}
    path = manifest(
        ROW | {"text": "", "id": "1"}, ROW | {"text": None, "id": "2"}, absent | {"id": "3"}
    )
    assert [utterance.text for utterance in read_manifest(path)] == ["", None, None]


@pytest.mark.parametrize("separator", ["\u2028", "\u0085", "\x1c"])
def test_unicode_line_separators_within_a_text_do_not_end_the_line(manifest, separator):
    row = json.dumps(ROW | {"text": "нэг~хоёр"}, ensure_ascii=False).replace("~", separator)
    if separator == "\x1c":  # a control character must be escaped in JSON
        row = json.dumps(ROW | {"text": f"нэг{separator}хоёр"})
    (utterance,) = read_manifest(manifest(row))
    assert utterance.text == f"нэг{separator}хоёр"


def test_byte_order_mark_and_blank_lines_do_no_harm(tmp_path):
    path = tmp_path / "bom.jsonl"
    path.write_text(json.dumps(ROW) + "\r\n\r\n", encoding="utf-8-sig", newline="")
    assert len(read_manifest(path)) == 1


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{not json}", "not JSON"),
        ("[1, 2]", "not an object"),
        ("[" * 100_000, "not JSON"),
        ({"text": "a", "duration": 1}, "audio is empty or missing"),
        (ROW | {"audio": ""}, "audio is empty or missing"),
        (ROW | {"audio": 7}, "audio must be a string, not 7"),
        (ROW | {"text": ["a"]}, "text must be a string"),
        (ROW | {"speaker": 3}, "speaker must be a string"),
        (ROW | {"language": True}, "language must be a string"),
        (ROW | {"id": ""}, "id is empty"),
        (ROW | {"duration": None}, "duration is missing"),
        (ROW | {"duration": "1.0"}, "duration must be a number"),
        (ROW | {"duration": True}, "duration must be a number"),
        (ROW | {"duration": 0}, "duration must be above 0"),
        (ROW | {"duration": float("nan")}, "duration must be above 0"),
        (ROW | {"duration": float("inf")}, "duration must be above 0"),
        (ROW, "id 'a.wav' is taken by line 1"),
    ],
)
def test_faulty_line_is_named_with_its_number(manifest, line, fault):
    path = manifest(ROW, "", line)
    with pytest.raises(ManifestError) as error:
        read_manifest(path)
    assert str(error.value).startswith(f"{path}, line 3: ")
    assert fault in str(error.value)


def test_missing_empty_and_binary_files_are_refused_by_name(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    for name, fault in (
        ("none.jsonl", "cannot be read: No such file"),
        ("empty.jsonl", "holds no utterances"),
        ("binary.jsonl", "is not UTF-8"),
    ):
        with pytest.raises(ManifestError, match=f"{name}: {fault}"):
            read_manifest(tmp_path / name)


def test_candidates_may_lack_durations_and_share_ids(manifest):
    path = manifest(ROW | {"duration": None}, ROW)
    assert [candidate.duration for candidate in read_candidates(path)] == [None, 1.5]


def test_written_manifest_reads_back_and_can_be_moved_with_its_audio(tmp_path):
    corpus = tmp_path / "corpus"
    elsewhere = tmp_path / "elsewhere" / "b.wav"
    utterances = [
        Utterance("1", corpus / "clips" / "a.wav", 'Тэр "за" гэв.\u2028Ёс', "s", "mn", 1.25),
        Utterance("2", elsewhere, None, None, None, 0.5),
    ]
    write_manifest(corpus / "train.jsonl", utterances)
    assert read_manifest(corpus / "train.jsonl") == utterances
    moved = corpus.rename(tmp_path / "moved")
    first, second = read_manifest(moved / "train.jsonl")
    assert first.audio == moved / "clips" / "a.wav"
    assert second.audio == elsewhere


def test_failed_write_leaves_the_manifest_that_was_there(tmp_path):
    path = tmp_path / "train.jsonl"
    utterance = Utterance("1", tmp_path / "a.wav", "a", None, None, 1.0)
    write_manifest(path, [utterance])
    before = path.read_bytes()

    def broken():
        yield utterance
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        write_manifest(path, broken())
    assert path.read_bytes() == before
