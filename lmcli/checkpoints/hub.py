"""Names on the Hugging Face Hub → folders: from the local cache, else downloaded (extra `hub`)."""

import os
import re
from contextlib import suppress
from functools import cache
from os.path import isfile
from pathlib import Path
from typing import Any

from lmcli import storage
from lmcli.checkpoints.file_names import (
    MORE_TEMPLATES,
    TOKENIZER_FILES,
    TOKENIZER_PARTS,
    WEIGHTS_FILE,
    WEIGHTS_INDEX,
)
from lmcli.errors import UserError, nearest
from lmcli.terminal import progress

NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
# a name with such an ending means a file
FILE_ENDINGS = (".json", ".safetensors", ".txt", ".model", ".bin", ".pt", ".gguf")
WEIGHTS_FILES = (WEIGHTS_FILE, WEIGHTS_INDEX, "adapter_model.safetensors")
# what is downloaded: configuration, tokenizer and safetensors, never a pickle
DOWNLOADED_FILES = [
    *("config.json", "generation_config.json", "model-*-of-*.safetensors", "adapter_config.json"),
    *WEIGHTS_FILES,
    *TOKENIZER_FILES,
    *TOKENIZER_PARTS,
    f"{MORE_TEMPLATES}/*.jinja",
]
CONFIG_FILES = ("config.json", "adapter_config.json")
RUNS = Path("runs")  # where `lm train` makes its folders
MOST_NAMES, MOST_LISTED = 1000, 6  # looked at in a folder, named in a hint
INSTALL = "to download it from the Hub: pip install 'lmcli[hub]'"


def find(name: str | Path, weights: bool = True) -> str | Path:
    """The folder of a model: `name` itself if it is a path, else its snapshot in the Hub's cache.

    Without a snapshot runs/NAME is taken, which a line on standard error says, else one is
    downloaded. Without `weights`, one with only the tokenizer is enough. Raises UserError if there
    is no such model or it cannot be downloaded.
    """
    if not isinstance(name, str) or os.path.lexists(name) or not is_hub_name(name):
        return name
    snapshot = cached_snapshot(name)
    if snapshot and (not weights or _has_weights(snapshot)):
        return snapshot
    if run := find_run(name):
        return run
    try:
        return _download(name)
    except UserError:
        if snapshot:  # its reader reports what is missing, as for any folder
            return snapshot
        raise


def find_run(name: str) -> Path | None:
    """The folder runs/NAME if it holds a model; a line on standard error says so once."""
    folder = RUNS / name
    if name in (".", "..") or not any(isfile(folder / file) for file in CONFIG_FILES):
        return None
    _announce(name, folder)
    return folder


@cache
def _announce(name: str, folder: Path) -> None:
    storage.announce(f"{name} is {folder}")


def nearby(path: Path, files: tuple[str, ...] = CONFIG_FILES, what: str = "models") -> str:
    """The start of a hint: the folders near a missing one that hold one of these files; or "".

    They are those in the folder itself, beside it, or in runs/; the nearest name is proposed.
    """
    folders: dict[str, Path] = {}
    for parent in (path, path.parent, RUNS):
        with suppress(OSError):
            entries = sorted(parent.iterdir())[:MOST_NAMES]
            folders |= {each.name: each for each in entries if any(isfile(each / f) for f in files)}
    listed = ", ".join(map(str, list(folders.values())[:MOST_LISTED]))
    more = ", …" * (len(folders) > MOST_LISTED)
    near = "".join(f"did you mean {folders[name]}? " for name in nearest(path.name, folders))
    return f"{near}{what} here: {listed}{more}; " if folders else ""


def find_local(name: str) -> Path | None:
    """The folder of a model that is on this machine; None if it would have to be downloaded."""
    if os.path.lexists(name) or not is_hub_name(name):
        return Path(name)
    snapshot = cached_snapshot(name)
    return snapshot if snapshot and _has_weights(snapshot) else None


def _has_weights(folder: Path) -> bool:
    return any((folder / file).is_file() for file in WEIGHTS_FILES)


