"""A language-model workbench for one terminal; from Python, `lmcli.load(DIR)` is the way in."""

__version__ = "0.1.0"


def __getattr__(name: str):
    """Hands on `load` and `Model` without importing torch until one of them is asked for."""
    if name in ("load", "Model"):
        from lmcli import api

        return getattr(api, name)
    raise AttributeError(f"module 'lmcli' has no attribute {name!r}")
