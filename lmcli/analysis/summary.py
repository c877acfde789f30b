"""What a model, run, tokenizer, weights file or text is, as plain values; of a damaged one what can still be told.

Of weights only the headers are read. Torch is loaded for model folders alone.
"""

import codecs
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lmcli import recipes
from lmcli.config import ModelConfig
from lmcli.errors import UserError
from lmcli.storage import read_json, user_errors
from lmcli.text import tokenizer as tokenizers
from lmcli.text.documents import Layout
from lmcli.text.opening import open_bytes
from lmcli.text.records import CHUNK_BYTES, Reader, expand, file_format, json_row
from lmcli.text.tokenizer import Tokenizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
MODEL_FILES = ("config.json", ADAPTER, WEIGHTS, INDEX, "pytorch_model.bin", "recipe.yaml")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "source.spm")
HEADS = {"lm": "words", "sequence": "a label of the text", "token": "a label of each token",
         "span": "where an answer starts and ends", "none": "none"}
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
          "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass
class Summary:
    """Facts, nested one level or two; the damage met on the way; and the model's configuration if it could be read."""

    facts: dict[str, Any]
    damage: list[UserError] = field(default_factory=list)
    config: ModelConfig | None = None

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Keeps a UserError of the block as damage, once."""
        try:
            yield
        except UserError as error:
            if str(error) not in map(str, self.damage):
                self.damage.append(error)


def describe(path: str | Path, tokenizer: Tokenizer | None = None, fields: tuple[str, ...] = ()) -> Summary:
    """The Summary of a model folder, run folder, tokenizer, weights file, text file or folder of text files. With a
    `tokenizer` the tokens of a text are counted too; `fields` are those of a row that hold its text.

    Raises UserError when there is nothing of the kind.
    """
    path = Path(path)
    with user_errors(path, "read"):
        folder, file = path.is_dir(), path.exists()
        names = {entry.name for entry in path.iterdir()} if folder else set()
    if not file:
        raise UserError("no such file or folder", where=str(path))
    if names.intersection(MODEL_FILES):
        return _model_folder(path, "run" if "recipe.yaml" in names else "adapter" if ADAPTER in names else "model")
    if names.intersection(TOKENIZER_FILES) or (file and _is_tokenizer(path)):
        summary = Summary({"kind": "tokenizer", "path": str(path)})
        with summary.noting():
            summary.facts["tokenizer"] = tokenizer_facts(tokenizers.load(path))
        return summary
    if path.suffix == ".safetensors":
        summary = Summary({"kind": "weights", "path": str(path)})
        with summary.noting():
            summary.facts["weights"] = {"bytes": path.stat().st_size, **_stored(_header(path))}
        return summary
    return _corpus(path, tokenizer, fields) if folder else _text(str(path), tokenizer, fields)


def _is_tokenizer(path: Path) -> bool:
    """Whether a file is, or at least is named as, a tokenizer.json."""
    if path.suffix != ".json" or path.name == "tokenizer.json":
        return path.name == "tokenizer.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(document, dict) and "added_tokens" in document and isinstance(document.get("model"), dict)


# tokenizers ----------------------------------------------------------------------------------------------------------


def tokenizer_facts(tokenizer: Tokenizer) -> dict[str, Any]:
    """Its kind, number of ids, the tokens that have a role, all special tokens, and the template around a text."""
    definition = json.loads(tokenizer.core.to_str())
    model = definition.get("model") or {}
    kind = model.get("type") or ("Unigram" if "unk_id" in model else "BPE")
    if kind == "BPE":
        spelled = json.dumps([definition.get("pre_tokenizer"), definition.get("decoder")])
        kind = "byte-level BPE" if '"ByteLevel"' in spelled else \
            "BPE with byte fallback" if model.get("byte_fallback") else "BPE"
    special = {token["content"]: token["id"] for token in definition.get("added_tokens") or [] if token.get("special")}
    roles = {role: tokenizer.special(role) for role in ROLES}
    around = [*tokenizer.pieces(tokenizer.prefix), "…", *tokenizer.pieces(tokenizer.suffix)]
    return {"kind": kind, "ids": tokenizer.size, "template": " ".join(around),
            "roles": {role: tokenizer.pieces([index])[0] for role, index in roles.items() if index is not None},
            "special": special}


# models --------------------------------------------------------------------------------------------------------------


def _model_folder(path: Path, kind: str) -> Summary:
    from lmcli.checkpoints import adapter_base, adapters
    from lmcli.checkpoints.config_json import read_config
    from lmcli.checkpoints.folder import TOKENIZERS, own_or_base

    summary = Summary({"kind": kind, "path": str(path)})
    facts, family, tokenizer, header, adapter, base = summary.facts, None, None, None, None, path
    if adapter_base.is_adapter(path):
        with summary.noting():
            adapter = adapters.read(path)
            base = adapter.base
            facts["adapter"] = _adapter(adapter)
        if adapter is None:
            return summary
    with summary.noting():
        document = read_json(base / "config.json",
                             "a model folder needs config.json, model.safetensors, tokenizer.json")
        document = adapters.as_adapted(adapter, document) if adapter else document
        facts |= {"family": document.get("model_type"), "architecture": document.get("architectures")}
        family, summary.config = read_config(document, str(base / "config.json"))
        facts |= {"architecture": family.heads[summary.config.head], **_shape(summary.config)}
    with summary.noting():
        tokenizer = tokenizers.load(own_or_base(path, base, *TOKENIZERS).parent)
    with summary.noting():
        files = _weight_files(base)
        header = {name: found for file in files for name, found in _header(file).items()}
        if adapter:  # a head of its own
            header |= {name: ("F32", tuple(tensor.shape)) for name, tensor in adapter.tensors.items()
                       if "lora_" not in name and ".base_layer." not in name}
        facts["weights"] = {"files": [file.name for file in files],
                            "bytes": sum(file.stat().st_size for file in files), **_stored(header)}
    if family:
        facts["parameters"], used = _against(summary, family, header, base)
        facts["weights"] = facts.pop("weights", {}) | used
        count = facts["parameters"]["total"]
        facts["memory"] = {name: count * size for name, size in BYTES.items()}
        facts |= _cache(summary.config)
    if tokenizer:
        facts["tokenizer"] = tokenizer_facts(tokenizer)
        if family and tokenizer.size > summary.config.vocab_size:
            summary.damage.append(UserError(
                f"has {tokenizer.size:,} ids, the model has {summary.config.vocab_size:,} rows for them",
                where=str(path / "tokenizer.json"), hint="tokenizer and model do not belong together"))
    if kind == "run":
        with summary.noting():
            facts["run"] = _run(recipes.load_yaml(path / "recipe.yaml"))
    return summary


def _adapter(adapter) -> dict[str, Any]:
    """What an adapter is for, how large it is, and where it lies."""
    named = adapter.options.get("target_modules")
    return {"base": str(adapter.base), "rank": adapter.options.get("r"), "alpha": adapter.options.get("lora_alpha"),
            "targets": sorted(named) if isinstance(named, list) else named,
            "parameters": sum(tensor.numel() for name, tensor in adapter.tensors.items() if ".base_layer." not in name)}


def _shape(config: ModelConfig) -> dict[str, Any]:
    """The sizes that tell a model, named as in config.json."""
    two = config.shape == "encoder-decoder"
    names = ("hidden_size", "num_hidden_layers", *(("num_encoder_layers",) if two else ()), "num_attention_heads",
             "num_key_value_heads", "head_dim", "intermediate_size", "hidden_act", "positions", "norm")
    labels = {"labels": list(config.labels), "multi_label": config.multi_label} if config.labels else {}
    window = {"sliding_window": config.sliding_window} if config.sliding_window else {}
    return {"shape": config.shape, "head": HEADS[config.head], **labels, "context": config.max_position_embeddings,
            "vocab_size": config.vocab_size, **{name: getattr(config, name) for name in names}, **window,
            "tie_word_embeddings": config.tie_word_embeddings and config.head == "lm"}


def _cache(config: ModelConfig) -> dict[str, Any]:
    """Bytes that keys and values of one more token take: in a decoder's cache; an encoder–decoder's source takes as much."""
    if config.shape == "encoder":
        return {}
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return {"cache_bytes_per_token": {name: numbers * size for name, size in BYTES.items()}}


def _against(summary: Summary, family, header: dict[str, tuple[str, tuple[int, ...]]] | None,
             path: Path) -> tuple[dict[str, int], dict[str, list[str]]]:
    """(parameters by part, {unused, missing} tensor names) of the configured model and the tensors in its files."""
    import torch

    from lmcli.checkpoints.weights import put, stored_tensors
    from lmcli.model.transformer import Transformer

    config = summary.config
    if config.head == "none" and header is not None and not any("pooler." in name for name in header):
        config = replace(config, head_dense=False)
    with torch.device("meta"):
        model = Transformer(config)
        tensors = {name: torch.empty(shape, dtype=getattr(torch, DTYPES.get(dtype, "uint8")))
                   for name, (dtype, shape) in (header or {}).items()}
    parameters = _parts(model)
    if header is None:
        return parameters, {}
    there = {re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name)) for name in header}
    wanted = {stored.theirs: {stored.theirs, stored.theirs.removeprefix(family.prefix), f"{family.prefix}{stored.theirs}"}
              for stored in stored_tensors(family, model)}
    missing = [name for name, spellings in wanted.items() if not spellings & there]
    unused = sorted(name for name in there.difference(*wanted.values()) if not re.search(family.ignored, name))
    with summary.noting():
        unused = put(model, family, tensors, str(path / (WEIGHTS if (path / WEIGHTS).is_file() else INDEX)))
    return parameters, {"unused": unused, "missing": missing}


def _parts(model) -> dict[str, int]:
    """Parameters: in all; in the embedding, the stacks and the head, which make up the whole; then by kind."""
    counts = Counter()
    for name, weight in model.named_parameters():
        stack, _, rest = name.partition(".")
        embeds = stack == "embedding" or rest.startswith(("positions.", "types.", "embedding_norm."))
        counts["embedding" if embeds else stack] += weight.numel()
        kind = next((kind for kind, mark in (("norm", "norm."), ("cross_attention", ".cross."), ("attention", ".attention."),
                                             ("attention", "relative."), ("mlp", ".mlp.")) if mark in name), None)
        counts[kind] += weight.numel()
    parts = ("embedding", "encoder", "decoder", "head", "attention", "cross_attention", "mlp", "norm")
    return {"total": sum(counts[part] for part in parts[:4]), **{part: counts[part] for part in parts if counts[part]}}


def _run(document: dict[str, Any]) -> dict[str, Any]:
    """What recipe.yaml tells of a run: its data, how far it came, and its figures."""
    data, result, train, versions = (
        document[name] if isinstance(document.get(name), dict) else {} for name in ("data", "result", "train", "versions"))
    files = data.get("files") if isinstance(data.get("files"), list) else []
    return {"data": [str(file) for file in files], "data_bytes": data.get("bytes"), "data_tokens": data.get("tokens"),
            "budget": {name: train[name] for name in recipes.BUDGETS if train.get(name)},
            **{key: value for key, value in result.items() if isinstance(value, (int, float, str, bool))},
            "lm": versions.get("lm")}


# weights -------------------------------------------------------------------------------------------------------------


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: the one, or the shards that its index names."""
    from lmcli.checkpoints.folder import load

    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        load(folder)  # refuses, and says what to do
    places = read_json(folder / INDEX).get("weight_map")
    names = sorted(set(map(str, places.values()))) if isinstance(places, dict) else []
    wrong = next((name for name in names if Path(name).name != name or not (folder / name).is_file()), None)
    if wrong or not names:
        raise UserError(f"names a shard that is not there: {wrong!r}" if wrong else "has no weight_map",
                        where=str(folder / INDEX))
    return [folder / name for name in names]


