"""A language-model workbench for one terminal. From Python, start with `lmcli.load(DIR)`."""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Imports `load`, `Model` and `Run` on first use: they take long."""
    if name == "Run":
        from lmcli.runs.run_folder import Run

        return Run
    if name in ("load", "Model"):
        from lmcli import api

        return getattr(api, name)
    raise AttributeError(f"module 'lmcli' has no attribute {name!r}")
