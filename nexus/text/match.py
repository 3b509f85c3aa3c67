"""From free text to one of a model's class and style names."""

import difflib
import re
from typing import NamedTuple

from nexus.errors import InputError

NUMERALS = {str(i): word for i, word in enumerate("zero one two three four five six seven eight nine".split())}
GOOD = 0.62         # below this similarity a guess would surprise more than it helps


class Match(NamedTuple):
    """Indices into the class and style names (None = not said), and whether the class name was exact."""

    label: int
    style: int | None
    exact: bool


def normal(text: str) -> str:
    """Lower case, punctuation to single spaces."""
    return " ".join(re.findall(r"[^\W_]+", text.casefold()))


def split_style(prompt: str, styles: tuple[str, ...]) -> tuple[str, int | None]:
    """("red apple, noto style", styles) -> ("red apple", 0): a style named at either end is taken off."""
    text = normal(prompt)
    for i, style in enumerate(styles):
        name = re.escape(normal(style))
        for pattern in (rf"(.+?) (?:in )?(?:the )?{name}(?: style)?", rf"{name} style (.+)"):
            if found := re.fullmatch(pattern, text):
                return found[1], i
    return text, None


def match(prompt: str, classes: tuple[str, ...], styles: tuple[str, ...] = ()) -> Match:
    """The class (exact, then nearest) and style of a prompt; InputError lists the nearest names when none is good."""
    names = [normal(c) for c in classes]
    whole = normal(prompt)
    if whole not in names:              # "7" is the class "seven"
        whole = NUMERALS.get(whole, whole)
    if whole in names:
        return Match(names.index(whole), None, True)
    text, style = split_style(prompt, styles)
    if text in names:
        return Match(names.index(text), style, True)
    ranked = sorted(range(len(names)), key=lambda i: -_likeness(text, names[i]))[:5]
    if not ranked or not text or _likeness(text, names[ranked[0]]) < GOOD:
        near = ", ".join(classes[i] for i in ranked)
        raise InputError(f"no class of this model matches the prompt '{prompt:.80}'", hint=f"nearest: {near}")
    return Match(ranked[0], style, False)


def _likeness(a: str, b: str) -> float:
    """The better of shared words (Dice) and shared letters in order (Ratcliff & Obershelp)."""
    x, y = set(a.split()), set(b.split())
    words = 2 * len(x & y) / max(1, len(x) + len(y))
    return max(words, difflib.SequenceMatcher(None, a, b).ratio())
