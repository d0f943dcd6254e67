import unicodedata

import pytest

from model.data.common_voice import CommonVoiceError, read_common_voice

HEADER = "client_id\tpath\tsentence\tup_votes\tdown_votes\tage\tgender\taccents\tlocale\tsegment"
NEW_HEADER = (
    "client_id\tpath\tsentence_id\tsentence\tsentence_domain\tup_votes\tdown_votes\tage\tgender"
    "\taccents\tvariant\tlocale\tsegment"
)


def row(clip, sentence, client="c1", locale="mn"):
    return f"{client}\t{clip}\t{sentence}\t2\t0\ttwenties\tmale\t\t{locale}\t"


@pytest.fixture
def release(tmp_path):
    """An empty release; the tables are written by `write`."""
    (tmp_path / "mn" / "clips").mkdir(parents=True)
    return tmp_path


def write(release, table, *lines, encoding="utf-8", newline="\n"):
    content = newline.join([*lines, ""])
    (release / "mn" / table).write_text(content, encoding=encoding, newline="")


def sentences(release, **options):
    (split,) = read_common_voice(release, ["train"], "mn", **options)
    return [candidate.text for candidate in split.candidates]


@pytest.mark.parametrize("place", [".", "mn"])
def test_root_and_language_folder_are_read_alike(release, place):
    write(release, "train.tsv", HEADER, row("a.mp3", "Сайн уу?"))
    (split,) = read_common_voice(release / place, ["train"], "mn")
    (candidate,) = split.candidates
    assert candidate.id == "a"
    assert candidate.audio.resolve() == (release / "mn" / "clips" / "a.mp3").resolve()
    assert (candidate.speaker, candidate.language, candidate.duration) == ("c1", "mn", None)


def test_quotes_are_part_of_the_sentence_and_hold_no_lines_together(release):
    quoted = ['"Эхлээд нь', 'Тэр "за" гэв', '"', 'Түүний 5" дэлгэц', "'Ганц"]
    rows = [row(f"{i}.mp3", sentence) for i, sentence in enumerate(quoted)]
    write(release, "train.tsv", HEADER, *rows)
    assert sentences(release) == quoted


def test_sentences_are_composed_and_collapsed_but_keep_their_letters_case_and_points(release):
    raw = unicodedata.normalize("NFD", "  Ёс,  ЙОД\u00a0ба хийх!  ")
    write(release, "train.tsv", HEADER, row("a.mp3", raw))
    assert sentences(release) == ["Ёс, ЙОД ба хийх!"]


def test_blank_sentence_is_no_text(release):
    write(release, "train.tsv", HEADER, row("a.mp3", "  "))
    assert sentences(release) == [None]


@pytest.mark.parametrize(("encoding", "newline"), [("utf-8-sig", "\n"), ("utf-8", "\r\n")])
def test_byte_order_mark_and_windows_line_ends_do_no_harm(release, encoding, newline):
    lines = [HEADER, row("a.mp3", "нэг"), row("b.mp3", "хоёр")]
    write(release, "train.tsv", *lines, encoding=encoding, newline=newline)
    assert sentences(release) == ["нэг", "хоёр"]


def test_columns_of_newer_releases_and_clip_durations_are_read(release):
    new_row = "c1\ta.mp3\t" + "f" * 64 + "\tнэг\t\t2\t0\t\t\t\t\tmn\t"
    write(release, "train.tsv", NEW_HEADER, new_row)
    write(release, "clip_durations.tsv", "clip\tduration[ms]", "a.mp3\t3456")
    (split,) = read_common_voice(release, ["train"], "mn")
    assert split.candidates[0].text == "нэг"
    assert split.candidates[0].duration == 3.456


def test_path_without_suffix_of_the_first_releases_is_an_mp3(release):
    write(release, "train.tsv", "client_id\tpath\tsentence", "c1\tabc\tнэг")
    (split,) = read_common_voice(release, ["train"], "mn")
    assert split.candidates[0].audio.name == "abc.mp3"


def test_malformed_rows_are_dropped_with_table_and_line(release):
    write(release, "train.tsv", HEADER, row("a.mp3", "нэг\tхоёр"), row("", "гурав"), "c1\tb.mp3")
    (split,) = read_common_voice(release, ["train"], "mn")
    assert split.candidates == []
    assert [dropped.id for dropped in split.malformed] == [
        "train.tsv:2",
        "train.tsv:3",
        "train.tsv:4",
    ]
    assert "names no clip" in split.malformed[1].detail


def test_all_splits_are_those_the_release_has_and_validated_comes_after_its_parts(release):
    for table in ("other", "validated", "train", "test", "invalidated"):
        write(release, f"{table}.tsv", HEADER, row("a.mp3", "нэг"))
    names = [split.name for split in read_common_voice(release, None, "mn")]
    assert names == ["train", "test", "validated", "other"]


def test_split_that_is_missing_is_named_with_those_there_are(release):
    write(release, "train.tsv", HEADER)
    with pytest.raises(CommonVoiceError, match="has no dev split, only train"):
        read_common_voice(release, ["train", "dev"], "mn")


@pytest.mark.parametrize(
    ("table", "lines", "fault"),
    [
        ("train.tsv", ["client_id\tpath", "c\ta.mp3"], "the column sentence is missing"),
        ("train.tsv", [HEADER, row("a.mp3", "one", locale="en")], "line 2: is 'en', not 'mn'"),
        ("clip_durations.tsv", ["clip\tduration[ms]", "a.mp3\tlong"], "line 2: 'long'"),
        ("clip_durations.tsv", ["clip\tms", "a.mp3\t1"], r"duration\[ms\] is missing"),
    ],
)
def test_table_that_cannot_be_used_is_named(release, table, lines, fault):
    write(release, "train.tsv", HEADER)
    write(release, table, *lines)
    with pytest.raises(CommonVoiceError, match=f"{table}.*{fault}"):
        read_common_voice(release, ["train"], "mn")


def test_table_in_another_encoding_is_refused(release):
    write(release, "train.tsv", HEADER, row("a.mp3", "Сайн"), encoding="cp1251")
    with pytest.raises(CommonVoiceError, match="is not UTF-8"):
        read_common_voice(release, ["train"], "mn")


def test_folders_that_are_no_release_are_refused(release, tmp_path):
    with pytest.raises(CommonVoiceError, match="no such folder"):
        read_common_voice(tmp_path / "none", ["train"], "mn")
    with pytest.raises(CommonVoiceError, match="no Common Voice release"):
        read_common_voice(release, ["train"], "mn")
    write(release, "train.tsv", HEADER)
    (release / "mn" / "clips").rmdir()
    with pytest.raises(CommonVoiceError, match="clips is missing"):
        read_common_voice(release, ["train"], "mn")