def _header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name → (dtype as the file spells it, shape) of every tensor of a .safetensors file."""
    from safetensors import SafetensorError, safe_open

    with user_errors(file, "read"):
        try:
            with safe_open(file, framework="numpy") as handle:
                slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (no mapping)
                return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
        except SafetensorError as error:
            raise UserError(f"is damaged or no safetensors file ({error})", where=str(file),
                            hint="fetch or save it again") from error


def _stored(header: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, Any]:
    """How many tensors, and how many numbers of each dtype."""
    counts = Counter()
    for dtype, shape in header.values():
        size = 1
        for side in shape:
            size *= side
        counts[DTYPES.get(dtype, dtype)] += size
    return {"tensors": len(header), "dtypes": dict(counts)}


# texts ---------------------------------------------------------------------------------------------------------------


def _corpus(path: Path, tokenizer: Tokenizer | None, fields: tuple[str, ...]) -> Summary:
    """The sums over a folder's text files."""
    try:
        files, left_out = expand([str(path)])
    except UserError as error:
        raise UserError("holds neither a model, nor a tokenizer, nor text", where=str(path), hint=error.hint) from error
    summary, counts = Summary({"kind": "corpus", "path": str(path), "files": len(files), "left_out": left_out}), Counter()
    for file in files:
        found = _text(file, tokenizer, fields)
        summary.damage += found.damage
        counts.update({key: value for key, value in found.facts.items() if isinstance(value, int)})
    summary.facts |= counts
    return summary


