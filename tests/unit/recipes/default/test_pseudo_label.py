"""A transcript is trusted only where it says what the recording is labelled with."""

from types import ModuleType

import pytest

SLOTS = {"size": "eight ounce", "coffeeDrink": "mocha", "milkAmount": " a bit of soy milk"}


@pytest.mark.parametrize(
    "text",
    [
        "Can I have an eight ounce mocha with a bit of soy milk?",
        "eight ounce mocha, a bit of soy milk",
        "A bit of soy milk in my EIGHT OUNCE mocha please.",
    ],
)
def test_a_transcript_with_every_slot_is_kept(text: str, pseudo_label: ModuleType) -> None:
    assert pseudo_label.says_slots(text, SLOTS)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Can I have an eight ounce mocha with soy milk?",
        "Can I have an eight once mocha with a bit of soy milk?",
        "Can I have an eight mocha ounce with a bit of soy milk?",
        "Can I have an eight ounce mochas with a bit of soy milk?",
        "eight ounce mocha, a bit of soy milk" + " and" * 15,
    ],
    ids=["empty", "part of a slot", "misspelt", "out of order", "other word", "babble"],
)
def test_any_other_is_dropped(text: str, pseudo_label: ModuleType) -> None:
    assert not pseudo_label.says_slots(text, SLOTS)
