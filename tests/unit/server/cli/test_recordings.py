from pathlib import Path

import pytest

from server.cli.recordings import check_places, find_recordings


@pytest.fixture
def folder(tmp_path):
    for name in ("b.wav", "a.MP3", "notes.txt", "deep/er/c.flac"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return tmp_path


def names(recordings):
    return [Path(recording.name).name for recording in recordings]


def test_a_folder_means_the_recordings_below_it_whose_places_are_as_theirs(folder):
    found = find_recordings([str(folder)])
    assert names(found) == ["a.MP3", "b.wav", "c.flac"]
    assert [str(each.place) for each in found] == ["a", "b", "deep/er/c"]


def test_a_pattern_is_expanded_and_keeps_the_folders_that_it_leaves_open(folder):
    found = find_recordings([f"{folder}/**/*.flac", f"{folder}/*.wav"])
    assert [str(each.place) for each in found] == ["deep/er/c", "b"]


def test_a_named_file_is_taken_whatever_its_name_and_if_it_is_missing(folder):
    found = find_recordings([str(folder / "notes.txt"), str(folder / "missing.wav"), "-"])
    assert [str(each.place) for each in found] == ["notes", "missing", "stdin"]
    assert found[2].path is None


def test_what_is_named_twice_is_taken_once(folder):
    assert names(find_recordings([str(folder / "b.wav"), str(folder)])) == [
        "b.wav", "a.MP3", "c.flac",
    ]  # fmt: skip


def test_recordings_that_differ_in_their_suffix_only_keep_it(folder):
    (folder / "b.ogg").write_bytes(b"")
    places = [str(each.place) for each in find_recordings([str(folder)])]
    assert places == ["a", "b.ogg", "b.wav", "deep/er/c"]


def test_a_place_that_is_given_way_to_is_given_way_from(folder):
    (folder / "b.ogg").write_bytes(b"")
    (folder / "b.wav.mp3").write_bytes(b"")
    found = find_recordings([str(folder)])
    check_places(found)
    assert [str(each.place) for each in found] == [
        "a", "b.ogg", "b.wav", "b.wav.mp3", "deep/er/c",
    ]  # fmt: skip


def test_a_link_to_itself_is_kept_to_be_reported(folder):
    (folder / "loop.wav").symlink_to("loop.wav")
    assert names(find_recordings([str(folder / "loop.wav")])) == ["loop.wav"]


def test_an_empty_argument_is_no_folder():
    with pytest.raises(ValueError, match="empty"):
        find_recordings([""])


def test_equal_names_from_different_folders_are_refused(folder):
    (folder / "other").mkdir()
    (folder / "other" / "b.wav").write_bytes(b"")
    found = find_recordings([str(folder / "b.wav"), str(folder / "other" / "b.wav")])
    with pytest.raises(ValueError, match="would have the same name"):
        check_places(found)


@pytest.mark.parametrize("argument", ["empty", "*.ogg"])
def test_nothing_found_is_said(folder, argument):
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no recordings|no file matches"):
        find_recordings([str(folder / argument)])


def test_standard_input_is_read_once():
    with pytest.raises(ValueError, match="once only"):
        find_recordings(["-", "-"])
