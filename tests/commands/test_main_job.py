"""From a text file to a model in a pipe: each command with a run of `lm train`."""

import json
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest


def test_train_prints_one_line_and_fills_the_folder(trained):
    folder, done = trained
    assert done.stdout.decode() == f"{folder}\n"
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "recipe.yaml",
        "README.md",
        "metrics.jsonl",
        "loss.svg",
        "state",
    }
    assert ElementTree.parse(folder / "loss.svg").getroot().tag.endswith("svg")
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics if "loss" in m] == list(range(1, 41))
    assert {"tokens", "elapsed", "learning_rate", "gradient_norm", "tokens_per_second"} <= metrics[
        0
    ].keys()


def test_training_learns(trained):
    metrics = [json.loads(line) for line in (trained[0] / "metrics.jsonl").read_text().splitlines()]
    losses = [m["loss"] for m in metrics if "loss" in m]
    assert sum(losses[-5:]) / 5 < losses[0] - 1.0


def test_the_validation_figure_equals_lm_perplexity(trained, inside):
    folder, done = trained
    printed = float(re.search(r"lm: validation ([\d.]+) bits/byte", done.stderr.decode()).group(1))
    row = json.loads(inside("perplexity", "-m", folder, "--validation", "--json").stdout)
    assert row["bits_per_byte"] == pytest.approx(printed, abs=5e-5)
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    best = min(m["val_bits_per_byte"] for m in logged if "val_bits_per_byte" in m)
    assert row["bits_per_byte"] == pytest.approx(best, rel=1e-9)
    assert row["perplexity"] == pytest.approx(math.exp(-row["logprob"] / row["tokens"]))


def test_transformers_reads_the_run(trained, story, difference):
    transformers = pytest.importorskip("transformers")
    import torch

    import lmcli

    folder, _ = trained
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ours = lmcli.load(folder, dtype="float32")
    # a text that spells the beginning token out has it once here, and twice in transformers
    lines = [line for line in story.read_text().splitlines() if line and line != "<|endoftext|>"][
        :100
    ]
    for line in lines:
        assert tokenizer(line)["input_ids"] == ours.prompt(line)
        assert tokenizer.decode(tokenizer(line)["input_ids"], skip_special_tokens=True) == line
    ids = torch.tensor([ours.prompt(" ".join(lines))[:64]])
    with torch.no_grad():
        assert difference(ours.logits(ids), theirs(ids).logits) <= 1e-5


def test_perplexity_equals_a_plain_loop_over_transformers(trained, story):
    transformers = pytest.importorskip("transformers")
    import torch

    import lmcli

    folder, _ = trained
    theirs, ours = (
        transformers.AutoModelForCausalLM.from_pretrained(folder).eval(),
        lmcli.load(folder, dtype="float32"),
    )
    text = story.read_text()[-3000:]
    ids, total, first = ours.encode(text), 0.0, 0
    end = min(64, len(ids))
    while first < len(ids):
        start = max(0, end - 64)
        window = torch.tensor([[0, *ids[start:end]]])
        with torch.no_grad():
            logprobs = theirs(window[:, :-1]).logits.log_softmax(-1)[0]
        total += sum(logprobs[i - start, ids[i]].item() for i in range(first, end))
        first, end = end, min(end + 32, len(ids))
    figures = ours.perplexity(text)
    assert (figures.tokens, figures.bytes) == (len(ids), len(text.encode()))
    assert figures.perplexity == pytest.approx(math.exp(-total / len(ids)), rel=1e-4)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"no final newline",
        b"one\r\ntwo\r\n",
        b"\n\n\na\n",
        "却说\n话说贾宝玉 \U0001f600\u2028x\x85\n".encode(),
        b"nul \x00 and tab\t\n",
        b"<|endoftext|> spelled out\n",
    ],
)
def test_tokenize_and_decode_restore_the_file(trained, inside, text):
    ids = inside("tokenize", "-m", trained[0], stdin=text)
    assert ids.returncode == 0 and ids.stdout.count(b"\n") == text.count(b"\n")
    decoded = inside("tokenize", "-m", trained[0], "--decode", stdin=ids.stdout).stdout
    assert decoded == text.replace(b"\r\n", b"\n")  # the CR of CR LF is no text


