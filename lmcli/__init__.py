"""A language-model workbench for one terminal. From Python, start with `lmcli.load(DIR)`."""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Imports `load` and `Model`, and with them torch, on first use."""
    if name in ("load", "Model"):
        from lmcli import api

        return getattr(api, name)
    raise AttributeError(f"module 'lmcli' has no attribute {name!r}")
