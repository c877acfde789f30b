"""The model that an adapter is for: found by the name that the adapter has for it, known again by its weights."""

import hashlib
from pathlib import Path

from lmcli import recipes
from lmcli.checkpoints import hub
from lmcli.errors import UserError
from lmcli.storage import read_json, user_errors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
STRETCHES, STRETCH = 64, 4096  # of a file of weights: how many, and bytes of each
DIGITS = 12  # of a hash


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, and not a model by itself."""
    return (folder / CONFIG).is_file()


def name(folder: Path) -> str:
    """What names an adapter's base; empty without an adapter."""
    return str(read_json(folder / CONFIG).get("base_model_name_or_path") or "") if is_adapter(folder) else ""


def find(folder: Path) -> Path:
    """The folder of an adapter's base model: its own where that holds a model too, else the one it names.

    Raises UserError naming the base when it is not there, no model by itself, or no longer the one that a run of lm
    trained the adapter beside.
    """
    called, where = read_json(folder / CONFIG).get("base_model_name_or_path"), str(folder / CONFIG)
    if (folder / "config.json").is_file():
        return folder
    if not isinstance(called, str) or not called:
        raise UserError("names no base model (base_model_name_or_path)", where=where)
    try:
        base = Path(hub.find(called))
        there = base.is_dir()
    except UserError as error:
        raise UserError(f"its base model {called} cannot be had: {error.what}", where=where, hint=error.hint) from error
    if not there:
        raise UserError(f"its base model is not there: {called}", where=where,
                        hint="put it back, or write where it lies now into base_model_name_or_path")
    if is_adapter(base):
        raise UserError(f"its base model {called} is an adapter itself", where=where,
                        hint=f"lm export {called} --merge -o DIR makes a model of it")
    known = facts(folder).get("weights")
    if known and known != fingerprint(base):
        raise UserError(f"its base model {called} has other weights than when the adapter was trained", where=where,
                        hint=f"put those back, or train the adapter again; if they are meant to differ, take `base` out of "
                             f"{folder}/recipe.yaml")
    return base


def facts(folder: Path) -> dict[str, str]:
    """What the run that made an adapter knew of its base: `model`, its name, and `weights`, their fingerprint."""
    file = folder / "recipe.yaml"
    found = recipes.load_yaml(file).get("base") if file.is_file() else None
    return found if isinstance(found, dict) else {}


def fingerprint(base: Path) -> str:
    """Tells a model's weights from those of another training, in milliseconds: 12 digits of the SHA-256 of 64 stretches of
    each file of weights, evenly spread, and of its size. A change to a few numbers alone goes unseen."""
    digest = hashlib.sha256()
    for file in sorted(base.glob("*.safetensors")):
        with user_errors(file, "read"), file.open("rb") as handle:
            size = file.stat().st_size
            digest.update(f"{file.name} {size} ".encode())
            for number in range(STRETCHES):
                handle.seek(number * max(0, size - STRETCH) // (STRETCHES - 1))
                digest.update(handle.read(STRETCH))
    return digest.hexdigest()[:DIGITS]
