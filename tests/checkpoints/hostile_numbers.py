"""Folders with numbers and names out of range: what each must be refused with.

`python tests/checkpoints/hostile_numbers.py FOLDER OTHER` tries them all in lm without asserts: no
refusal is one. PYTHONOPTIMIZE=1 would also compile all of torch again.
"""

import json
import shutil
import struct
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder, SourceFileLoader
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"


def change_json(file: Path, change) -> None:
    document = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(change(document) or document))


def change_tokenizer(folder: Path, change) -> None:
    change_json(folder / "tokenizer.json", change)


def sparse_ids(folder: Path) -> None:
    def change(document):
        vocabulary = document["model"]["vocab"]
        vocabulary[max(vocabulary, key=vocabulary.get)] = 5000

    change_tokenizer(folder, change)


def same_id_twice(folder: Path) -> None:
    def change(document):
        vocabulary = document["model"]["vocab"]
        vocabulary[max(vocabulary, key=vocabulary.get)] = 300

    change_tokenizer(folder, change)


def template(ids):
    def apply(folder: Path) -> None:
        def change(document):
            for entry in document["post_processor"]["special_tokens"].values():
                entry["ids"] = ids

        change_tokenizer(folder, change)

    return apply


def pre_tokenizer(pattern: str):
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return lambda folder: change_tokenizer(
        folder, lambda document: {**document, "pre_tokenizer": step}
    )


def normalizer(**step):
    return lambda folder: change_tokenizer(
        folder, lambda document: {**document, "normalizer": step}
    )


def vocabulary(**tokens):
    def change(document):
        document["model"]["vocab"].update(tokens)

    return lambda folder: change_tokenizer(folder, change)


def merges(*pairs):
    def change(document):
        document["model"]["merges"] = list(pairs)

    return lambda folder: change_tokenizer(folder, change)


def added_token(index: int):
    def change(document):
        document["added_tokens"].append(
            {**document["added_tokens"][0], "id": index, "content": "q"}
        )

    return lambda folder: change_tokenizer(folder, change)


def config(**values):
    return lambda folder: change_json(
        folder / "config.json", lambda document: {**document, **values}
    )


def raw_config(key: str, text: str):
    def apply(folder: Path) -> None:
        document = json.loads((folder / "config.json").read_text())
        content = json.dumps({**document, key: "HERE"}).replace('"HERE"', text)
        (folder / "config.json").write_text(content)

    return apply


def shards(**names):
    def apply(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / INDEX).write_text(json.dumps({"weight_map": names}))

    return apply


def header(change):
    def apply(folder: Path) -> None:
        file = folder / "model.safetensors"
        content = file.read_bytes()
        size = int.from_bytes(content[:8], "little")
        new = json.dumps(change(json.loads(content[8 : 8 + size]))).encode()
        file.write_bytes(struct.pack("<Q", len(new)) + new + content[8 + size :])

    return apply


def overlapping(document: dict) -> dict:
    names = [name for name in document if name != "__metadata__"]
    offsets = document[names[0]]["data_offsets"]
    return {**document, names[1]: {**document[names[1]], "data_offsets": offsets}}


def generation(**values):
    return lambda folder: change_json(
        folder / "generation_config.json", lambda document: {**document, **values}
    )


def added_tokens_decoder(key: str):
    entry = {"content": "q", "special": True}
    return lambda folder: change_json(
        folder / "tokenizer_config.json",
        lambda document: {**document, "added_tokens_decoder": {key: entry}},
    )


