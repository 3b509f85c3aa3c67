"""Brackets, weights, escapes and BREAK."""

import pytest

from nexus.errors import InputError
from nexus.text.weighting import joined, parse, plain


def runs(prompt):
    """Each part as (text, weight) runs."""
    out = []
    for part in parse(prompt):
        found = []
        for letter, weight in zip(part.text, part.weights, strict=True):
            if found and found[-1][1] == pytest.approx(weight):
                found[-1] = (found[-1][0] + letter, weight)
            else:
                found.append((letter, weight))
        out.append([(text, round(weight, 6)) for text, weight in found])
    return out


@pytest.mark.parametrize("prompt, wanted", [
    ("a cat", [("a cat", 1.0)]),
    ("a (cat)", [("a ", 1.0), ("cat", 1.1)]),
    ("a ((cat)) b", [("a ", 1.0), ("cat", 1.21), (" b", 1.0)]),
    ("a [cat]", [("a ", 1.0), ("cat", 0.909091)]),
    ("(cat:1.3)", [("cat", 1.3)]),
    ("(cat : 0.5 ) x", [("cat ", 0.5), (" x", 1.0)]),
    ("(a (b:2) c:1.5)", [("a ", 1.5), ("b", 3.0), (" c", 1.5)]),
    (r"a \(cat\) \[x\] \\", [("a (cat) [x] \\", 1.0)]),
    ("a (cat", [("a ", 1.0), ("cat", 1.1)]),
    ("a) cat]: 3) b", [("a) cat]: 3) b", 1.0)]),
    ("(cat:-1)", [("cat", -1.0)]),
    ("ratio 16:9", [("ratio 16:9", 1.0)]),
    ("[a (b:1.1)]", [("a ", 0.909091), ("b", 1.0)]),
    ("", []),
])
def test_grammar(prompt, wanted):
    assert runs(prompt) == [wanted]


def test_break_starts_a_part_and_keeps_an_open_bracket():
    assert runs("a BREAK b") == [[("a", 1.0)], [("b", 1.0)]]
    assert runs("BREAK") == [[], []]
    assert runs("unBREAKable") == [[("unBREAKable", 1.0)]]
    assert runs("(a BREAK b:2)") == [[("a", 2.0)], [("b", 2.0)]]
    assert joined(parse("(a) BREAK b")).text == "a b"


def test_plain_reads_no_brackets():
    assert plain("(a)") == ("(a)", (1.0, 1.0, 1.0))


@pytest.mark.parametrize("prompt", ["(" * 100, "[" * 65 + "x", "(x:1000)", "((((x:50):50):50):50)"])
def test_absurd_prompts_are_refused(prompt):
    with pytest.raises(InputError):
        parse(prompt)


def test_a_long_hostile_prompt_is_read_at_once():
    for unit in ("(a) ", ": ", " ", "\\(", "[]", ":1"):
        parse(unit * (200_000 // len(unit)))