@pytest.mark.parametrize("name", ["tinyshakespeare", "zh-lunyu", "zh-hongloumeng"])
def test_real_texts_are_restored_byte_for_byte(trained, inside, shared, name):
    lines = (shared / "text" / f"{name}.txt").read_bytes().splitlines(keepends=True)
    text = b"".join(lines[:2000])
    ids = inside("tokenize", "-m", trained[0], stdin=text).stdout
    assert inside("tokenize", "-m", trained[0], "--decode", stdin=ids).stdout == text


def test_tokenize_shows_pieces_offsets_counts_and_json(trained, inside):
    folder = trained[0]
    ids = list(map(int, inside("tokenize", "-m", folder, stdin=b"The baker\n").stdout.split()))
    assert (
        inside("tokenize", "-m", folder, "--count", stdin=b"The baker\n").stdout
        == f"{len(ids)}\n".encode()
    )
    assert (
        inside("tokenize", "-m", folder, "--truncate", 1, stdin=b"The baker\n").stdout
        == f"{ids[0]}\n".encode()
    )
    assert inside("tokenize", "-m", folder, "--special", stdin=b"The\n").stdout.split()[0] == b"0"
    offsets = inside("tokenize", "-m", folder, "--offsets", stdin=b"The baker\n").stdout.decode()
    spans = [offset.split(":") for offset in offsets.split()]
    assert [int(span[0]) for span in spans] == ids and spans[-1][2] == "9"
    rows = inside(
        "tokenize", "-m", folder, "--json", "--format", "jsonl", stdin=b'{"text": "The", "n": 7}\n'
    ).stdout
    row = json.loads(rows)
    assert row["n"] == 7 and row["ids"] == ids[: len(row["ids"])]


def test_score_writes_one_line_per_line(trained, inside):
    done = inside("score", "-m", trained[0], stdin="The baker\n\na\tb\\c\n却说".encode())
    header, *rows = [line.split("\t") for line in done.stdout.decode().splitlines()]
    assert header == ["logprob", "tokens", "bytes", "bits_per_byte", "text"]
    assert len(rows) == 4 and rows[1] == ["0", "0", "0", "NA", ""]
    assert rows[2][4] == "a\\tb\\\\c" and rows[3][2] == "6" and rows[3][4] == "却说"
    logprob, _, size, bits = map(float, rows[0][:4])
    assert bits == pytest.approx(-logprob / math.log(2) / size, rel=1e-4)


def test_token_scores_sum_to_the_record_and_word_scores_to_a_little_less(trained, inside):
    line = b"The baker of Harrowgate\n"
    total = json.loads(inside("score", "-m", trained[0], "--json", stdin=line).stdout)["logprob"]
    for unit in ("token", "word"):
        done = inside("score", "-m", trained[0], "--per", unit, "--no-header", stdin=line)
        rows = [row.split("\t") for row in done.stdout.decode().splitlines()]
        logprob = sum(float(row[6]) for row in rows)
        # word scores include the probability that the word ends, so their sum is a little lower
        assert (
            logprob == pytest.approx(total, rel=1e-4)
            if unit == "token"
            else 1.2 * total < logprob < total
        )
        assert all(
            float(row[7]) == pytest.approx(-float(row[6]) / math.log(2), rel=1e-4) for row in rows
        )
    assert [row[2] for row in rows] == ["The", "baker", "of", "Harrowgate"]


