"""Settings: JSON in and out, presets, overrides, and errors that name the key."""

from typing import Annotated, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from nexus import catalog
from nexus.config import Config, layered
from nexus.errors import InputError
from nexus.requests import SampleRequest
from nexus.train.args import TrainArgs
from nexus.train.start import resolve


class Round(Config):
    kind: Literal["round"] = "round"
    radius: float = Field(1.0, gt=0)


class Square(Config):
    kind: Literal["square"] = "square"
    side: int = 2


class Shape(Config):
    presets = {"tiny": {"count": 1}, "big": {"count": 99, "part": {"kind": "round", "radius": 5}}}
    count: int = Field(3, ge=0)
    names: tuple[str, ...] = ()
    part: Annotated[Round | Square, Field(discriminator="kind")] = Square()
    limit: float | None = None


def test_presets_are_what_they_say():
    assert Shape.preset("tiny").count == 1 and Shape.preset("big").part == Round(radius=5)
    with pytest.raises(InputError, match="huge") as caught:
        Shape.preset("huge")
    assert "big, tiny" in caught.value.hint


@given(st.builds(Shape, count=st.integers(0, 2**40), names=st.lists(st.text(), max_size=4).map(tuple),
                 part=st.builds(Round, radius=st.floats(1e-300, 1e300)) | st.builds(Square, side=st.integers()),
                 limit=st.none() | st.floats(allow_nan=False, allow_infinity=False)))
@settings(max_examples=200, deadline=None)
def test_json_round_trip(shape):
    import json
    assert Shape.parse(json.loads(json.dumps(shape.to_json()))) == shape


@pytest.mark.parametrize("cls", [TrainArgs, SampleRequest])
def test_defaults_round_trip(cls):
    assert cls.parse(cls().to_json()) == cls()


@pytest.mark.parametrize("text, path, value", [
    ("count=7", ("count",), 7), ("part.side=9", ("part", "side"), 9), ("limit=1e-3", ("limit",), 1e-3),
    ("limit=null", ("limit",), None), ('names=["a", "b c"]', ("names",), ("a", "b c")), (" count = 0", ("count",), 0),
    ("count=0", ("count",), 0)])
def test_an_override_changes_one_value(text, path, value):
    shape = Shape().override([text])
    found = shape
    for name in path:
        found = getattr(found, name)
    assert found == value
    assert Shape().override([]) == Shape()


@pytest.mark.parametrize("value", ["1" * 5000, "[" * 100_000, "1e999", "Infinity", "NaN", "-Infinity"])
def test_values_that_no_json_holds_are_refused(value):
    for key in ("count", "limit"):
        with pytest.raises(InputError, match=key):
            Shape().override([f"{key}={value}"])


def test_overrides_are_applied_in_order():
    assert Shape().override(["count=1", "count=2"]).count == 2


@pytest.mark.parametrize("text, message, hint", [
    ("count", "KEY=VALUE", "--set"), ("cuont=3", "cuont", "count"), ("part.sied=3", "sied", "side"),
    ("prt.side=3", "prt", "part"), ("count.side=3", "count", ""), ("count=many", "count", ""),
    ("count=-1", "count", ""),
    ("count=1.5", "count", ""), ("part.kind=star", "part", ""), ("limit=NaN?", "limit", ""), ("=3", "''", "")])
def test_a_wrong_override_is_named(text, message, hint):
    with pytest.raises(InputError) as caught:
        Shape().override([text])
    assert message in str(caught.value) and hint in (caught.value.hint or "") and caught.value.code == 3
    assert "\n" not in str(caught.value)


def test_an_unknown_key_names_the_nearest():
    with pytest.raises(InputError, match="cuont") as caught:
        Shape.parse({"cuont": 3})
    assert "'count'" in caught.value.hint


def test_a_setting_of_another_kind_is_named_with_the_way_to_change_the_kind():
    """`part` was a square: its `side` stays behind when only its kind is changed."""
    with pytest.raises(InputError, match=r"'part\.side' does not go with part\.kind round") as caught:
        Shape().override(["part.kind=round"])
    assert """--set 'part={"kind": "round"}'""" in caught.value.hint
    assert Shape().override(['part={"kind": "round"}']).part == Round()
    with pytest.raises(InputError, match=r"'part\.raduis' does not go with part\.kind round") as caught:
        Shape().override(['part={"kind": "round", "raduis": 3}'])
    assert caught.value.hint == "did you mean 'radius'?"


