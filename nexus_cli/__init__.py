"""The command line of Nexus: flags to requests, results to streams; nothing heavy is imported until it is needed."""

import os

# pydantic would read the metadata of every installed package for plugins, a quarter of what a wrong flag takes.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