def test_without_a_bos_token_the_first_token_is_not_scored(trained, inside):
    rows = inside(
        "score", "-m", trained[0], "--no-bos", "--per", "token", "--no-header", stdin=b"The baker\n"
    ).stdout
    first, second = [row.split("\t") for row in rows.decode().splitlines()][:2]
    assert first[6:] == ["NA", "NA"] and second[6] != "NA"
    row = json.loads(inside("score", "-m", trained[0], "--no-bos", "--json", stdin=b"a\n").stdout)
    assert row["logprob"] is None and row["tokens"] == 0 and row["bits_per_byte"] is None


def test_generate_writes_200_lines_for_200_prompts(trained, inside):
    prompts = b"".join(b"The baker %d\n" % i for i in range(200))
    once = inside("generate", "-m", trained[0], "-n", 8, "--seed", 3, stdin=prompts)
    assert once.returncode == 0 and once.stdout.count(b"\n") == 200
    assert (
        inside("generate", "-m", trained[0], "-n", 8, "--seed", 3, stdin=prompts).stdout
        == once.stdout
    )
    twice = inside("generate", "-m", trained[0], "-n", 8, "--num-samples", 2, stdin=b"a\n\nb\n")
    assert twice.stdout.count(b"\n") == 6


def test_generate_json_has_seed_tokens_and_finish_reason(trained, inside):
    row = json.loads(
        inside("generate", "-m", trained[0], "--json", "-n", 6, "--seed", 5, "The baker").stdout
    )
    assert list(row) == ["prompt", "text", "finish_reason", "tokens", "token_logprobs", "seed"]
    assert row["seed"] == 5 and len(row["tokens"]) == len(row["token_logprobs"])
    assert row["finish_reason"] in ("stop", "length")
    plain = inside("generate", "-m", trained[0], "-n", 6, "--seed", 5, "The baker").stdout.decode()
    assert plain == row["text"] + "\n"
    echoed = inside(
        "generate", "-m", trained[0], "-n", 6, "--seed", 5, "--echo", "The baker"
    ).stdout.decode()
    assert echoed == "The baker" + plain


def test_generate_escapes_lines_from_a_pipe_unless_raw(trained, inside):
    for seed in range(50):  # so hot that all bytes come, sooner or later
        arguments = (
            "generate",
            "-m",
            trained[0],
            "-n",
            60,
            "--temperature",
            5,
            "--top-p",
            1,
            "--seed",
            seed,
        )
        raw = inside(*arguments, "--raw", stdin=b"The\n").stdout.decode()
        if set("\n\r\t\\") & set(raw[:-1]):
            break
    else:
        pytest.fail("no text to escape in 50 draws")
    escaped = (
        raw[:-1]
        .replace("\\", "\\\\")
        .replace("\n", "\\n")
        .replace("\r", "\\r")
        .replace("\t", "\\t")
    )
    assert inside(*arguments, stdin=b"The\n").stdout.decode() == escaped + "\n"
    assert inside(*arguments, "-0", stdin=b"The\0").stdout.decode() == raw[:-1] + "\0"


def test_perplexity_rows_are_one_per_file_and_model(trained, inside, story, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("The baker of Harrowgate baked.\n")
    (tmp_path / "twin").symlink_to(trained[0])
    done = inside("perplexity", "-m", trained[0], "-m", tmp_path / "twin", story, other)
    header, *rows = [line.split("\t") for line in done.stdout.decode().splitlines()]
    assert header[:4] == ["model", "file", "perplexity", "bits_per_byte"] and len(rows) == 4
    apart = header.index("difference")
    assert (
        rows[0][1:apart] == rows[1][1:apart]
        and rows[0][apart] == "NA"
        and float(rows[1][apart]) == 0
    )
    assert rows[2][1] == rows[3][1] == str(other)
    piped = json.loads(
        inside("perplexity", "-m", trained[0], "--json", stdin=other.read_bytes()).stdout
    )
    assert piped["file"] == "standard input" and f"{piped['bits_per_byte']:.6g}" == rows[2][3]