def _text(file: str, tokenizer: Tokenizer | None, fields: tuple[str, ...]) -> Summary:
    layout = file_format(file, "auto")
    summary = Summary({"kind": "text", "path": file, "format": layout})
    with summary.noting(), user_errors(file, "read"):
        _count_plain(file, summary.facts)
        if layout != "text":
            _count_rows(file, summary.facts, tokenizer, fields)
        elif tokenizer:
            summary.facts["tokens"] = _tokens(file, tokenizer) if summary.facts["words"] else 0
    return summary


def _count_plain(file: str, facts: dict[str, Any]) -> None:
    """Bytes, lines, characters and words (runs of non-space) of a file; UserError, after the bytes, when it is no text."""
    decoder, counts, inside, problem, chunk = codecs.getincrementaldecoder("utf-8")(), Counter(), False, None, b""
    with open_bytes(file) as handle:
        while chunk := handle.read(CHUNK_BYTES):
            counts["bytes"] += len(chunk)
            last = chunk
            if problem is None:
                try:
                    text = decoder.decode(chunk)
                except UnicodeDecodeError as error:
                    problem = counts["lines"] + error.object[:error.start].count(b"\n") + 1
                    continue
                counts["lines"] += chunk.count(b"\n")
                counts["characters"] += len(text)
                counts["words"] += len(text.split()) - (inside and text[:1].strip() != "")
                inside = text[-1:].strip() != "" if text else inside
    facts["bytes"] = counts["bytes"]
    if problem is None and decoder.getstate()[0]:
        problem = counts["lines"] + 1
    if problem is not None:
        raise UserError(f"is no text: invalid UTF-8 in line {problem}", where=file)
    counts["lines"] += bool(counts["bytes"]) and not last.endswith(b"\n")
    facts |= {name: counts[name] for name in ("lines", "characters", "words")}


