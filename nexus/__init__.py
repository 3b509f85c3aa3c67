"""Nexus: one command line, and one Python interface, for generative media."""

import sys
from types import ModuleType

__version__ = "0.1.0"


def __getattr__(name: str):
    """`nexus.load` and its siblings; torch is imported only when one of them is used."""
    if name in ("load", "sample", "train", "evaluate", "models", "model_info", "verify"):
        from nexus import api
        return getattr(api, name)
    raise AttributeError(f"module 'nexus' has no attribute '{name}'")


class _Verb(ModuleType):
    """A package that is also a function of `nexus.api`, by the same name."""

    def __call__(self, *args, **settings):
        from nexus import api
        return getattr(api, self.__name__.rpartition(".")[2])(*args, **settings)


class _Nexus(ModuleType):
    """Importing the package nexus.train sets `nexus.train`, and must not take the function of that name away."""

    def __setattr__(self, name: str, value) -> None:
        if name in ("train", "evaluate", "models") and isinstance(value, ModuleType):
            value.__class__ = _Verb
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Nexus
