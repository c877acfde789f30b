"""Folders that someone means harm with, or that a disk has garbled: whatever a model or run folder holds, it is read, or
refused by a UserError, soon, in bounded memory, and nothing is written anywhere.

LM_FUZZ_EXAMPLES=20000 python -m pytest -p no:xdist tests/checkpoints/test_hostile_folders.py goes on for some ten minutes.
"""

import json
import os
import resource
import shutil
import time
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmcli import recipes
from lmcli.checkpoints import folder as checkpoints
from lmcli.errors import UserError
from lmcli.training import run_folder, state

EXAMPLES = int(os.environ.get("LM_FUZZ_EXAMPLES", "400"))
SECONDS, ROOM = 20, 2 << 30  # that one folder may take, and bytes beyond what the process has
NUMBERS = st.sampled_from([0, -1, 1, 2, 3, 10**9, 10**30, -10**9, 2**63, 1e308, 5e-324, float("nan"), float("inf"), True])
WORDS = st.sampled_from(["", "../../etc/passwd", "/etc/passwd", "a/../../b", "..", "NaN", "llama", "gelu", "\0",
                         "{{ 7 * 7 }}", "{% for a in range(10**9) %}{{ a }}{% endfor %}",
                         "{{ ''.__class__.__mro__[1].__subclasses__() }}",
                         "!!python/object/apply:os.system ['touch pwned']", "x" * 100_000, "\ud83d\ude00", "𝕏"])
VALUES = st.recursive(NUMBERS | WORDS | st.none(), lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
    WORDS, inner, max_size=3), max_leaves=6)
GARBLED = settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def original(reference, tmp_path_factory) -> Path:
    """A model in shards, in which a run has been: its recipe and a state."""
    folder = tmp_path_factory.mktemp("original")
    reference(folder, "llama", max_shard_size="20KB")
    (folder / "recipe.yaml").write_text(recipes.to_yaml(recipes.resolve("tiny", (), {}), data={"files": ["a.txt"]}))
    saved = folder / "state" / "step-000000005"
    saved.mkdir(parents=True)
    shutil.copy(next(folder.glob("model-*.safetensors")), saved / "weights.safetensors")
    (saved / "counters.json").write_text(json.dumps({"step": 5, "optimizer_steps": {}}))
    return folder


@pytest.fixture(autouse=True)
def little_memory():
    """A process that takes ROOM more than it has now gets no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    held = 1024 * next((int(line.split()[1]) for line in _status() if line.startswith("VmData")), 1 << 30)
    resource.setrlimit(resource.RLIMIT_DATA, (held + ROOM, hard))
    yield
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _status() -> list[str]:
    file = Path("/proc/self/status")
    return file.read_text().splitlines() if file.exists() else []


def everything(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of all there is below."""
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def read_all(folder: Path) -> list[str]:
    """Reads a folder in every way that commands do; what was refused."""
    refused = []
    for read in (used, lambda: run_folder.reopen(folder), lambda: state.newest(folder / "state", refused.append)):
        began = time.monotonic()
        try:
            read(folder) if read is used else read()
        except UserError as error:
            refused.append(str(error))
        assert time.monotonic() - began < SECONDS
    return refused


def used(folder: Path) -> None:
    """Loads a model and has it read a few words."""
    checkpoint = checkpoints.load(folder)
    ids = checkpoint.tokenizer.encode("Once upon a time")[:8] or [0]
    if checkpoint.model.config.shape == "decoder":
        with torch.no_grad():
            checkpoint.model(torch.tensor([ids]))


def garble(data, folder: Path, original: Path) -> None:
    """Changes one file of a copy of `original` in some way."""
    file = data.draw(st.sampled_from(sorted(path for path in folder.rglob("*") if path.is_file())), label="file")
    kinds = ["cut", "bits", "splice", "gone"]
    if file.suffix in (".json", ".yaml"):
        kinds += ["value", "value", "value", "deep", "anchors", "nothing"]
    if file.suffix == ".safetensors":
        kinds += ["header", "header"]
    kind = data.draw(st.sampled_from(kinds), label="kind")
    content = file.read_bytes()
    at = data.draw(st.integers(0, max(0, len(content) - 1)), label="at")
    if kind == "gone":
        file.unlink()
    elif kind == "value":
        file.write_text(_replaced(data, original / file.relative_to(folder)), encoding="utf-8", errors="surrogatepass")
    elif kind == "header":
        size = data.draw(st.sampled_from([0, 1, 7, 2**20, 2**31, 2**63, 2**64 - 1]), label="size")
        file.write_bytes(size.to_bytes(8, "little") + content[8:])
    else:
        flipped = bytes([content[at] ^ 1 << at % 8]) if content else b""
        anchors = (b"%c: &%c [*%c, *%c]\n" % (letter, letter, letter - 1, letter - 1) for letter in range(98, 122))
        file.write_bytes({
            "cut": content[:at], "bits": content[:at] + flipped + content[at + 1:], "nothing": b"",
            "splice": content[:at] + data.draw(st.binary(min_size=1, max_size=40), label="bytes") + content[at:],
            "deep": b"[" * 100_000 + b"]" * 100_000, "anchors": b"a: &a [x, x]\n" + b"".join(anchors)}[kind])


def _replaced(data, file: Path) -> str:
    """A document with one of its values, wherever it is, replaced by another."""
    document = json.loads(file.read_text()) if file.suffix == ".json" else yaml.safe_load(file.read_text())
    place, inside = None, document
    while isinstance(inside, dict | list) and inside and (place is None or data.draw(st.booleans(), label="deeper")):
        keys = list(inside)[:200] if isinstance(inside, dict) else range(min(len(inside), 200))
        key = data.draw(st.sampled_from(keys), label="key")
        place, inside = (inside, key), inside[key]
    if place is None:
        return json.dumps(data.draw(VALUES, label="value"))
    place[0][place[1]] = data.draw(VALUES, label="value")
    return json.dumps(document) if file.suffix == ".json" else yaml.safe_dump(document)


@GARBLED
@given(data=st.data())
def test_a_garbled_folder_is_read_or_refused(original, tmp_path_factory, data):
    room = tmp_path_factory.mktemp("garbled")
    folder = shutil.copytree(original, room / "model")
    try:
        for _ in range(data.draw(st.integers(1, 3), label="changes")):
            if not any(path.is_file() for path in folder.rglob("*")):
                break
            garble(data, folder, original)
        before = everything(room)
        read_all(folder)
        assert everything(room) == before and not Path("pwned").exists()
    finally:
        shutil.rmtree(room)


def test_the_original_is_not_refused(original):
    used(original)
    assert len(read_all(original)) == 0
