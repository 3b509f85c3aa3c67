"""The plain YAML that training scripts leave beside their weights: nested mappings, lists and scalars, nothing else.

Read with PyYAML's safe loader, so reading runs nothing; tags and aliases, of which a few lines could stand for
gigabytes, are refused.
"""

import re
from typing import Any

import yaml

from nexus.errors import ModelError

LIMIT = 1_000_000           # characters
DEPTH = 32
_FLOAT = re.compile(r"[-+]?(\d+|\d*\.\d+|\d+\.)([eE][-+]?\d+)")     # 1e-5, which YAML 1.1 takes for text
_REFERENCE = re.compile(r"\$\{([\w.]+)\}")


class _Loader(yaml.SafeLoader):
    """Without aliases; dates stay text."""

    yaml_implicit_resolvers = {first: [(tag, pattern) for tag, pattern in known if not tag.endswith(":timestamp")]
                               for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()}

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias")
        return super().compose_node(parent, index)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def parse(text: str) -> dict:
    """A mapping -> nested dicts, with `${a.b}` replaced by what it names. ModelError for anything else."""
    if len(text) > LIMIT:
        raise ModelError(f"a configuration of {len(text):,} characters", hint="is it a checkpoint?")
    try:
        found = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, OverflowError) as error:
        raise ModelError(f"a configuration that is not plain YAML: {str(error).splitlines()[0]:.100}",
                         hint="is it a checkpoint?") from None
    if not isinstance(found, dict):
        raise ModelError("a configuration that is no mapping", hint="is it a checkpoint?")
    return _resolved(found, found, 0)


def _resolved(value: Any, root: dict, depth: int) -> Any:
    if depth > DEPTH:
        raise ModelError(f"a configuration nested deeper than {DEPTH}", hint="is it a checkpoint?")
    if isinstance(value, dict):
        return {str(key): _resolved(inner, root, depth + 1) for key, inner in value.items()}
    if isinstance(value, list):
        return [_resolved(inner, root, depth + 1) for inner in value]
    named = _REFERENCE.fullmatch(value) if isinstance(value, str) and depth < DEPTH else None
    if not named:
        return value
    node: Any = root
    for part in named[1].split("."):
        if not isinstance(node, dict) or part not in node:
            return value
        node = node[part]
    return value if isinstance(node, dict | list) else _resolved(node, root, depth + 1)