def is_hub_name(name: str) -> bool:
    """True if a text may be MODEL or OWNER/MODEL on the Hub, and is no path or file name."""
    is_pattern = NAME.fullmatch(name) and "--" not in name and ".." not in name
    return bool(is_pattern) and not name.endswith(FILE_ENDINGS)


def cache_folder() -> Path:
    """The cache of Hugging Face's libraries: $HF_HUB_CACHE, $HF_HOME/hub, or in ~/.cache.

    For a user of whom the system knows no home folder it is in our own cache.
    """
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return Path(os.path.expanduser(os.environ[variable]))
    home, base = os.environ.get("HF_HOME"), os.environ.get("XDG_CACHE_HOME")
    if not (home or base) and os.path.expanduser("~") == "~":
        return storage.cache_folder("hub")
    return Path(os.path.expanduser(home or Path(base or "~/.cache") / "huggingface")) / "hub"


def cached_snapshot(name: str) -> Path | None:
    """The newest snapshot (of branch main) in the local cache; None if there is none."""
    folder = cache_folder() / f"models--{name.replace('/', '--')}"
    try:
        commit = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    snapshot = folder / "snapshots" / commit
    return snapshot if commit and os.path.isdir(snapshot) else None


def cached_names() -> list[str]:
    """The names of models with a snapshot in the local cache, sorted."""
    try:
        folders = [entry.name for entry in os.scandir(cache_folder())]
    except OSError:
        return []
    names = [
        folder.removeprefix("models--").replace("--", "/", 1)
        for folder in folders
        if folder.startswith("models--")
    ]
    return sorted(name for name in names if cached_snapshot(name))


def offline() -> bool:
    """True if the environment forbids downloads, as Hugging Face's libraries read it."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in ("1", "ON", "YES", "TRUE")


def _counting_bar(stage: progress.Stage) -> type:
    """A progress bar of tqdm that draws nothing: it counts the bytes of all files in the stage."""
    from tqdm import tqdm

    class CountingBar(tqdm):
        def __init__(self, *arguments: Any, **options: Any):
            super().__init__(*arguments, **(options | {"disable": True}))
            self.counts_bytes = options.get("unit") == "B"

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            if self.counts_bytes:  # one bar for bytes that arrive, another for those that are done
                stage.done, stage.total = max(stage.done, self.n), self.total or None

    return CountingBar


def _download(name: str) -> Path:
    missing = f"no such model folder, and not in Hugging Face's cache ({cache_folder()})"
    parent, slash, _ = name.partition("/")
    if slash and os.path.isdir(parent):
        raise UserError(
            f"no such model in the folder {parent}",
            where=name,
            hint=f"{nearby(Path(name))}a model is a folder that holds a config.json",
        )
    if offline():
        hint = f"{nearby(Path(name))}unset HF_HUB_OFFLINE to download it"
        raise UserError(missing, where=name, hint=hint)
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    except ImportError:
        raise UserError(missing, where=name, hint=nearby(Path(name)) + INSTALL) from None
    try:
        with progress.stage(f"downloading {name}", unit="bytes") as stage:
            silent = progress.is_watched() or storage.is_quiet()
            return Path(
                snapshot_download(
                    name,
                    allow_patterns=DOWNLOADED_FILES,
                    cache_dir=cache_folder(),
                    tqdm_class=_counting_bar(stage) if silent else None,
                )
            )
    except GatedRepoError as error:
        raise UserError(
            "this model is gated on the Hub",
            where=name,
            hint=f"request access at https://huggingface.co/{name}, then set HF_TOKEN",
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            "no such model folder, and no such model on the Hub",
            where=name,
            hint=f"{nearby(Path(name))}set HF_TOKEN if the model is private",
        ) from error
    except (
        Exception
    ) as error:  # errors of the library, its HTTP client and the network: no common class
        reason = next(
            (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        raise UserError(
            f"{missing}; the Hub could not be reached",
            where=name,
            hint=f"{nearby(Path(name))}{reason[:200]}",
        ) from error
