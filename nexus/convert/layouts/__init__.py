"""The public checkpoint layouts: one module a network, each with a tuple `LAYOUTS`."""

from importlib import import_module

from nexus.convert.layout import Layout

MODULES = ("consistency", "lcm", "sd", "unet", "classifier", "dit", "mmdit", "kl_image", "pixart", "ncsnpp",
           "dit_llama", "controlnet", "cyclegan", "dcgan", "encodec", "musicgen")


def every_layout() -> tuple[Layout, ...]:
    """All layouts, in the order in which they are tried."""
    return tuple(layout for name in MODULES for layout in import_module(f"{__name__}.{name}").LAYOUTS)
