"""The YAML beside audiocraft's weights: what it says, and that nothing else happens."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus.convert.plain_yaml import parse
from nexus.errors import ModelError

TEXT = """\
# an experiment
device: cuda
sample_rate: 32000
encodec:
  sample_rate: ${sample_rate}
  causal: false
  note: 'a: b'
  path: //reference/dir:x
  long: text that does not fit
    on one line
seanet:
  ratios:
  - 8
  - 5
  activation_params:
    alpha: 1.0
    small: 1e-5
  norm_params: {}
  flow: [1, {a: b, "c": [null, -2.5]}]
  decoder:
    trim_right_ratio: 1.0
    final_activation: null
  unknown: ${not.there}
rvq: {n_q: 4, bins: 2048}
"""


def test_what_omegaconf_writes():
    assert parse(TEXT) == {
        "device": "cuda", "sample_rate": 32000,
        "encodec": {"sample_rate": 32000, "causal": False, "note": "a: b", "path": "//reference/dir:x",
                    "long": "text that does not fit on one line"},
        "seanet": {"ratios": [8, 5], "activation_params": {"alpha": 1.0, "small": 1e-5}, "norm_params": {},
                   "flow": [1, {"a": "b", "c": [None, -2.5]}],
                   "decoder": {"trim_right_ratio": 1.0, "final_activation": None}, "unknown": "${not.there}"},
        "rvq": {"n_q": 4, "bins": 2048}}


@pytest.mark.parametrize("text", ["a: !!python/object/apply:os.system ['true']\n", "a: &x 1\nb: *x\n",
                                  "a: &a [1, 1]\nb: &b [*a, *a]\nc: [*b, *b]\n"])
def test_tags_and_aliases_are_refused(text):
    with pytest.raises(ModelError, match="plain YAML"):
        parse(text)


def test_numbers_and_dates():
    assert parse("a: 1e-5\nb: -2.5E3\nc: 2021-05-06\nd: 10\n") == {"a": 1e-5, "b": -2500.0, "c": "2021-05-06", "d": 10}


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "x: " + "[" * 40, "a: 1\n" * 300_000,
                                  "\n".join(" " * i + "a:" for i in range(50))])
def test_what_is_no_configuration_is_refused(text):
    with pytest.raises(ModelError):
        parse(text)


def test_references_in_a_ring_end():
    assert parse("a: ${b}\nb: ${a}\n")["a"] in ("${a}", "${b}")


plain = st.text("abcxyz_", min_size=1, max_size=8)
scalars = st.none() | st.booleans() | st.integers(-10**6, 10**6) | plain.filter(
    lambda t: t not in ("null", "true", "y", "n"))
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(plain, inner, max_size=3))


@given(st.dictionaries(plain, values, min_size=1, max_size=4))
def test_json_is_yaml(data):
    assert parse("".join(f"{key}: {json.dumps(value)}\n" for key, value in data.items())) == data


@given(st.text(max_size=200))
def test_any_text_ends_in_a_mapping_or_an_error(text):
    try:
        assert isinstance(parse(text), dict)
    except ModelError:
        pass
