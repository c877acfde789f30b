"""Names on Hugging Face's hub → folders: from its local cache, without a library, else from the hub (extra `hub`)."""

import os
import re
from pathlib import Path

from lmcli.errors import UserError

NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
NO_NAME = (".json", ".safetensors", ".txt", ".model", ".bin", ".pt", ".gguf")  # such a name means a file
# what is fetched: configuration, tokenizer and safetensors, never a pickle
FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
         "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model",
         "sentencepiece.bpe.model", "source.spm", "target.spm", "target_vocab.json", "model.safetensors",
         "model.safetensors.index.json", "model-*-of-*.safetensors", "adapter_config.json", "adapter_model.safetensors"]
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
INSTALL = "pip install 'lmcli[hub]' lets lm fetch it from the hub"


def find(name: str | Path, weights: bool = True) -> str | Path:
    """The folder that `name` means: itself when there is such a path or it can be no name on the hub, else the snapshot
    in Hugging Face's cache, fetched when it is not there. Without `weights` a snapshot of the tokenizer alone will do.

    Raises UserError when there is none and it cannot be fetched.
    """
    if not isinstance(name, str) or os.path.lexists(name) or not is_name(name):
        return name
    snapshot = cached(name)
    if snapshot and (not weights or any((snapshot / file).is_file() for file in WEIGHTS)):
        return snapshot
    try:
        return _fetch(name)
    except UserError:
        if snapshot:  # whoever reads it says what it lacks, as of any folder
            return snapshot
        raise


def is_name(name: str) -> bool:
    """Whether a text could be MODEL or OWNER/MODEL on the hub: no path with more parts, a leading dot or a file's ending."""
    return bool(NAME.fullmatch(name)) and not name.endswith(NO_NAME) and "--" not in name and ".." not in name


def cache_folder() -> Path:
    """Where Hugging Face's libraries keep what they fetched: $HF_HUB_CACHE, $HF_HOME/hub, or the user's cache folder."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return Path(os.environ[variable]).expanduser()
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(home).expanduser() / "hub"


def cached(name: str) -> Path | None:
    """The folder of the newest snapshot (of branch main) in the local cache; None when there is none."""
    folder = cache_folder() / f"models--{name.replace('/', '--')}"
    try:
        commit = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    snapshot = folder / "snapshots" / commit
    return snapshot if commit and snapshot.is_dir() else None


def offline() -> bool:
    """Whether the environment forbids asking the hub, as Hugging Face's libraries read it."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in ("1", "ON", "YES", "TRUE")


def _fetch(name: str) -> Path:
    nowhere = f"no such model folder, and not in Hugging Face's cache ({cache_folder()})"
    parent, slash, _ = name.partition("/")
    if slash and os.path.isdir(parent):
        raise UserError(f"no such model in the folder {parent}", where=name, hint="-m takes a folder with config.json in it")
    if offline():
        raise UserError(nowhere, where=name, hint="HF_HUB_OFFLINE forbids fetching it")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    except ImportError:
        raise UserError(nowhere, where=name, hint=INSTALL) from None
    try:
        return Path(snapshot_download(name, allow_patterns=FILES, cache_dir=cache_folder()))
    except GatedRepoError as error:
        raise UserError("the hub hands this model out only to those who were granted it", where=name,
                        hint=f"ask at https://huggingface.co/{name}, then set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise UserError("no such model folder, and no such model on the hub", where=name,
                        hint="a private model needs HF_TOKEN") from error
    except Exception as error:  # the library's, its HTTP client's and the network's own errors have no common class
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"{nowhere}; the hub could not be asked", where=name, hint=reason[:200]) from error