@pytest.mark.parametrize("data, message, hint", [
    ({"part": {"kind": "round", "radius": 0}}, "part.radius: Input", "page"),
    ({"any": {"kind": "round", "wide": 1}}, "any", ""), ({"one": {"sied": 1}}, "unknown setting 'one.sied'", "'side'"),
    ({"one": {"side": "x"}}, "one.side: Input", "page")])
def test_the_place_of_a_mistake_is_written_as_set_writes_it(data, message, hint):
    """Not as pydantic counts it, with the names of the classes that it tried."""
    class Nest(Shape):
        any: Round | Square = Square()
        one: Square = Square()
    with pytest.raises(InputError) as caught:
        Nest.parse(data)
    assert message in str(caught.value) and hint in caught.value.hint
    assert "function-after" not in str(caught.value) and ".round." not in str(caught.value)


@pytest.mark.parametrize("system, preset, change, message, hint", [
    ("conditional", "emoji", "conditioner.kind=label", r"'conditioner\.encoder' does not .* conditioner\.kind label",
     """--set 'conditioner={"kind": "label"}'"""),
    ("dit", "tiny", "conditioner.kind=text", "conditioner", "")])
def test_changing_the_conditioner_of_a_preset(system, preset, change, message, hint):
    with pytest.raises(InputError, match=message) as caught:
        catalog.config_class(system).preset(preset).override([change])
    assert hint in caught.value.hint and "codec" not in caught.value.hint


@pytest.mark.parametrize("data", [{"count": "x" * 10_000}, {"part": {"kind": "round", "radius": 0}}, {"part": 3},
                                  {"names": [1, None]}, {"count": None}, {"count": float("nan")}])
def test_a_bad_value_is_one_short_line(data):
    with pytest.raises(InputError) as caught:
        Shape.parse(data)
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=12))
@settings(max_examples=200, deadline=None)
def test_any_json_is_parsed_or_refused(data):
    for cls in (Shape, TrainArgs):
        try:
            cls.parse(data)
        except InputError:
            pass


@given(st.text(max_size=40))
@settings(max_examples=300, deadline=None)
def test_any_override_is_applied_or_refused(text):
    for candidate in (text, f"count={text}", f"part.{text}", f"names={text}"):
        try:
            Shape().override([candidate])
        except InputError:
            pass


def test_configurations_are_frozen():
    with pytest.raises(ValidationError):
        Shape().count = 4


@pytest.mark.parametrize("field, value", [("steps", 0), ("batch_size", 0), ("accumulate", 0), ("lr", 0), ("ema", 1.0),
                                          ("clip", -1), ("keep", 0), ("flip", 1.1), ("lr", float("nan")),
                                          ("lr", float("inf"))])
def test_training_arguments_have_bounds(field, value):
    with pytest.raises(InputError, match=field):
        TrainArgs.parse({field: value})


@pytest.mark.parametrize("field", ["ema", "clip", "warmup", "sample_every", "samples", "weight_decay", "seed", "flip"])
def test_zero_is_honoured(field):
    assert getattr(TrainArgs.parse({field: 0}), field) == 0


def test_a_settings_file_changes_no_more_than_it_names():
    below = {"net": {"kind": "a", "dim": 8, "part": {"x": 1, "y": [1, 2]}}, "steps": 4, "codec": None}
    assert layered(below, {"net": {"part": {"y": [3]}}, "codec": {"z": 1}}) == {
        "net": {"kind": "a", "dim": 8, "part": {"x": 1, "y": [3]}}, "steps": 4, "codec": {"z": 1}}
    assert layered(below, {"net": {"kind": "b", "width": 2}})["net"] == {"kind": "b", "width": 2}
    assert layered(below, {"net": {"kind": "a", "dim": 9}})["net"] == {**below["net"], "dim": 9}
    assert layered(below, {"net": None})["net"] is None and layered(below, {}) == below
    tiny = catalog.config_class("dit").preset("tiny")
    config, args = resolve("dit", preset="tiny", file={"config": {"net": {"depth": 3}}, "train": {"lr": 0.5}})
    assert config.net == tiny.net.model_copy(update={"depth": 3}) and args.lr == 0.5
    assert config == tiny.model_copy(update={"net": config.net})
