"""Compares `lm score` and `lm perplexity` with lm-evaluation-harness on the same model folder.

python tests/acceptance/beside_lm_eval.py DATA MODEL [--items 500] [--context TOKENS]

Needs lm_eval: pip install 'lm_eval[hf]'. DATA has lambada/lambada_test.jsonl, pairs/blimp-*.jsonl
and text/wikitext-2-test.txt. lm-eval (`--model hf`) reads them with its own YAML for LAMBADA
(OpenAI's), BLiMP and wikitext; lm runs the commands that a user types. Some rules differ, so lm is
measured by lm-eval's rules too: those figures must agree to four digits, or the exit code is 1.

LAMBADA: the last word after its context. lm-eval has no bos token before a context
(add_bos_token=False), as lm with --no-bos.

BLiMP: lm-eval puts its delimiter, a space, before each sentence. lm scores a sentence as it is, and
here with that space as well. If both sentences of a pair are the same (as once in passive_1),
lm-eval calls the first more likely.

wikitext: windows that do not overlap. lm begins each with the bos token. lm-eval begins every
window but the first with the token before it, and extends the last one back to a whole context;
these windows are scored with `lmcli.load` in Python. lm-eval counts the empty strings at the ends
of a text as words.
"""

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import lmcli

TASKS = {
    "lambada": """
output_type: loglikelihood
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' '+text.split(' ')[-1]}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
    "blimp": """
output_type: multiple_choice
doc_to_text: ""
doc_to_target: 0
doc_to_choice: "{{[good, bad]}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
    "wikitext": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity}
  - {metric: bits_per_byte}
""",
}


def lm_eval_figures(
    folder: Path, model: Path, files: dict[str, tuple[str, Path]], items: int
) -> dict[str, dict[str, float]]:
    """{task: {figure: value}} by lm-eval in float32; `files` maps a task to (kind, JSON Lines)."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    for name, (kind, file) in files.items():
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\n"
            "dataset_path: json\n"
            f"dataset_kwargs: {{data_files: {{test: {file}}}}}\n"
            "test_split: test\n" + TASKS[kind].lstrip()
        )
    evaluation = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model), "dtype": "float32", "add_bos_token": False},
        tasks=list(files),
        device="cpu",
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        batch_size=8,
        limit=items,
        bootstrap_iters=0,
    )
    return evaluation["results"]


def lm(*arguments: object) -> list[dict]:
    """The JSON objects that a command prints."""
    command = [sys.executable, "-m", "lmcli", *map(str, arguments), "--json"]
    output = subprocess.run(command, check=True, capture_output=True).stdout
    return [json.loads(line) for line in output.splitlines()]


def lambada(model: Path, file: Path) -> dict[str, float]:
    """Perplexity of the last word, and how often each of its tokens is the most likely one."""
    fields = ("--prefix-field", "before", "--field", "last", "--join", "")
    rows = lm("score", "-m", model, "--no-bos", *fields, "--alternatives", 1, file)
    correct = [all(token["rank"] == 1 for token in row["pieces"]) for row in rows]
    return {
        "perplexity": math.exp(-sum(row["logprob"] for row in rows) / len(rows)),
        "acc": sum(correct) / len(rows),
    }


def blimp(model: Path, file: Path, ties: bool = False) -> dict[str, float]:
    """How often the first text is more likely or, with `ties`, as likely."""
    rows = lm("score", "-m", model, "--bos", "--pairs", file)
    correct = [
        row["first_likelier"]
        or (ties and row["scores"][0]["logprob"] == row["scores"][1]["logprob"])
        for row in rows
    ]
    return {"acc": sum(correct) / len(rows)}


def wikitext(model: Path, file: Path, context: int) -> dict[str, float]:
    """Word perplexity and bits per byte in windows that do not overlap."""
    (row,) = lm("perplexity", "-m", model, "--stride", context, "--bos", file)
    return {"word_perplexity": row["word_perplexity"], "bits_per_byte": row["bits_per_byte"]}


