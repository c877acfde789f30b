"""Decoders that run in C without torch, beside the same folders loaded by torch."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from random_checkpoints import CASES, write
from safetensors.torch import load_file, save_file

import lmcli
from lmcli.checkpoints import folder as checkpoints
from lmcli.errors import UserError
from lmcli.kernels import build
from lmcli.kernels.decode_step import parameter_shapes
from lmcli.kernels.decoding_state import fast_state
from lmcli.kernels.fast_path import build_model

pytestmark = pytest.mark.skipif(build.library() is None, reason=build.problem())
DECODERS = [case for case in CASES if case.shape == "decoder" and case.head == "lm"]
LLAMA, GPT2, GEMMA = (
    next(case for case in DECODERS if case.family == name)
    for name in ("llama", "gpt2", "gemma3_text")
)
STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROWS = [[5, 9, 33, 7], [12]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """saved(case, dtype): a folder of transformers with weights in this precision, cached."""
    folders = {}

    def get(case, dtype="float32"):
        if (case, dtype) not in folders:
            folder = tmp_path_factory.mktemp("saved")
            folders[case, dtype] = write(folder, case.model().to(STORED[dtype]))
        return folders[case, dtype]

    return get


def walk(state):
    """Logits after the prompts and after two more tokens of each."""
    first = state.logits
    state.add(np.array([6, 11]))
    return np.stack([first, state.logits])


def from_files(folder, dtype):
    """The logits of `walk` without torch."""
    model = lmcli.load(folder, device="cpu", dtype=dtype)
    assert model.decodes_without_torch
    logits = walk(model._decoding_states()[0](ROWS, None, 20))
    assert "model" not in vars(model)
    return logits


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("case", DECODERS, ids=str)
def test_logits_equal_those_of_torchs_weights_to_the_bit(case, stored, saved):
    folder = saved(case, stored)
    for dtype in ("float32", "bfloat16"):
        model = checkpoints.load(folder, dtype=dtype).model
        assert np.array_equal(from_files(folder, dtype), walk(fast_state(model, ROWS, None, 20)))


@pytest.mark.parametrize("case", DECODERS, ids=str)
def test_the_shapes_are_those_of_the_model(case, saved):
    config = checkpoints.read_folder(saved(case)).config
    expected = {n: tuple(weight.shape) for n, weight in build_model(config).named_parameters()}
    assert parameter_shapes(config) == expected


def changed(folder, target, change):
    """A copy of a model folder whose tensors are what `change` makes of them."""
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    file = target / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return target


def shards(folder):
    """Divides the weights over two files with an index."""
    tensors = sorted(load_file(folder / "model.safetensors").items())
    parts = {"a.safetensors": dict(tensors[::2]), "b.safetensors": dict(tensors[1::2])}
    for name, part in parts.items():
        save_file(part, folder / name)
    (folder / "model.safetensors").unlink()
    names = {tensor: name for name, part in parts.items() for tensor in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def unaligned(folder):
    """Moves the tensors to odd places, which the format allows."""
    file = folder / "model.safetensors"
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + size].rstrip() + b" "
    header += b" " * (len(header) % 2 == 0)
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])


@pytest.mark.parametrize("rewrite", [shards, unaligned])
def test_other_files_with_the_same_weights(rewrite, saved, tmp_path):
    expected = from_files(saved(LLAMA), "float32")
    folder = changed(saved(LLAMA), tmp_path, dict)
    rewrite(folder)
    assert np.array_equal(from_files(folder, "float32"), expected)


def test_other_names_and_unused_tensors(saved, tmp_path):
    expected = from_files(saved(GPT2), "float32")
    more = {"transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8)}
    folder = changed(saved(GPT2), tmp_path, lambda old: {f"module.{n}": old[n] for n in old} | more)
    assert np.array_equal(from_files(folder, "float32"), expected)


MISTAKES = {
    "missing": lambda old: {name: old[name] for name in old if "o_proj" not in name},
    "shape": lambda old: {**old, "model.norm.weight": torch.ones(5)},
    "integers": lambda old: {**old, "model.norm.weight": torch.ones(24, dtype=torch.int32)},
    "foreign": lambda old: {**old, "model.layers.0.mlp.extra": torch.ones(2)},
    "twice": lambda old: {**old, "module.model.norm.weight": torch.ones(24)},
}
DAMAGE = {
    "empty": lambda data: b"",
    "short": lambda data: data[:-8],
    "long": lambda data: data + b"12345678",
    "no header": lambda data: b"\xff" * 8 + data[8:],
    "no JSON": lambda data: data[:8] + b"\x00" + data[9:],
    "outside": lambda data: data.replace(b"data_offsets", b"data_offset5", 1),
}


def errors(folder):
    """What `lmcli.load` and torch's way of loading say about a folder."""
    for load in (lambda: lmcli.load(folder, device="cpu"), lambda: checkpoints.load(folder)):
        with pytest.raises(UserError) as caught:
            load()
        yield str(caught.value)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_a_file_are_reported_as_by_torch(mistake, saved, tmp_path):
    one, other = errors(changed(saved(LLAMA), tmp_path, MISTAKES[mistake]))
    assert one == other and str(tmp_path) in one


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_reported_as_by_torch(damage, saved, tmp_path):
    file = changed(saved(LLAMA), tmp_path, dict) / "model.safetensors"
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    one, other = errors(tmp_path)
    assert one == other and "is damaged or no safetensors file" in one


def test_numbers_that_numpy_lacks_are_left_to_torch(saved, tmp_path):
    kind = torch.float8_e4m3fn
    folder = changed(saved(LLAMA), tmp_path, lambda old: {n: old[n].to(kind) for n in old})
    model = lmcli.load(folder, device="cpu")
    assert not model.decodes_without_torch and model.generate("word5", max_new_tokens=2)


def test_what_changes_in_the_module_changes_the_text(saved):
    options = {"temperature": 0, "max_new_tokens": 4}
    model = lmcli.load(saved(LLAMA), device="cpu")
    (before,) = model.generate("word5 word6", **options)
    assert "model" not in vars(model)
    logits = model.logits([model.encode("word5 word6")])[0, -1]
    assert logits.log_softmax(-1).max().item() == pytest.approx(before.token_logprobs[0], abs=1e-5)
    (again,) = model.generate("word5 word6", **options)  # by the module that is now there
    assert again.tokens == before.tokens
    with torch.no_grad():
        model.model.head.output.weight.neg_()
    (after,) = model.generate("word5 word6", **options)
    assert after.tokens != before.tokens


def test_generate_imports_nothing_heavy(saved):
    folders = [
        str(saved(case, dtype))
        for case in (LLAMA, GPT2, GEMMA)
        for dtype in ("float32", "bfloat16")
    ]
    script = f"""
import sys
from lmcli.commands import run
for folder in {folders!r}:
    for dtype in ("float32", "bfloat16", "auto"):
        options = ("--dtype", dtype, "--device", "cpu", "--temperature", "0", "-n", "3")
        assert run(["generate", "-m", folder, *options, "word5"]) == 0
heavy = ("torch", "transformers", "rich", "jinja2", "pandas", "llguidance", "huggingface_hub")
print("loaded:", *(name for name in heavy if name in sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ}
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 19, done.stderr
    assert lines[-1] == "loaded:" and all(line.startswith(" word") for line in lines[:-1])
