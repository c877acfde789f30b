"""lm train for encoders and encoder–decoders; transformers loads the results."""

import json
import random

import pytest
import torch
import yaml

SMALL = (
    "--set",
    "model.hidden_size=32",
    "--set",
    "model.num_hidden_layers=2",
    "--set",
    "model.num_attention_heads=4",
    "--set",
    "tokenizer.vocab_size=320",
    "--set",
    "train.context=32",
    "--set",
    "train.batch_tokens=512",
)
NUMBERS = {
    "one": "eins",
    "two": "zwei",
    "three": "drei",
    "four": "vier",
    "five": "fünf",
    "six": "sechs",
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Files of pairs (numbers, translated and reversed), labeled texts as TSV, plain text."""
    folder, draw = tmp_path_factory.mktemp("rows"), random.Random(0)
    chosen = [draw.choices(list(NUMBERS), k=draw.randint(1, 6)) for _ in range(120)]
    (folder / "pairs.jsonl").write_text(
        "".join(
            json.dumps(
                {
                    "id": i,
                    "source": " ".join(words),
                    "target": " ".join(NUMBERS[word] for word in reversed(words)),
                }
            )
            + "\n"
            for i, words in enumerate(chosen)
        )
    )
    (folder / "labels.tsv").write_text(
        "text\tlabel\n"
        + "".join(
            f"{' '.join(words)}\t{'even' if len(words) % 2 == 0 else 'odd'}\n" for words in chosen
        )
    )
    (folder / "plain.txt").write_text("".join(" ".join(words) + ".\n" for words in chosen))
    return folder


CASES = {
    "seq2seq": ("seq2seq-small", "pairs.jsonl", ("--set", "model.num_encoder_layers=1")),
    "2017": ("transformer-2017", "pairs.jsonl", ("--set", "model.intermediate_size=48")),
    "masked": ("encoder-small", "plain.txt", ()),
    "labels": ("encoder-small", "labels.tsv", ()),
}
CLASSES = {
    "seq2seq": "T5ForConditionalGeneration",
    "2017": "MarianMTModel",
    "masked": "ModernBertForMaskedLM",
    "labels": "ModernBertForSequenceClassification",
}
OBJECTIVES = {
    "seq2seq": "seq2seq",
    "2017": "seq2seq",
    "masked": "masked",
    "labels": "classification",
}


@pytest.fixture(scope="module", params=CASES)
def run(request, rows, lm, tmp_path_factory):
    """(case, folder, standard error) of a run of 12 steps."""
    preset, file, more = CASES[request.param]
    folder = tmp_path_factory.mktemp("runs") / request.param
    more = (*more, "--steps", 12, "--set", "train.sample_every=6")
    done = lm("train", rows / file, "-o", folder, "--preset", preset, *SMALL, *more)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode() == f"{folder}\n"
    return request.param, folder, done.stderr.decode()


def test_the_objective_and_its_figures_are_reported_and_stored(run):
    case, folder, stderr = run
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert (
        recipe["train"]["objective"] == OBJECTIVES[case]
        and f"{OBJECTIVES[case]} objective" in stderr
    )
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in logged if "loss" in entry]
    assert len(losses) == 12 and losses[-1] < losses[0]
    assert recipe["result"]["val_loss"] == min(
        entry["val_loss"] for entry in logged if "val_loss" in entry
    )
    assert f"{recipe['result']['val_loss']:.4f} nats/" in stderr
    assert f"{recipe['result']['val_loss']:.4f}" in (folder / "README.md").read_text()
    samples = [line for line in stderr.splitlines() if line.startswith("sample ")]
    assert bool(samples) == (OBJECTIVES[case] == "seq2seq") and all(
        " →" in sample for sample in samples
    )


def test_examples_longer_than_the_context_have_a_note(rows, inside, tmp_path):
    pair = {"source": "one two three four five six seven eight", "target": "x"}
    (tmp_path / "long.jsonl").write_text((json.dumps(pair) + "\n") * 30)
    done = inside(
        "train",
        tmp_path / "long.jsonl",
        "-o",
        tmp_path / "r",
        "--preset",
        "seq2seq-small",
        *[value.replace("context=32", "context=8") for value in SMALL],
        "--steps",
        1,
    )
    assert (
        done.returncode == 0 and b"examples are longer than the context of 8 tokens" in done.stderr
    )


@torch.no_grad()
def test_transformers_loads_the_folder_as_it_is(run, difference):
    import transformers

    import lmcli

    case, folder, _ = run
    theirs, info = getattr(transformers, CLASSES[case]).from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    lm, tokenizer = (
        lmcli.load(folder, device="cpu"),
        transformers.AutoTokenizer.from_pretrained(folder),
    )
    text = "two four one"
    ids = tokenizer(text)["input_ids"]
    assert ids == lm.tokenizer.with_template(lm.encode(text))[0]
    ids, decoder_ids = torch.tensor([ids]), torch.tensor([[0, 5, 9, 7]])
    if case in ("seq2seq", "2017"):
        expected, ours = (
            theirs(input_ids=ids, decoder_input_ids=decoder_ids),
            lm.model(ids, decoder_input_ids=decoder_ids),
        )
    else:
        expected, ours = theirs(input_ids=ids), lm.model(ids)
    assert difference(ours, expected.logits) < 1e-5
    if case == "labels":
        assert theirs.config.id2label == {0: "even", 1: "odd"}


def test_a_run_stopped_after_a_step_resumes_bit_for_bit(
    rows, run, inside, stopped_after_five, tmp_path
):
    case, folder, _ = run
    preset, file, more = CASES[case]
    stopped = stopped_after_five(
        "train",
        rows / file,
        "-o",
        tmp_path / "run",
        "--preset",
        preset,
        *SMALL,
        *more,
        "--steps",
        12,
        "--threads",
        1,
    )
    assert stopped.returncode == 130
    assert inside("train", "--resume", tmp_path / "run", "--threads", 1).returncode == 0
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (
        folder / "model.safetensors"
    ).read_bytes()


def test_a_masked_model_learns_labels_with_a_new_head(rows, inside, tmp_path):
    preset, file, more = CASES["masked"]
    first = inside(
        "train", rows / file, "-o", tmp_path / "a", "--preset", preset, *SMALL, *more, "--steps", 2
    )
    assert first.returncode == 0
    done = inside(
        "train", rows / "labels.tsv", "-o", tmp_path / "b", "--from", tmp_path / "a", "--steps", 2
    )
    assert done.returncode == 0 and b"the head is new: head." in done.stderr
    assert b"auto: as preset finetune-classify, since" in done.stderr
    again = inside(
        "train", rows / "labels.tsv", "-o", tmp_path / "c", "--from", tmp_path / "b", "--steps", 2
    )
    assert again.returncode == 0 and b"the head is new" not in again.stderr


@pytest.mark.parametrize(
    "preset, file, sets, code, expected",
    [
        (
            "seq2seq-small",
            "plain.txt",
            (),
            2,
            "learns from rows with source and target (or with --target FILE), and this is plain",
        ),
        ("seq2seq-small", "labels.tsv", (), 2, "columns in its first line: 'text', 'label'"),
        (
            "encoder-small",
            "pairs.jsonl",
            ("--set", "train.objective=classification"),
            2,
            "a classifier learns from rows with text and label; fields: ",
        ),
        (
            "small",
            "pairs.jsonl",
            ("--set", "train.objective=seq2seq"),
            2,
            "objective seq2seq needs the shape encoder-decoder",
        ),
        (
            "encoder-small",
            "plain.txt",
            ("--set", "model.post_norm=true"),
            2,
            "modernbert has no post_norm True",
        ),
        (
            "small",
            "plain.txt",
            ("--set", "model.gated_mlp=false"),
            2,
            "no checkpoint family has gated_mlp False",
        ),
        (
            "small",
            "plain.txt",
            ("--set", "model.model_type=lama"),
            2,
            "model_type 'lama' is none of",
        ),
    ],
)
def test_impossible_training_is_a_one_line_error(
    preset, file, sets, code, expected, rows, inside, tmp_path
):
    done = inside(
        "train",
        rows / file,
        "-o",
        tmp_path / "run",
        "--preset",
        preset,
        *SMALL,
        *sets,
        "--steps",
        1,
    )
    assert done.returncode == code and expected in done.stderr.decode(), done.stderr.decode()
    assert not (tmp_path / "run").exists()
