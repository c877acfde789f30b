"""What `lm info` reports on a model, run, tokenizer, weights file or text: facts, and any damage.

Only the headers of weights are read. Torch is loaded for model folders only.
"""

import json
from pathlib import Path

from lmcli.checkpoints.adapter_base import ADAPTER_CONFIG
from lmcli.checkpoints.file_names import PICKLED, TOKENIZER_FILES, WEIGHTS_FILE, WEIGHTS_INDEX
from lmcli.errors import UserError
from lmcli.output.facts import Summary
from lmcli.output.file_facts import read_header, tensor_facts, tokenizer_facts
from lmcli.output.text_facts import corpus_summary, text_summary
from lmcli.storage import user_errors
from lmcli.text import tokenizer as tokenizers
from lmcli.text.gguf_header import is_gguf
from lmcli.text.tokenizer import Tokenizer

MODEL_FILES = {
    "config.json",
    ADAPTER_CONFIG,
    WEIGHTS_FILE,
    WEIGHTS_INDEX,
    PICKLED[0],
    "recipe.yaml",
}


def describe(
    path: str | Path, tokenizer: Tokenizer | None = None, fields: tuple[str, ...] = ()
) -> Summary:
    """The summary of a model or run folder, GGUF file, tokenizer, weights file, text or texts.

    With a `tokenizer` the tokens of a text are counted too; `fields` name the text in rows. Raises
    UserError for anything else.
    """
    path = Path(path)
    with user_errors(path, "read"):
        is_folder, exists = path.is_dir(), path.exists()
        names = {entry.name for entry in path.iterdir()} if is_folder else set()
    if not exists:
        raise UserError("no such file or folder", where=str(path))
    if names & MODEL_FILES:
        from lmcli.output.model_facts import model_summary

        kind = "adapter" if ADAPTER_CONFIG in names else "model"
        return model_summary(path, "run" if "recipe.yaml" in names else kind)
    if is_gguf(path):
        from lmcli.output.model_facts import gguf_summary

        return gguf_summary(path)
    if names.intersection(TOKENIZER_FILES) or _is_tokenizer(path):
        summary = Summary({"kind": "tokenizer", "path": str(path)})
        with summary.noting():
            summary.facts["tokenizer"] = tokenizer_facts(tokenizers.load(path))
        return summary
    if path.suffix == ".safetensors":
        summary = Summary({"kind": "weights", "path": str(path)})
        with summary.noting():
            size = path.stat().st_size
            summary.facts["weights"] = {"bytes": size, **tensor_facts(read_header(path))}
        return summary
    if is_folder:
        return corpus_summary(path, tokenizer, fields)
    return text_summary(str(path), tokenizer, fields)


def _is_tokenizer(path: Path) -> bool:
    """True if a file is a tokenizer.json, or has its name."""
    if path.suffix != ".json" or path.name == "tokenizer.json":
        return path.name == "tokenizer.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    if not isinstance(document, dict):
        return False
    return "added_tokens" in document and isinstance(document.get("model"), dict)
