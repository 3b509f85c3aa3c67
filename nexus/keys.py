"""Musical keys by name, spelt one way: what captions say, and what a prompt is brought to."""

import re

from nexus.errors import UsageError

TONICS = ("c", "c sharp", "d", "e flat", "e", "f", "f sharp", "g", "a flat", "a", "b flat", "b")    # by semitones
MODES = ("major", "minor")
_LETTERS = {"c": 0, "d": 2, "e": 4, "f": 5, "g": 7, "a": 9, "b": 11}
_KEY = re.compile(r"([a-g])[ -]?(#|♯|sharp|b|♭|flat)?[ -]?(m|min|minor|moll|maj|major|dur)?")


def key_name(text: str) -> str:
    """"F#m", "f-sharp minor" and "gb minor" -> "f sharp minor"; a capital M is major, and so is a bare tonic.

    Raises UsageError for what is no key.
    """
    given = text.strip()
    match = _KEY.fullmatch((given[:-1] + "maj" if given[1:].endswith("M") else given).casefold())
    if not match:
        raise UsageError(f"'{text:.40}' is not a key", hint="such as 'A minor', F#m or Bb")
    letter, sign, mode = match.groups()
    shift = 0 if not sign else 1 if sign in ("#", "♯", "sharp") else -1
    return f"{TONICS[(_LETTERS[letter] + shift) % 12]} {MODES[(mode or '') in ('m', 'min', 'minor', 'moll')]}"
