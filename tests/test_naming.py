"""Templates, slugs and paths: a table of hostile values, and laws that hold for any text."""

import os
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus.errors import InputError, UsageError
from nexus.naming import FIELDS, clean_text, fields_of, inside, parse_template, render, slug

VALUES = {"n": 7, "seed": 42, "model": "runs/a", "prompt": "a/b: c", "id": "x", "hash": "0123abcd", "date": "20260101",
          "ext": "png"}


@pytest.mark.parametrize("template,name", [
    ("a.png", "a.png"), ("{n}.{ext}", "7.png"), ("{n:04d}.png", "0007.png"), ("%03d.png", "007.png"),
    ("%d-{seed:3d}.png", "7- 42.png"), ("{{n}}.png", "{n}.png"), ("100%%.png", "100%.png"), ("50%.png", "50%.png"),
    ("o/{model}/{prompt}.png", "o/runs-a/a-b-c.png"), ("{date}_{hash}_{id}", "20260101_0123abcd_x"), ("", ""),
])
def test_templates(template, name):
    assert render(parse_template(template), VALUES) == name


@pytest.mark.parametrize("template", [
    "{x}", "{}", "{n", "n}", "{seed.__class__}", "{n!r}", "{0}", "{n:x}", "{n:999d}", "{prompt:04d}", "{n[0]}", "{{n}",
    "{model:>9}", "{N}",
])
def test_bad_templates(template):
    with pytest.raises(UsageError) as caught:
        parse_template(template)
    assert caught.value.hint


def test_fields():
    assert fields_of(parse_template("{n}-{seed:03d}-%d.{ext}")) == {"n", "seed", "ext"}


@pytest.mark.parametrize("text,expected", [
    ("A cat, on a mat", "A-cat,-on-a-mat"), ("../../etc/passwd", "etc-passwd"), ("...", "untitled"), ("", "untitled"),
    ("CON", "CON_"), ("nul.txt", "_nul.txt"), ("com1", "com1_"), (" -rf /", "rf"), ("a\0b\x1b[31m", "ab[31m"),
    ("\u202egnp.exe", "gnp.exe"), ("ｆｕｌｌ", "full"), ("a  \t\n b", "a-b"),
    ("x" * 300, "x" * 120), ("漢" * 100, "漢" * 40),
    ("\ud800", "untitled"), ("a.", "a"), ("C:\\x", "C-x"), ("😀", "😀"),
])
def test_slugs(text, expected):
    assert slug(text) == expected


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.characters(), max_size=300))
def test_a_slug_is_a_safe_name(text):
    name = slug(text)
    assert 0 < len(name.encode()) <= 120
    assert name[0] not in ".-" and name[-1] not in ". " and not set(name) & set('/\\:*?"<>|\0')
    assert all(unicodedata.category(char) not in ("Cc", "Cf", "Cs") for char in name)
    assert slug(name) == name or unicodedata.normalize("NFKC", name) != name


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.one_of(st.sampled_from("{}%d:n0/."), st.characters()), max_size=30),
       st.text(max_size=40))
def test_a_template_renders_or_is_refused(template, prompt):
    try:
        parts = parse_template(template)
    except UsageError:
        return
    values = {**VALUES, "prompt": prompt, "model": prompt, "id": prompt}
    name = render(parts, values)
    assert name.count("/") == "".join(part for part in parts if isinstance(part, str)).count("/")
    assert fields_of(parts) <= set(FIELDS)


TRAVERSALS = ["../a", "a/../../b", "/etc/passwd", "a/../b", "C:/a", "C:\\a", "\\\\host\\a", "a\\..\\b", "~/a", "./a",
              "a//b",
              "a/", "/", "", ".", "..", "con", "a/nul.png", "COM1.png", "a.", "a ", "a/b ./c", "a\0b", "a\nb", "%00\0",
              "\u202egnp.a", "\u200b", "a/" + "x" * 256, "漢" * 100, ".hidden", "a/.b", "-rf", "a:b", "a*b", "a?",
              "a|b",
              "<a>", '"a"', "\ud800", "aux.tar.gz", "a/../../../../../../tmp/x", "lpt¹.png"]


@pytest.mark.parametrize("name", TRAVERSALS)
def test_nothing_leaves_the_root(tmp_path, name):
    with pytest.raises(InputError):
        inside(tmp_path, name)


@pytest.mark.parametrize("name", ["a.png", "a/b.png", "ünï/漢字.png", "a b.png", "%00.png", "console.png", "a..b.png"])
def test_plain_names_stay(tmp_path, name):
    assert inside(tmp_path, name) == tmp_path / name


def test_links_that_lead_outside(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "out").symlink_to(tmp_path)
    (root / "in").symlink_to(root)
    (root / "file.png").symlink_to(tmp_path / "elsewhere.png")
    for name in ("out/a.png", "out/root/../a.png", "file.png"):
        with pytest.raises(InputError):
            inside(root, name)
    assert inside(root, "in/a.png") == root / "in" / "a.png"


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(["..", ".", "a", "", "C:", "\\", "x.png", "~", "..\\", "\0", "a..", "...", "-", " "]),
                min_size=1, max_size=6).map("/".join))
def test_any_path_stays_inside_or_is_refused(tmp_path_factory, name):
    root = tmp_path_factory.getbasetemp()
    try:
        path = inside(root, name)
    except InputError:
        return
    assert os.path.commonpath([root, os.path.normpath(path)]) == str(root)


@pytest.mark.parametrize("text,expected", [
    ("plain", "plain"), ("  a ", "a"), ("e\u0301", "é"), ("a\0b\x07", "ab"), ("a\nb\tc", "a\nb\tc"),
    (os.fsdecode(b"\xffa"), "\ufffda"), ("a\ud800b", "a?b"), ("😀", "😀"), ("{}%s$(x)<b>", "{}%s$(x)<b>"), ("", ""),
])
def test_clean_text(text, expected):
    assert clean_text(text) == expected


def test_a_prompt_has_a_limit():
    with pytest.raises(InputError, match="10,001 characters"):
        clean_text("x" * 10_001)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.characters(), max_size=100))
def test_clean_text_is_storable_and_stable(text):
    cleaned = clean_text(text)
    cleaned.encode("utf-8")
    assert clean_text(cleaned) == cleaned
