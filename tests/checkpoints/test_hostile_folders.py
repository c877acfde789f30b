"""Malicious and corrupted model and run folders: each is loaded or rejected by a UserError.

That takes little time and bounded memory, and writes nothing. To run for about ten minutes:
LM_FUZZ_EXAMPLES=20000 python -m pytest -p no:xdist tests/checkpoints/test_hostile_folders.py
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
from lmcli.runs import run_folder
from lmcli.training import resume_state

pytestmark = pytest.mark.slow

EXAMPLES = int(os.environ.get("LM_FUZZ_EXAMPLES", "150"))
# limits for one folder: seconds, and bytes beyond what the process has
SECONDS, MEMORY = 20, 2 << 30
NUMBERS = st.sampled_from(
    [
        0,
        -1,
        1,
        2,
        3,
        10**9,
        10**30,
        -(10**9),
        2**63,
        1e308,
        5e-324,
        float("nan"),
        float("inf"),
        True,
    ]
)
WORDS = st.sampled_from(
    [
        "",
        "../../etc/passwd",
        "/etc/passwd",
        "a/../../b",
        "..",
        "NaN",
        "llama",
        "gelu",
        "\0",
        "{{ 7 * 7 }}",
        "{% for a in range(10**9) %}{{ a }}{% endfor %}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "!!python/object/apply:os.system ['touch pwned']",
        "x" * 100_000,
        "\ud83d\ude00",
        "𝕏",
    ]
)
VALUES = st.recursive(
    NUMBERS | WORDS | st.none(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)
FUZZED = settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def original(reference, tmp_path_factory) -> Path:
    """A model in shards in a run's folder, with recipe and resume state."""
    folder = tmp_path_factory.mktemp("original")
    reference(folder, "llama", max_shard_size="20KB")
    (folder / "recipe.yaml").write_text(
        recipes.to_yaml(recipes.resolve("tiny", (), {}), data={"files": ["a.txt"]})
    )
    saved = folder / "state" / "step-000000005"
    saved.mkdir(parents=True)
    shutil.copy(next(folder.glob("model-*.safetensors")), saved / "weights.safetensors")
    (saved / "counters.json").write_text(json.dumps({"step": 5, "optimizer_steps": {}}))
    return folder


@pytest.fixture(autouse=True)
def memory_limit():
    """Limits the memory of the process to MEMORY more than it has now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    used = 1024 * next(
        (int(line.split()[1]) for line in _status() if line.startswith("VmData")), 1 << 30
    )
    resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY, hard))
    yield
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _status() -> list[str]:
    file = Path("/proc/self/status")
    return file.read_text().splitlines() if file.exists() else []


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and modification time of everything in a folder."""
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def read_all(folder: Path) -> list[str]:
    """Reads a folder in every way that commands do; returns the errors."""
    errors = []
    for read in (
        load_and_run,
        lambda: run_folder.reopen(folder),
        lambda: resume_state.newest(folder / "state", errors.append),
    ):
        start = time.monotonic()
        try:
            read(folder) if read is load_and_run else read()
        except UserError as error:
            errors.append(str(error))
        assert time.monotonic() - start < SECONDS
    return errors


def load_and_run(folder: Path) -> None:
    """Loads a model and runs it on a few words."""
    checkpoint = checkpoints.load(folder)
    ids = checkpoint.tokenizer.encode("Once upon a time")[:8] or [0]
    if checkpoint.model.config.shape == "decoder":
        with torch.no_grad():
            checkpoint.model(torch.tensor([ids]))


def corrupt(data, folder: Path, original: Path) -> None:
    """Corrupts one file of a copy of `original` in some way."""
    file = data.draw(
        st.sampled_from(sorted(path for path in folder.rglob("*") if path.is_file())), label="file"
    )
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
        file.write_text(
            _with_another_value(data, original / file.relative_to(folder)),
            encoding="utf-8",
            errors="surrogatepass",
        )
    elif kind == "header":
        size = data.draw(st.sampled_from([0, 1, 7, 2**20, 2**31, 2**63, 2**64 - 1]), label="size")
        file.write_bytes(size.to_bytes(8, "little") + content[8:])
    else:
        flipped = bytes([content[at] ^ 1 << at % 8]) if content else b""
        anchors = (
            b"%c: &%c [*%c, *%c]\n" % (letter, letter, letter - 1, letter - 1)
            for letter in range(98, 122)
        )
        file.write_bytes(
            {
                "cut": content[:at],
                "bits": content[:at] + flipped + content[at + 1 :],
                "nothing": b"",
                "splice": content[:at]
                + data.draw(st.binary(min_size=1, max_size=40), label="bytes")
                + content[at:],
                "deep": b"[" * 100_000 + b"]" * 100_000,
                "anchors": b"a: &a [x, x]\n" + b"".join(anchors),
            }[kind]
        )


def _with_another_value(data, file: Path) -> str:
    """A document with one of its values, at any depth, replaced by another."""
    document = (
        json.loads(file.read_text()) if file.suffix == ".json" else yaml.safe_load(file.read_text())
    )
    parent, value = None, document
    while (
        isinstance(value, dict | list)
        and value
        and (parent is None or data.draw(st.booleans(), label="deeper"))
    ):
        keys = list(value)[:200] if isinstance(value, dict) else range(min(len(value), 200))
        key = data.draw(st.sampled_from(keys), label="key")
        parent, value = (value, key), value[key]
    if parent is None:
        return json.dumps(data.draw(VALUES, label="value"))
    parent[0][parent[1]] = data.draw(VALUES, label="value")
    return json.dumps(document) if file.suffix == ".json" else yaml.safe_dump(document)


@FUZZED
@given(data=st.data())
def test_a_corrupted_folder_is_loaded_or_rejected(original, tmp_path_factory, data):
    parent = tmp_path_factory.mktemp("corrupted")
    folder = shutil.copytree(original, parent / "model")
    try:
        for _ in range(data.draw(st.integers(1, 3), label="changes")):
            if not any(path.is_file() for path in folder.rglob("*")):
                break
            corrupt(data, folder, original)
        before = snapshot(parent)
        read_all(folder)
        assert snapshot(parent) == before and not Path("pwned").exists()
    finally:
        shutil.rmtree(parent)


def test_the_original_is_loaded(original):
    load_and_run(original)
    assert len(read_all(original)) == 0