def _count_rows(file: str, facts: dict[str, Any], tokenizer: Tokenizer | None, fields: tuple[str, ...]) -> None:
    """Records of a JSON Lines or TSV file, and what their texts count."""
    with open_bytes(file) as handle:
        first = handle.read(CHUNK_BYTES).partition(b"\n")[0].decode("utf-8", "replace").rstrip("\r")
    try:
        facts["fields"] = list(json_row(first)) if facts["format"] == "jsonl" else first.split("\t") if first else []
    except ValueError:
        facts["fields"] = []
    reader, counts = Reader("auto", fields, "skip"), Counter()
    for batch in reader.batches([file]):
        texts = [record.text for record in batch]
        counts["records"] += len(texts)
        counts["text_bytes"] += sum(len(text.encode("utf-8")) for text in texts)
        counts["characters"] += sum(map(len, texts))
        counts["words"] += sum(len(text.split()) for text in texts)
        counts["tokens"] += sum(map(len, tokenizer.encode_batch(texts))) if tokenizer else 0
    facts |= {name: counts[name] for name in ("records", "text_bytes", "characters", "words")}
    facts |= {"bad_records": reader.skipped, **({"tokens": counts["tokens"]} if tokenizer else {})}


def _tokens(file: str, tokenizer: Tokenizer) -> int:
    """Tokens of a text as `lm perplexity` reads it: marks between documents are none."""
    from lmcli.text.corpus import encode_documents

    layout = Layout("file", "text")
    documents, _ = layout.survey([file])
    return sum(len(document.ids) for document in encode_documents(documents, layout, tokenizer))
