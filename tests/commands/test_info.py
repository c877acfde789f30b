"""`lm info`: lines, a table, JSON; the figures of a run; damage reported with exit code 1."""

import json
import os
import pty
import shutil
import subprocess
import sys

import pytest


def facts_of(done) -> dict[str, str]:
    """{key: value} of the lines for one argument."""
    assert done.returncode == 0, done.stderr.decode()
    return dict(line.split("\t", 1) for line in done.stdout.decode().splitlines())


def test_a_run_has_facts_of_its_model_and_its_figures(inside, trained):
    facts = facts_of(inside("info", trained[0]))
    figures = json.loads(inside("perplexity", "-m", trained[0], "--validation", "--json").stdout)
    assert (facts["kind"], facts["family"], facts["shape"], facts["context"]) == (
        "run",
        "qwen3",
        "decoder",
        "64",
    )
    assert (facts["tokenizer.kind"], facts["tokenizer.template"]) == (
        "byte-level BPE",
        "<|endoftext|> …",
    )
    assert (facts["run.steps"], facts["run.budget"]) == ("40", "steps=40") and facts[
        "run.data"
    ].endswith("story.txt")
    assert float(facts["run.val_bits_per_byte"]) == pytest.approx(
        figures["bits_per_byte"], rel=1e-5
    )
    assert facts["commands"] == "lm generate, lm score, lm perplexity"
    assert int(facts["parameters.total"]) * 4 == int(facts["memory.float32"])
    assert facts["weights.unused"] == facts["weights.missing"] == ""


def test_json_has_one_object_per_line(inside, trained, story):
    first, second = map(
        json.loads,
        inside("info", "--json", trained[0], story, "-m", trained[0]).stdout.splitlines(),
    )
    assert first["run"]["steps"] == 40 and first["commands"][1] == "lm score"
    tokens = inside("perplexity", "-m", trained[0], "--json", story).stdout
    assert (second["kind"], second["tokens"]) == ("text", json.loads(tokens)["tokens"])
    assert second["bytes"] == story.stat().st_size


def test_several_arguments_are_separated_by_an_empty_line(inside, trained, story):
    done = inside("info", story, trained[0] / "tokenizer.json", "-", stdin=b"one two\n")
    parts = [
        dict(line.split("\t", 1) for line in part.splitlines())
        for part in done.stdout.decode().split("\n\n")
    ]
    assert [part["kind"] for part in parts] == ["text", "tokenizer", "text"]
    assert (parts[2]["path"], parts[2]["words"]) == ("-", "2")


def test_a_table_on_a_terminal(trained, environment):
    leader, follower = pty.openpty()
    done = subprocess.Popen(
        [sys.executable, "-m", "lmcli", "info", "-v", trained[0]],
        stdout=follower,
        stderr=subprocess.PIPE,
        env={**environment, "COLUMNS": "70"},
    )
    os.close(follower)
    text = b""
    try:
        while chunk := os.read(leader, 1 << 16):
            text += chunk
    except OSError:
        pass  # the end, on Linux
    lines = text.decode().replace("\r\n", "\n").splitlines()
    assert done.wait(60) == 0 and "\t" not in text.decode() and max(map(len, lines)) <= 70
    total = next(line for line in lines if line.startswith("parameters.total"))
    assert "," in total and any("%)" in line for line in lines if line.startswith("parameters.mlp"))
    assert any("kB" in line or "MB" in line for line in lines if line.startswith("memory.float32"))


def test_damage_is_reported_with_all_other_facts(inside, trained, tmp_path):
    folder = shutil.copytree(trained[0], tmp_path / "damaged")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1000])
    (folder / "tokenizer.json").write_text("{")
    done = inside("info", folder, trained[0])
    errors = done.stderr.decode()
    assert (
        done.returncode == 1
        and "model.safetensors: is damaged" in errors
        and "tokenizer.json: is no tokenizer" in errors
    )
    first, second = done.stdout.decode().split("\n\n")
    assert (
        "\nparameters.total\t" in first
        and "\ndamage\t" in first
        and "\ntokenizer.kind\tbyte-level BPE" in second
    )


@pytest.mark.parametrize(
    "argument, expected",
    [
        ("/nowhere/at/all", "no such file or folder"),
        ("nowhere", "no such model in the Hugging Face cache"),
        ("EMPTY", "holds neither a model, nor a tokenizer, nor text"),
        ("BINARY", "is not text: invalid UTF-8 in line 2"),
    ],
)
def test_paths_without_facts(inside, tmp_path, monkeypatch, argument, expected):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    done = inside(
        "info", {"EMPTY": tmp_path / "empty", "BINARY": tmp_path / "binary"}.get(argument, argument)
    )
    assert (
        done.returncode == 1
        and expected in done.stderr.decode()
        and b"Traceback" not in done.stderr
    )
    assert done.stderr.count(b"\n") <= 2


@pytest.mark.parametrize(
    "recipe",
    ["", "[1]", "data: 5\nresult: [1]\ntrain: x\nversions: 3", "data: {files: 7}", "a: [", "\0"],
)
def test_a_bad_recipe_is_no_traceback(inside, trained, tmp_path, recipe):
    folder = shutil.copytree(trained[0], tmp_path / "odd")
    (folder / "recipe.yaml").write_text(recipe)
    done = inside("info", folder)
    assert (
        done.returncode in (0, 1)
        and b"\nparameters.total\t" in done.stdout
        and b"Traceback" not in done.stderr
    )


def test_an_option_without_a_name_is_an_error(inside):
    done = inside("info", "--field", "text")
    assert done.returncode == 2 and b"nothing to describe" in done.stderr


def test_an_empty_file_is_a_text(inside, tmp_path):
    (tmp_path / "a.txt").write_text("")
    facts = facts_of(inside("info", tmp_path / "a.txt"))
    assert [facts[name] for name in ("bytes", "lines", "characters", "words")] == ["0"] * 4


def test_a_name_in_the_hubs_cache(inside, trained, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "hub" / "models--owner--model"
    shutil.copytree(
        trained[0],
        folder / "snapshots" / "c0ffee",
        ignore=shutil.ignore_patterns("state", "recipe.yaml"),
    )
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("c0ffee")
    assert facts_of(inside("info", "owner/model"))["kind"] == "model"
    assert facts_of(inside("info", "-m", "owner/model", trained[0] / "README.md"))[
        "tokens"
    ].isdecimal()


@pytest.mark.parametrize("number", range(2))
def test_full_and_closed_outputs(trained, environment, number):
    command = [sys.executable, "-m", "lmcli", "info", trained[0]]
    if number:
        with open("/dev/full", "wb") as full:
            done = subprocess.run(
                command, stdout=full, stderr=subprocess.PIPE, env=environment, timeout=60
            )
        assert (
            done.returncode == 1
            and b"No space left" in done.stderr
            and done.stderr.count(b"\n") == 1
        )
        return
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        command, stdout=writing, stderr=subprocess.PIPE, env=environment, timeout=60
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")
