"""Nexus: one command line, and one Python interface, for generative media."""

__version__ = "0.1.0"


def __getattr__(name: str):
    """`nexus.load` and its siblings; torch is imported only when one of them is used."""
    if name in ("load", "sample", "train", "evaluate", "models", "model_info", "verify"):
        from nexus import api
        return getattr(api, name)
    raise AttributeError(f"module 'nexus' has no attribute '{name}'")
