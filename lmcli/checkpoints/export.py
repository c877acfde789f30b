"""A model folder → another one: in another precision, or with an adapter merged into its base."""

import shutil
from pathlib import Path

import torch

from lmcli.checkpoints import adapter_base, folder
from lmcli.checkpoints.file_names import MORE_TEMPLATES, TOKENIZER_FILES, TOKENIZER_PARTS
from lmcli.errors import UsageError, UserError
from lmcli.storage import atomic_folder


def export(source: Path, target: Path, dtype: torch.dtype, merge: bool) -> None:
    """Writes the model in `source` to the folder `target` in `dtype`; `merge` merges its adapter.

    A folder that exists is replaced once all is written. Raises UsageError if `merge` does not fit
    the source, or if `target` holds files that are read; UserError for a folder that cannot be
    read, and for weights that are out of the range of `dtype`.
    """
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
                "is where the model is read from",
                where=str(target),
                hint="choose another folder with -o",
            )
    checkpoint = folder.load(source)
    _check_range(checkpoint.model, dtype)
    with atomic_folder(target) as unfinished:
        folder.save(
            unfinished, checkpoint.model, checkpoint.tokenizer, checkpoint.generate, dtype=dtype
        )
        home = folder.find_file(source, base, *TOKENIZER_FILES).parent
        names = {*TOKENIZER_FILES, *TOKENIZER_PARTS}
        if (home / MORE_TEMPLATES).is_dir():  # `save` has put all templates into the settings
            names -= {"tokenizer_config.json", "chat_template.jinja"}
        copied = [home / name for name in names]
        for file in (*copied, folder.find_file(source, base, "generation_config.json")):
            if file.is_file():
                shutil.copyfile(file, unfinished / file.name)


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
