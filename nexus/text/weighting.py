"""Prompt weighting: (word), (word:1.3), [word], escapes and BREAK, the grammar that AUTOMATIC1111's prompts are in."""

import re
from typing import NamedTuple

from nexus.errors import InputError

STEP = 1.1              # what one pair of plain brackets multiplies by
DEEPEST, HEAVIEST = 64, 100.0
_TOKEN = re.compile(r"\\(?P<escaped>[()\[\]\\])"
                    r"|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)"
                    r"|(?P<stop>\s?\bBREAK\b\s?)|.", re.DOTALL)


class Part(NamedTuple):
    """A stretch of a prompt between two BREAKs: its text without brackets, and one weight a character."""

    text: str
    weights: tuple[float, ...]


def plain(prompt: str) -> Part:
    """The prompt as it stands, every bracket a bracket."""
    return Part(prompt, (1.0,) * len(prompt))


def parse(prompt: str) -> list[Part]:
    """The parts of a prompt, at least one. Raises InputError for brackets nested too deep and for absurd weights.

    An opening bracket that nothing closes reaches to the end; a closing one that nothing opened is text.
    """
    text: list[str] = []
    weights: list[float] = []
    ends: list[int] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}
    for found in _TOKEN.finditer(prompt):
        token = found[0]
        if found["weight"] and opened["("]:
            _scale(weights, opened["("].pop(), float(found["weight"]))
        elif found["stop"]:
            ends.append(len(text))
        elif token in opened:
            opened[token].append(len(text))
            if len(opened[token]) > DEEPEST:
                raise InputError(f"the prompt nests more than {DEEPEST} brackets", hint=r"write \( for a plain bracket")
        elif token == ")" and opened["("]:
            _scale(weights, opened["("].pop(), STEP)
        elif token == "]" and opened["["]:
            _scale(weights, opened["["].pop(), 1 / STEP)
        else:
            letters = found["escaped"] or token
            text += letters
            weights += [1.0] * len(letters)
    for start in opened["("]:
        _scale(weights, start, STEP)
    for start in opened["["]:
        _scale(weights, start, 1 / STEP)
    if bad := [w for w in weights if abs(w) > HEAVIEST]:
        raise InputError(f"the prompt gives a word the weight {bad[0]:g}, at most {HEAVIEST:g} is possible",
                         hint="usual weights lie between 0.5 and 1.5")
    edges = [0, *ends, len(text)]
    return [Part("".join(text[a:b]), tuple(weights[a:b])) for a, b in zip(edges, edges[1:], strict=False)]


def _scale(weights: list[float], start: int, factor: float) -> None:
    weights[start:] = [w * factor for w in weights[start:]]


def joined(parts: list[Part]) -> Part:
    """The parts as one, for an encoder to which BREAK means nothing."""
    text, weights = parts[0]
    for part in parts[1:]:
        text, weights = f"{text} {part.text}", (*weights, 1.0, *part.weights)
    return Part(text, weights)