DIGITS = "9" * 5000
# what is wrong → (change of a sound folder, a part of the message)
CASES: dict[str, tuple[Any, str]] = {
    "sparse ids": (sparse_ids, "5,001 ids, but the model's vocabulary has 409"),
    "an id of two tokens": (same_id_twice, "one id for two tokens"),
    "a template beyond the vocabulary": (template([409]), "template uses the id 409"),
    "a template far beyond": (template([2**32 - 1]), "template uses the id 4,294,967,295"),
    "an id of 5,000 digits": (template([int(DIGITS[:4000])]), "is no tokenizer"),
    "a negative id": (vocabulary(zz=-1), "is no tokenizer"),
    "an id beyond 32 bits": (vocabulary(zz=2**40), "is no tokenizer"),
    "a pattern that explodes": (pre_tokenizer("(x+x+)+y"), "cannot encode this text"),
    "a pattern that is none": (pre_tokenizer("(x"), "is no tokenizer"),
    "a damaged table": (
        normalizer(type="Precompiled", precompiled_charsmap="BAAAAP////8AAA=="),
        "",
    ),
    "merges of absent pieces": (merges(["absent", "pieces"]), "is no tokenizer"),
    "an added token beyond 32 bits": (added_token(2**33), "is no tokenizer"),
    "an added token below 0": (added_token(-1), "is no tokenizer"),
    "an added token that is no number": (added_tokens_decoder("q"), "is no tokenizer"),
    "an added token of 5,000 digits": (added_tokens_decoder(DIGITS), "is no tokenizer"),
    "5,000 digits": (raw_config("hidden_size", DIGITS), "is not JSON"),
    "1e400": (raw_config("rms_norm_eps", "1e400"), "rms_norm_eps: inf is outside"),
    "deep nesting": (raw_config("id2label", "[" * 100_000 + "]" * 100_000), "is not JSON"),
    "an empty shard name": (shards(a=""), "names a file outside the folder: ''"),
    "a shard that escapes": (shards(a="../x.safetensors"), "names a file outside the folder"),
    "a shard with a root": (shards(a="/etc/passwd"), "names a file outside the folder"),
    "a shard that is the folder": (shards(a="."), "names a file outside the folder"),
    "a shard above": (shards(a=".."), "names a file outside the folder"),
    "a shard with NUL": (shards(a="a\0b"), "names a file outside the folder"),
    "a shard with a surrogate": (shards(a="\ud800"), "names a file outside the folder"),
    "a shard that is missing": (shards(a="model-1-of-2.safetensors"), "cannot read"),
    "a shard that is no name": (shards(a=None), "names a file outside the folder"),
    "a shard with a long name": (shards(a="x" * 5000), "cannot read"),
    "overlapping tensors": (header(overlapping), "is damaged or no safetensors file"),
    "a tensor beyond the file": (
        header(
            lambda document: {
                **document,
                "q": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]},
            }
        ),
        "is damaged or no safetensors file",
    ),
    "a header that is a list": (header(lambda document: [document]), "is damaged or no safe"),
    "no temperature": (generation(temperature=float("nan")), "temperature: nan is outside"),
    "more tokens than a tensor can tell": (
        generation(max_new_tokens=10**30),
        "max_new_tokens: 1000000000000000000000000000000 is outside",
    ),
    "a length beyond a tensor": (generation(min_length=2**70), "min_length: 11805916"),
    "eos of 5,000 digits": (generation(eos_token_id=int(DIGITS[:4000])), "eos_token_id"),
}


def refusal(folder: Path) -> Exception | None:
    """The error of loading a folder and encoding a text with it; None if there is none."""
    from lmcli.checkpoints import folder as checkpoints
    from lmcli.errors import UserError

    try:
        checkpoint = checkpoints.load(folder)
        checkpoint.tokenizer.encode_batch(["x" * 60, "a b", "é ½"])
        checkpoint.tokenizer.encode("x" * 60)
    except UserError as error:
        return error
    return None


def problem(name: str, original: Path, folder: Path) -> str:
    """What is wrong with the refusal of a case; "" if nothing is."""
    change, message = CASES[name]
    shutil.copytree(original, folder)
    change(folder)
    error = refusal(folder)
    if error is None:
        return f"{name}: not refused"
    if error.exit_code != 1 or "\n" in error.what or message not in error.what:
        return f"{name}: exit {error.exit_code}, {error.what[:300]}"
    return ""


class WithoutAsserts(SourceFileLoader):
    """Loads a file as PYTHONOPTIMIZE=1 does."""

    def get_code(self, fullname):
        source = self.get_data(self.path)
        return compile(source, self.path, "exec", dont_inherit=True, optimize=1)


class OptimizedPackage(MetaPathFinder):
    """Finds the files of lmcli for WithoutAsserts."""

    def find_spec(self, fullname, path, target=None):
        spec = PathFinder.find_spec(fullname, path, target) if fullname[:5] == "lmcli" else None
        if spec and isinstance(spec.loader, SourceFileLoader):
            spec.loader = WithoutAsserts(fullname, spec.loader.path)
        return spec


def asserts_are_off() -> bool:
    """True if all of lmcli was loaded without them."""
    modules = [module for name, module in sys.modules.items() if name[:5] == "lmcli"]
    return all(isinstance(module.__loader__, WithoutAsserts) for module in modules)


if __name__ == "__main__":
    sys.meta_path.insert(0, OptimizedPackage())
    found = [
        problem(name, Path(sys.argv[1]), Path(sys.argv[2]) / str(i)) for i, name in enumerate(CASES)
    ]
    print("\n".join(filter(None, found)))
    print(f"{len(found)} folders tried, asserts {'off' if asserts_are_off() else 'on'}")
    sys.exit(any(found))
