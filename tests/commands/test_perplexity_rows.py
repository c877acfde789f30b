"""`lm perplexity`: rows, documents, windows, and the errors of each."""

import json
import math

import pytest


def figures(done) -> list[dict]:
    assert done.returncode == 0, done.stderr.decode()
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def perplexity(inside, trained):
    return lambda *arguments, stdin=b"": figures(inside("perplexity", "-m", trained[0], "--json", *arguments, stdin=stdin))


def test_counts_and_figures_belong_together(perplexity):
    text = "The baker\nsaid 却说 twice.\n"
    row = perplexity(stdin=text.encode())[0]
    assert (row["bytes"], row["characters"], row["words"], row["documents"]) == (len(text.encode()), len(text), 5, 1)
    bits = -row["logprob"] / math.log(2)
    assert row["bits_per_byte"] == pytest.approx(bits / row["bytes"])
    assert row["bits_per_character"] == pytest.approx(bits / row["characters"])
    assert row["perplexity"] == pytest.approx(math.exp(-row["logprob"] / row["tokens"]))
    assert row["word_perplexity"] == pytest.approx(math.exp(-row["logprob"] / row["words"]))
    assert (row["context"], row["stride"], row["dtype"]) == (64, 32, "float32")


def test_lines_as_documents_score_like_the_lines(perplexity, inside, trained, story):
    lines = story.read_bytes()[:2000].rpartition(b"\n")[0].replace(b"<|endoftext|>", b"") + b"\n"
    row = perplexity("--documents", "line", stdin=lines)[0]
    scored = [json.loads(line) for line in inside("score", "-m", trained[0], "--json", stdin=lines).stdout.splitlines()]
    full = [found for found in scored if found["text"].strip()]
    assert row["documents"] == len(full)
    assert row["logprob"] == pytest.approx(sum(found["logprob"] for found in full), rel=1e-5)
    assert row["tokens"] == sum(found["tokens"] for found in full)


def test_marks_and_blank_lines_part_documents(perplexity):
    assert perplexity(stdin=b"one\n<|endoftext|>\ntwo\n")[0]["documents"] == 2
    assert perplexity("--documents", "blank", stdin=b"one\nmore\n\n\ntwo\n")[0]["documents"] == 2


def test_more_context_before_each_token_is_no_worse(perplexity, story):
    text = story.read_bytes()[:6000]
    wide, narrow = (perplexity("--context", context, "--stride", 8, stdin=text)[0] for context in (64, 9))
    assert wide["tokens"] == narrow["tokens"] and wide["context"] == 64 and narrow["context"] == 9
    assert wide["bits_per_byte"] < narrow["bits_per_byte"] + 0.05


def test_models_side_by_side_name_themselves(inside, trained, tmp_path):
    done = inside("perplexity", "-m", trained[0], "-m", trained[0], stdin=b"The baker\n")
    header, *rows = [line.split("\t") for line in done.stdout.decode().splitlines()]
    assert header[:2] == ["model", "file"] and [row[:2] for row in rows] == [[str(trained[0]), "standard input"]] * 2


def test_standard_input_among_files_keeps_its_name(perplexity, story):
    assert [row["file"] for row in perplexity("-", story, stdin=b"The baker\n")] == ["standard input", str(story)]


def test_rows_before_a_bad_file_are_written(inside, trained, story, tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"fine\nnot \xff fine\n")
    done = inside("perplexity", "-m", trained[0], story, tmp_path / "bad.txt")
    assert done.returncode == 1 and done.stdout.count(b"\n") == 2
    assert done.stderr.decode().startswith(f"lm: error: {tmp_path / 'bad.txt'}, line 2: invalid UTF-8")


def test_a_model_folder_named_by_the_environment_may_hold_a_space(inside, trained, tmp_path, monkeypatch):
    (tmp_path / "my run").symlink_to(trained[0])
    monkeypatch.setenv("LM_MODEL", str(tmp_path / "my run"))
    assert inside("perplexity", stdin=b"The baker\n").returncode == 0


@pytest.mark.parametrize("arguments, code, told", [
    (("--context", "100"), 2, "--context: 100 is outside 2 to 64"), (("--stride", "65"), 2, "--stride"),
    (("--context", "8", "--stride", "9"), 2, "--stride"), (("--validation", "file.txt"), 2, "--validation"),
    (("missing.txt",), 1, "missing.txt: no such file"), (("-",), 1, "no text")])
def test_what_cannot_be_measured_is_told(inside, trained, arguments, code, told):
    done = inside("perplexity", "-m", trained[0], *arguments)
    assert done.returncode == code and told in done.stderr.decode() and done.stdout == b""


def test_a_text_of_one_token_without_beginning_has_nothing_to_score(inside, trained):
    done = inside("perplexity", "-m", trained[0], "--no-bos", stdin=b"a")
    assert done.returncode == 1 and b"no token to score" in done.stderr


def test_validation_text_that_has_changed_is_refused(inside, tmp_path, story):
    text = tmp_path / "text.txt"
    text.write_bytes(story.read_bytes()[:20_000])
    small = ("--preset", "tiny", "--steps", 1, "--set", "model.hidden_size=32", "--set", "model.num_hidden_layers=1",
             "--set", "tokenizer.vocab_size=300", "--set", "train.context=32", "--set", "train.batch_tokens=128")
    assert inside("train", text, "-o", tmp_path / "run", *small).returncode == 0
    assert inside("perplexity", "-m", tmp_path / "run", "--validation").returncode == 0
    text.write_bytes(text.read_bytes()[:-1] + b"!")
    done = inside("perplexity", "-m", tmp_path / "run", "--validation")
    assert done.returncode == 1 and done.stderr.decode().startswith(f"lm: error: {text}: has changed")
    text.unlink()
    done = inside("perplexity", "-m", tmp_path / "run", "--validation")
    assert done.returncode == 1 and b"no longer there" in done.stderr
