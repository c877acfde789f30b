"""A model → another folder or a GGUF file: in another precision, with an adapter merged."""

import shutil
from pathlib import Path

import torch

from lmcli.checkpoints import adapter_base, folder, gguf_file
from lmcli.checkpoints.file_names import MORE_TEMPLATES, TOKENIZER_FILES, TOKENIZER_PARTS
from lmcli.errors import UsageError, UserError
from lmcli.storage import atomic_folder


def export(source: Path, target: Path, dtype: torch.dtype, merge: bool, bits: int = 0) -> None:
    """Writes the model in `source` to the folder `target` in `dtype`; `merge` merges its adapter.

    With `bits` (8 or 4) the matrices of the blocks are quantized. A folder that exists is replaced
    once all is written. Raises UsageError if `merge` does not fit the source, or if `target` holds
    files that are read; UserError for a folder that cannot be read, and for weights that are out of
    the range of `dtype`.
    """
    base = _base(source, target, merge)
    checkpoint = folder.load(source)
    _check_range(checkpoint.model, dtype)
    saved_objects = checkpoint.model, checkpoint.tokenizer, checkpoint.generate
    with atomic_folder(target) as unfinished:
        folder.save(unfinished, *saved_objects, dtype=dtype, bits=bits)
        home = folder.find_file(source, base, *TOKENIZER_FILES).parent
        names = {*TOKENIZER_FILES, *TOKENIZER_PARTS}
        if (home / MORE_TEMPLATES).is_dir():  # `save` has put all templates into the settings
            names -= {"tokenizer_config.json", "chat_template.jinja"}
        copied = [home / name for name in names]
        for file in (*copied, folder.find_file(source, base, "generation_config.json")):
            if file.is_file():
                shutil.copyfile(file, unfinished / file.name)


def export_gguf(source: Path, target: Path, number_type: str, merge: bool) -> str:
    """Writes the model in `source` as a GGUF file and returns a remark; see gguf_file.write."""
    _base(source, target, merge)
    checkpoint, name = folder.load(source, dtype=None), source.resolve().stem
    return gguf_file.write(
        target, checkpoint.model, checkpoint.tokenizer, checkpoint.stop_ids, number_type, name
    )


def _base(source: Path, target: Path, merge: bool) -> Path:
    """The folder with the base of an adapter, else the source; UsageError as of `export`."""
    if merge != adapter_base.is_adapter(source):
        raise UsageError(
            "holds no adapter to merge" if merge else "is an adapter, no model without its base",
            where=str(source),
            hint="leave --merge out" if merge else "--merge makes one model of both",
        )
    base = adapter_base.find_base(source) if merge else source
    for read in {source.resolve(), base.resolve()}:
        if read == target.resolve() or target.resolve() in read.parents:
            raise UsageError(
                "is where the model is read from", where=str(target), hint="choose another name"
            )
    return base


def _check_range(model: torch.nn.Module, dtype: torch.dtype) -> None:
    limit = torch.finfo(dtype).max
    for name, weight in model.named_parameters():
        largest = float(weight.detach().abs().max()) if weight.numel() else 0.0
        if largest > limit:
            raise UserError(
                f"{name} holds {largest:.3g}, more than float16 can ({limit:,.0f})",
                where="--dtype",
                hint="use bfloat16, which can hold it",
            )
