"""The base model of an adapter: found by its name, and recognized by its weights."""

import hashlib
from pathlib import Path
from typing import Any

from lmcli.checkpoints import hub
from lmcli.errors import UsageError, UserError
from lmcli.storage import read_json, user_errors

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# of each weights file, the fingerprint reads this many samples of this many bytes
SAMPLES, SAMPLE_BYTES = 64, 4096
FINGERPRINT_DIGITS = 12


def is_adapter(folder: Path) -> bool:
    """True if a folder holds an adapter."""
    return (folder / ADAPTER_CONFIG).is_file()


def base_name(folder: Path) -> str:
    """The name that an adapter has for its base model; "" without an adapter or a name."""
    options = read_json(folder / ADAPTER_CONFIG) if is_adapter(folder) else {}
    return str(options.get("base_model_name_or_path") or "")


def find_base(folder: Path) -> Path:
    """The folder of an adapter's base model: its own if that holds a model, else the one it names.

    Raises UserError naming the base if it is missing, is an adapter itself, or has other weights
    than when `lm` trained the adapter.
    """
    where = str(folder / ADAPTER_CONFIG)
    name = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if (folder / "config.json").is_file():
        return folder
    if not isinstance(name, str) or not name:
        raise UserError("names no base model (base_model_name_or_path)", where=where)
    base = hub.find_local(name)
    if base is None:
        raise UserError(
            f"its base model {name} is not on this machine, and lm downloads only what you name",
            where=where,
            hint=f"to download it: lm info {name}",
        )
    with user_errors(base, "read"):
        exists = base.is_dir()
    if not exists:
        raise UserError(
            f"its base model is missing: {name}",
            where=where,
            hint="restore it, or set base_model_name_or_path to its new folder",
        )
    if is_adapter(base):
        raise UserError(
            f"its base model {name} is an adapter itself",
            where=where,
            hint=f"merge it first: lm export {name} --merge -o DIR",
        )
    expected = recorded_base(folder).get("weights")
    if expected and expected != fingerprint(base):
        raise UserError(
            f"its base model {name} has other weights than when the adapter was trained",
            where=where,
            hint="restore them, or train the adapter again; to use it all the same, "
            f"delete `base` from {folder}/recipe.yaml",
        )
    return base


def recorded_base(folder: Path) -> dict[str, str]:
    """What a run recorded of its base: `model`, its name, and `weights`, their fingerprint."""
    base = recipe_of(folder).get("base")
    return base if isinstance(base, dict) else {}


def recipe_of(folder: Path) -> dict[str, Any]:
    """The recipe.yaml of a run; {} without one. A bad one is failed work (exit code 1)."""
    from lmcli import recipes  # loads yaml, which generation does not need

    file = folder / "recipe.yaml"
    try:
        return recipes.load_yaml(file) if file.is_file() else {}
    except UsageError as error:
        raise UserError(error.what, where=error.where, hint=error.hint) from None


def fingerprint(base: Path) -> str:
    """12 digits that differ for weights of different trainings, in milliseconds.

    They are from the SHA-256 of the size and of 64 evenly spread samples of each weights file, so a
    change to a few numbers may go undetected.
    """
    digest = hashlib.sha256()
    for file in sorted(base.glob("*.safetensors")):
        with user_errors(file, "read"), file.open("rb") as handle:
            size = file.stat().st_size
            digest.update(f"{file.name} {size} ".encode())
            for number in range(SAMPLES):
                handle.seek(number * max(0, size - SAMPLE_BYTES) // (SAMPLES - 1))
                digest.update(handle.read(SAMPLE_BYTES))
    return digest.hexdigest()[:FINGERPRINT_DIGITS]
