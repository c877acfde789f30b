"""A model folder → another one: in another precision, an adapter merged into its base."""

import shutil
from pathlib import Path

import torch

from lmcli.checkpoints import adapter_base, folder
from lmcli.errors import UsageError, UserError
from lmcli.storage import atomic_folder

# taken over as they are, where there are any
KEPT = (*folder.TOKENIZERS, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt",
        "target.spm", "target_vocab.json", "chat_template.jinja", "generation_config.json")


def export(source: Path, target: Path, dtype: torch.dtype, merge: bool) -> None:
    """Writes the model of `source` as a whole model folder, its weights in `dtype`, with `merge` those of an adapter added
    to its base's. What is at `target` gives way once all is written.

    Raises UsageError when `merge` does not fit what `source` is, and for a `target` that the model is read from; UserError
    for a folder that cannot be read, and weights that `dtype` cannot hold.
    """
    if merge != adapter_base.is_adapter(source):
        raise UsageError("holds no adapter to merge" if merge else "is an adapter, which is no model without its base",
                         where=str(source), hint="leave --merge out" if merge else "--merge makes one model of both")
    base = adapter_base.find(source) if merge else source
    for read in {source.resolve(), base.resolve()}:
        if read == target.resolve() or target.resolve() in read.parents:
            raise UsageError("is where the model is read from", where=str(target), hint="choose another folder with -o")
    found = folder.load(source)
    _require_room(found.model, dtype)
    with atomic_folder(target) as part:
        folder.save(part, found.model, found.tokenizer, found.generate, dtype=dtype)
        for name in KEPT:
            file = folder.own_or_base(source, base, name)
            if file.is_file():
                shutil.copyfile(file, part / name)


def _require_room(model: torch.nn.Module, dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    for name, weight in model.named_parameters():
        largest = float(weight.detach().abs().max()) if weight.numel() else 0.0
        if largest > most:
            raise UserError(f"{name} holds {largest:.3g}, more than float16 can ({most:,.0f})", where="--dtype",
                            hint="bfloat16 holds it")
