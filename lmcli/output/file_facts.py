"""Facts of `lm info` about tokenizers and the headers of safetensors files; loads no torch."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from lmcli.errors import UserError
from lmcli.storage import user_errors
from lmcli.text.tokenizer import Tokenizer

TOKEN_ROLES = (
    *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
)
# dtypes as safetensors spells them → as PyTorch does
SAFETENSORS_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
TensorHeader = dict[str, tuple[str, tuple[int, ...]]]  # name → (dtype as in the file, shape)


def tokenizer_facts(tokenizer: Tokenizer) -> dict[str, Any]:
    """Its kind, number of ids, templates, tokens with a role, all special tokens."""
    definition = json.loads(tokenizer.core.to_str())
    model = definition.get("model") or {}
    kind = model.get("type") or ("Unigram" if "unk_id" in model else "BPE")
    if kind == "BPE":
        steps = json.dumps([definition.get("pre_tokenizer"), definition.get("decoder")])
        if '"ByteLevel"' in steps:
            kind = "byte-level BPE"
        elif model.get("byte_fallback"):
            kind = "BPE with byte fallback"
    added = definition.get("added_tokens") or []
    special = {token["content"]: token["id"] for token in added if token.get("special")}
    ids = {role: tokenizer.special_id(role) for role in TOKEN_ROLES}
    template = [*tokenizer.pieces(tokenizer.prefix), "…", *tokenizer.pieces(tokenizer.suffix)]
    return {
        "kind": kind,
        "ids": tokenizer.size,
        "template": " ".join(template),
        "chat_template": bool(tokenizer.settings.get("chat_template")),
        "roles": {role: tokenizer.pieces([id_])[0] for role, id_ in ids.items() if id_ is not None},
        "special": special,
    }


def read_header(file: Path) -> TensorHeader:
    """The dtype and shape of every tensor in a .safetensors file; UserError if it is damaged."""
    from safetensors import SafetensorError, safe_open

    with user_errors(file, "read"):
        try:
            with safe_open(file, framework="numpy") as handle:
                slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (no mapping)
                return {
                    name: (tensor.get_dtype(), tuple(tensor.get_shape()))
                    for name, tensor in slices.items()
                }
        except SafetensorError as error:
            raise UserError(
                f"is damaged or not a safetensors file ({error})",
                where=str(file),
                hint="fetch or save it again",
            ) from error


def tensor_facts(header: TensorHeader) -> dict[str, Any]:
    """How many tensors there are, and how many numbers of each dtype."""
    counts = Counter[str]()
    for dtype, shape in header.values():
        counts[SAFETENSORS_DTYPES.get(dtype, dtype)] += math.prod(shape)
    return {"tensors": len(header), "dtypes": dict(counts)}
