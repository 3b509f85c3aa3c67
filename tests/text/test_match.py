"""From free text to names."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus.errors import InputError
from nexus.text.match import match, normal, split_style

CLASSES = ("red apple", "green apple", "cat face", "flat shoe", "3rd place medal")
STYLES = ("noto", "twemoji", "flat", "3d")


@pytest.mark.parametrize("prompt, label, style, exact", [
    ("red apple", 0, None, True),
    ("Red  APPLE!", 0, None, True),
    ("red apple, noto style", 0, 0, True),
    ("red apple in the flat style", 0, 2, True),
    ("flat style red apple", 0, 2, True),
    ("cat face, 3d", 2, 3, True),
    ("flat shoe", 3, None, True),
    ("flat shoe, flat style", 3, 2, True),
    ("apple red", 0, None, False),
    ("3rd place medl", 4, None, False),
])
def test_prompts_find_their_class(prompt, label, style, exact):
    assert match(prompt, CLASSES, STYLES) == (label, style, exact)


@pytest.mark.parametrize("prompt", ["", "?!", "zebra crossing", "🍎"])
def test_what_matches_nothing_is_refused_with_the_nearest(prompt):
    with pytest.raises(InputError) as caught:
        match(prompt, CLASSES, STYLES)
    assert caught.value.hint.startswith("nearest: ")


@given(st.text(max_size=40))
def test_any_text_is_matched_or_refused(text):
    assert normal(normal(text)) == normal(text)
    rest, style = split_style(text, STYLES)
    assert style is None or rest in normal(text)
    try:
        assert 0 <= match(text, CLASSES, STYLES).label < len(CLASSES)
    except InputError as error:
        assert "\n" not in str(error)
