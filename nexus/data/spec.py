"""What `--data` means: one set, or two of different kinds of pictures; plain text, so that it costs no import."""

import os

from nexus.errors import UsageError

EMBEDDED = ("emoji", "emoji-groups", "mnist")
SETS = ", ".join(EMBEDDED) + ", a folder of pictures, or .tar files"
SOUND_SETS = "a folder of sound files, or .tar files"


def split_spec(text: str) -> tuple[str, ...]:
    """("A",) of one set, ("A", "B") of "A,B" or "A|B"; the second may leave out an embedded set's name.

    A path that exists is one set, whatever marks it holds. "emoji:flat|twemoji" is ("emoji:flat", "emoji:twemoji").
    UsageError for more than two sets or an empty one.
    """
    if os.path.exists(text):
        return (text,)
    mark = "|" if "|" in text else ","
    first, *others = (part.strip() for part in text.split(mark))
    if len(others) > 1 or not all([first, *others]):
        raise UsageError(f"--data '{text}' is not one set or two with a comma between", hint="--data A_FOLDER,B_FOLDER")
    name = first.partition(":")[0]
    short = is_embedded(first)
    again = [f"{name}:{part}" if short and not is_embedded(part) and "/" not in part else part for part in others]
    return first, *again


def is_embedded(part: str) -> bool:
    """Whether a set comes with the package."""
    return part.partition(":")[0] in EMBEDDED
