"""Keys by any name: every spelling comes to one, and enharmonic tonics to the same."""

import pytest

from nexus.errors import UsageError
from nexus.keys import MODES, TONICS, key_name


@pytest.mark.parametrize("tonic", TONICS)
@pytest.mark.parametrize("mode", MODES)
def test_every_key_is_its_own_name(tonic, mode):
    assert key_name(f"{tonic} {mode}") == f"{tonic} {mode}" == key_name(f" {tonic} {mode} ".upper())


@pytest.mark.parametrize("text,name", [
    ("Am", "a minor"), ("A", "a major"), ("a", "a major"), ("F#m", "f sharp minor"), ("f-sharp minor", "f sharp minor"),
    ("Gb minor", "f sharp minor"), ("gbm", "f sharp minor"), ("Bb", "b flat major"), ("bb", "b flat major"),
    ("b", "b major"), ("bm", "b minor"), ("CM", "c major"), ("Cb", "b major"), ("B#", "c major"),
    ("D♯ min", "e flat minor"), ("E♭ maj", "e flat major"), ("a moll", "a minor"), ("C dur", "c major")])
def test_spellings(text, name):
    assert key_name(text) == name


@pytest.mark.parametrize("text", ("", "h", "x minor", "c major minor", "c##", "7", "a mixolydian", "minor"))
def test_what_is_no_key(text):
    with pytest.raises(UsageError):
        key_name(text)