def wikitext_in_lm_eval_windows(model: Path, text: str, context: int) -> dict[str, float]:
    """The same in the windows of lm-eval's get_rolling_token_windows."""
    loaded = lmcli.load(model, dtype="float32")
    ids, scorer = loaded.encode(text), loaded.scorer(bos=False)
    # (ids of a window, how many of its last tokens are scored)
    windows = [([*loaded.scorer(bos=True).bos, *ids[:context]], context)]
    for start in range(context, len(ids), context):
        end = min(start + context, len(ids))
        windows.append((ids[end - context - 1 : end], end - start))
    total = sum(
        float(scorer.token_logprobs([window])[0][-count:].sum(dtype="float64"))
        for window, count in windows
    )
    return {
        "word_perplexity": math.exp(-total / len(re.split(r"\s+", text))),
        "bits_per_byte": -total / math.log(2) / len(text.encode("utf-8")),
    }


def write_rows(path: Path, rows: list[dict]) -> Path:
    """Writes rows as JSON Lines; returns the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path: Path, items: int) -> list[dict]:
    """The first rows of a JSON Lines file."""
    return [json.loads(line) for line in path.open(encoding="utf-8")][:items]


def relative_difference(value: float, reference: float) -> float:
    """Relative difference from a reference; an accuracy of 0 gives the value itself."""
    return value / reference - 1 if reference else value


def lm_figures(
    data: Path, model: Path, folder: Path, items: int, context: int
) -> tuple[dict[str, tuple[str, Path]], dict[str, dict[str, float]]]:
    """(files for lm-eval by task, {name: {figure: value}} by lm).

    A name that is a task was measured by lm-eval's rules; others are a task with a remark.
    """
    files: dict[str, tuple[str, Path]] = {}
    figures: dict[str, dict[str, float]] = {}
    # LAMBADA
    rows = read_rows(data / "lambada" / "lambada_test.jsonl", items)
    for row in rows:
        before, _, last = row["text"].rpartition(" ")
        row.update(before=before, last=f" {last}")
    files["lambada"] = ("lambada", write_rows(folder / "lambada.jsonl", rows))
    figures["lambada"] = lambada(model, files["lambada"][1])
    # BLiMP
    for file in sorted((data / "pairs").glob("blimp-*.jsonl")):
        pairs, name = read_rows(file, items), file.stem.replace("-", "_")
        files[name] = ("blimp", write_rows(folder / file.name, pairs))
        figures[f"{name} as written"] = blimp(model, files[name][1])
        spaced = [row | {"good": f" {row['good']}", "bad": f" {row['bad']}"} for row in pairs]
        spaced_file = write_rows(folder / f"spaced-{file.name}", spaced)
        figures[name] = blimp(model, spaced_file, ties=True)
    # wikitext
    text = (data / "text" / "wikitext-2-test.txt").read_text(encoding="utf-8")
    text = text[:200_000].rpartition("\n")[0]
    files["wikitext"] = ("wikitext", write_rows(folder / "wikitext.jsonl", [{"text": text}]))
    figures["wikitext as lm perplexity"] = wikitext(model, files["wikitext"][1], context)
    figures["wikitext"] = wikitext_in_lm_eval_windows(model, text, context)
    return files, figures


def main() -> int:
    """Prints the table; 1 if figures by the same rules differ in the fourth digit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--context", type=int, default=0)
    options = parser.parse_args()
    config = json.loads((options.model / "config.json").read_text())
    context = options.context or config["max_position_embeddings"]
    worst = 0.0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files, figures = lm_figures(options.data, options.model, folder, options.items, context)
        expected = lm_eval_figures(folder, options.model, files, options.items)
    for name, values in figures.items():
        for figure, value in values.items():
            reference = expected[name.partition(" ")[0]][f"{figure},none"]
            difference = relative_difference(value, reference)
            print(
                f"{name:<60} {figure:<16} lm {value:.6g}  lm-eval {reference:.6g}  "
                f"{difference:+.2e}"
            )
            if name in expected:
                worst = max(worst, abs(difference))
    return int(worst > 5e-5)


if __name__ == "__main__":
    sys.exit(main())
