"""Frozen configurations: JSON in, JSON out, an unknown key is an error that names the nearest one."""

import difflib
import json
from collections.abc import Iterable
from typing import Any, ClassVar, Self, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from nexus.errors import InputError


class Config(BaseModel):
    """Base of every configuration; subclasses add fields, `presets` and `build()`.

    `presets` maps a name to the fields that differ from the defaults; every system has one called `tiny`.
    `nexus train` takes `default_preset` unless told otherwise.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)   # JSON has neither
    presets: ClassVar[dict[str, dict]] = {}
    default_preset: ClassVar[str] = "tiny"
    recipes: ClassVar[dict[str, dict]] = {}         # how each preset is trained: fields of TrainArgs

    @classmethod
    def preset(cls, name: str) -> Self:
        """The named preset, or InputError listing the presets there are."""
        if name not in cls.presets:
            known = ", ".join(sorted(cls.presets))
            raise InputError(f"unknown preset '{name}' for {cls.__name__}", hint=f"presets: {known}")
        return cls.parse(cls.presets[name])

    @classmethod
    def parse(cls, data: dict) -> Self:
        """Validate plain JSON data; InputError names the bad key, the value and the nearest known key."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise InputError(*_explain(cls, error)[:1], hint=_explain(cls, error)[1]) from None

    def to_json(self) -> dict:
        """Plain JSON data that `parse` reads back to an equal configuration."""
        return json.loads(self.model_dump_json())

    def override(self, assignments: list[str]) -> Self:
        """A copy with `a.b=value` assignments applied; values are JSON, or else plain text."""
        data = self.to_json()
        for text in assignments:
            path, eq, value = text.partition("=")
            if not eq:
                raise InputError(f"--set '{text}' is not KEY=VALUE", hint="for example --set net.depth=6")
            _assign(data, path.strip().split("."), _value(value), text)
        return type(self).parse(data)


def not_above(low: str, high: str) -> Any:
    """A validator for a Config's body, which refuses a value of `low` above that of `high`."""
    def check(self: Config) -> Config:
        least, most = getattr(self, low), getattr(self, high)
        if least > most:
            raise ValueError(f"{low} {least:g} is above {high} {most:g}")
        return self
    return model_validator(mode="after")(check)


def layered(below: dict, above: dict) -> dict:
    """Settings `below` as `above` changes them, section by section; a section of another kind is taken whole."""
    def both(old: Any, new: Any) -> Any:
        sections = isinstance(old, dict) and isinstance(new, dict)
        return layered(old, new) if sections and new.get("kind", old.get("kind")) == old.get("kind") else new
    return below | {name: both(below.get(name), value) for name, value in above.items()}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):        # also for a number of thousands of digits
        return text


def _assign(data: dict, keys: list[str], value: Any, text: str) -> None:
    node = data
    for key in keys[:-1]:
        if key not in node or not isinstance(node[key], dict):
            raise InputError(f"--set '{text}': there is no section '{key}'", hint=nearest(key, node))
        node = node[key]
    if keys[-1] not in node:
        raise InputError(f"--set '{text}': there is no setting '{keys[-1]}'", hint=nearest(keys[-1], node))
    node[keys[-1]] = value


def nearest(key: str, known: Iterable[str]) -> str:
    """A hint for an unknown name: the nearest one, or all that are known."""
    near = difflib.get_close_matches(key, list(known), 1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else "known settings: " + ", ".join(sorted(known))


def _explain(cls: type[Config], error: ValidationError) -> tuple[str, str]:
    first = error.errors()[0]
    names, section, kind = _place(cls, first["loc"])
    where = ".".join(names)
    if first["type"] != "extra_forbidden":
        whole = first["type"] == "missing" or isinstance(first["input"], dict)
        shown = "" if whole else f" (got {first['input']!r:.80})"
        said = first["msg"].removeprefix("Value error, ") + shown
        return f"{cls.__name__}: {where or 'value'}: {said}", "see the system's page for its settings"
    hint = nearest(names[-1], section.model_fields.keys() - ({"kind"} if kind else set()))
    if not kind:
        return f"{cls.__name__}: unknown setting '{where}'", hint
    above = ".".join(names[:-1])
    if not hint.startswith("did you mean"):             # it belongs to the kind that the section had before
        hint = f"change the kind with the whole section: --set '{above}={json.dumps({'kind': kind})}'; {hint}"
    return f"{cls.__name__}: '{where}' does not go with {above}.kind {kind}", hint


def _place(cls: type[Config], loc: tuple) -> tuple[list[str], type[Config], str]:
    """Of a pydantic location: the names of settings in it, the Config of the last one, and its kind or ""."""
    names, section, kind, choice = [], cls, "", []
    for part in map(str, loc):
        if choice and part not in section.model_fields:     # no setting, but which of several Configs was meant
            section = next((c for c in choice if _kind(c) == part or c.__name__ in part), section)
            kind, choice = _kind(section) if _kind(section) == part else "", []
            continue
        names.append(part)
        choice = _configs(section.model_fields[part].annotation) if part in section.model_fields else []
        if len(choice) == 1:
            (section,), kind, choice = choice, "", []
    return names, section, kind


def _kind(section: type[Config]) -> str:
    field = section.model_fields.get("kind")
    return str(field.default) if field else ""


def _configs(annotation) -> list[type[Config]]:
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, Config) else []
    return [found for part in get_args(annotation) for found in _configs(part)]
