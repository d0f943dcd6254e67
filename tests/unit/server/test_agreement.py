"""Text that grows and is never taken back."""

from hypothesis import given
from hypothesis import strategies as st

from server.agreement import GrowingText

WORDS = st.sampled_from(["a", "b", "c", "no", "no,", "мэнд", "你好"])
TRANSCRIPTS = st.lists(WORDS, max_size=8).map(" ".join)


def test_only_what_two_transcripts_agree_on_is_told_but_for_the_last_word():
    text = GrowingText()
    assert text.grow("they were three") == ""
    assert text.grow("they were three hundred") == "they were"
    assert text.grow("they were free hundred yards") == ""
    assert text.grow("they were free hundred yards apart") == " free hundred"
    assert text.finish("they were free hundred yards apart.") == " yards apart."
    assert text.text == "they were free hundred yards apart."
    assert text.contradictions == 0


def test_a_last_transcript_that_contradicts_goes_on_behind_what_was_told():
    text = GrowingText()
    text.grow("they where three hundred")
    assert text.grow("they where three hundred yards") == "they where three"
    assert text.finish("well they were three hundred yards apart") == " hundred yards apart"
    assert text.text == "they where three hundred yards apart"
    assert text.contradictions == 1


def test_nothing_is_told_of_a_turn_in_which_nothing_is_said():
    text = GrowingText()
    assert [text.grow(""), text.grow(""), text.finish("")] == ["", "", ""]
    assert text.text == ""


def test_pieces_are_joined_by_a_space():
    text = GrowingText()
    assert text.finish("one two") == "one two"
    assert text.finish("") == ""
    assert text.grow("three four five") == ""
    assert text.grow("three four five six") == " three four"
    assert text.finish("three four five six") == " five six"
    assert text.text == "one two three four five six"


def test_what_was_told_from_behind_a_cut_begins_the_next_piece():
    text = GrowingText()
    text.grow("one two three four five")
    assert text.grow("one two three four five") == "one two three four"
    assert text.finish("one two", is_cut=True) == ""
    assert text.grow("three four") == ""
    assert text.finish("three four five") == " five"
    assert text.text == "one two three four five"
    assert text.contradictions == 0


def test_scripts_without_spaces_grow_by_characters():
    text = GrowingText()
    text.grow("今日は寒")
    assert text.grow("今日は寒い") == "今日は"
    assert text.finish("今日は寒いです。") == "寒いです。"


@given(st.lists(st.tuples(st.lists(TRANSCRIPTS, max_size=5), TRANSCRIPTS, st.booleans())))
def test_deltas_always_make_up_the_text(pieces):
    text, told = GrowingText(), ""
    for growing, last, is_cut in pieces:
        for transcript in growing:
            told += text.grow(transcript)
            assert text.text == told
        told += text.finish(last, is_cut=is_cut)
    assert text.text == told


@given(TRANSCRIPTS, st.lists(st.integers(0, 40)))
def test_transcripts_that_only_grow_give_the_last_one(last, lengths):
    text = GrowingText()
    for length in sorted(lengths):
        text.grow(last[:length])
    text.finish(last)
    assert text.contradictions == 0
    assert text.text == last
