"""The figures of lm-evaluation-harness (`--model hf` on the same folder) beside `lm score` and `lm perplexity`.

python tests/acceptance/beside_lm_eval.py DATA MODEL [--items 500]       needs lm_eval: pip install 'lm_eval[hf]'

DATA has lambada/lambada_test.jsonl, pairs/blimp-*.jsonl and text/wikitext-2-test.txt. Tasks are written as lm-eval's own
YAML for LAMBADA (OpenAI's), BLiMP and wikitext, reading those files. Ours are the command lines that a user types. Its
rules are not all ours, so figures stand under both, and those under its own must be the same to four digits:
LAMBADA: the last word after its context; no beginning token before a context (--no-bos; add_bos_token=False).
BLiMP: lm-eval puts its delimiter, a space, before each sentence; ours is scored as it is written, and with that space. Of a
pair that is twice the same sentence (there is one in passive_1) it says that the first is likelier.
wikitext: windows that do not overlap. Each of ours begins with the beginning token; each of lm-eval's after the first with
the token before it, and its last reaches back for a whole context: those are scored by `lmcli.load`, from Python. The empty
ends of a text it counts as words.
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
"""}


def theirs(folder: Path, model: Path, files: dict[str, tuple[str, Path]], items: int) -> dict[str, dict[str, float]]:
    """Task → figure → value, by lm-eval in float32."""
    import lm_eval
    from lm_eval.tasks import TaskManager
    for name, (kind, file) in files.items():
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {file}}}}}\ntest_split: test\n"
            + TASKS[kind].lstrip())
    found = lm_eval.simple_evaluate(
        model="hf", model_args={"pretrained": str(model), "dtype": "float32", "add_bos_token": False}, tasks=list(files),
        device="cpu", task_manager=TaskManager(include_path=str(folder), include_defaults=False), batch_size=8,
        limit=items, bootstrap_iters=0)
    return found["results"]


def lm(*arguments: object) -> list[dict]:
    """The JSON objects of a command."""
    done = subprocess.run([sys.executable, "-m", "lmcli", *map(str, arguments), "--json"], check=True, capture_output=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def lambada(model: Path, file: Path) -> dict[str, float]:
    """Perplexity of the last word; accuracy: whether each of its tokens is the likeliest."""
    rows = lm("score", "-m", model, "--no-bos", "--prefix-field", "before", "--field", "last", "--join", "",
              "--alternatives", 1, file)
    right = [all(unit["rank"] == 1 for unit in row["pieces"]) for row in rows]
    return {"perplexity": math.exp(-sum(row["logprob"] for row in rows) / len(rows)), "acc": sum(right) / len(rows)}


def blimp(model: Path, file: Path, ties: bool = False) -> dict[str, float]:
    """How often the first text is the likelier, or with `ties` as likely."""
    rows = lm("score", "-m", model, "--bos", "--pairs", file)
    right = [row["first_likelier"] or (ties and row["scores"][0]["logprob"] == row["scores"][1]["logprob"]) for row in rows]
    return {"acc": sum(right) / len(rows)}


def wikitext(model: Path, file: Path, context: int) -> dict[str, float]:
    """Word perplexity and bits per byte in windows that do not overlap."""
    (row,) = lm("perplexity", "-m", model, "--stride", context, "--bos", file)
    return {"word_perplexity": row["word_perplexity"], "bits_per_byte": row["bits_per_byte"]}


def wikitext_in_their_windows(model: Path, text: str, context: int) -> dict[str, float]:
    """The same by lm-eval's get_rolling_token_windows: every token read has one before it."""
    ours = lmcli.load(model, dtype="float32")
    ids, scorer = ours.encode(text), ours.scorer(bos=False)
    views = [([*ours.scorer(bos=True).beginning, *ids[:context]], context)]
    for start in range(context, len(ids), context):
        end = min(start + context, len(ids))
        views.append((ids[end - context - 1:end], end - start))
    total = sum(float(scorer.token_logprobs([view])[0][-count:].sum(dtype="float64")) for view, count in views)
    return {"word_perplexity": math.exp(-total / len(re.split(r"\s+", text))),
            "bits_per_byte": -total / math.log(2) / len(text.encode("utf-8"))}


def written(path: Path, rows: list[dict]) -> Path:
    """The rows as JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def apart_by(value: float, other: float) -> float:
    """Relative difference; of accuracies that may be 0 as well."""
    return value / other - 1 if other else value


def main() -> int:
    """Prints the table; exits 1 if figures under the same rules differ in the fourth digit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--context", type=int, default=0)
    options = parser.parse_args()
    context = options.context or json.loads((options.model / "config.json").read_text())["max_position_embeddings"]
    with tempfile.TemporaryDirectory() as temporary:
        folder, files, ours = Path(temporary), {}, {}
        rows = [json.loads(line) for line in (options.data / "lambada" / "lambada_test.jsonl").open(encoding="utf-8")]
        rows = rows[:options.items]
        for row in rows:
            before, _, last = row["text"].rpartition(" ")
            row.update(before=before, last=f" {last}")
        files["lambada"] = ("lambada", written(folder / "lambada.jsonl", rows))
        ours["lambada"] = lambada(options.model, files["lambada"][1])
        for file in sorted((options.data / "pairs").glob("blimp-*.jsonl")):
            pairs = [json.loads(line) for line in file.open(encoding="utf-8")][:options.items]
            name = file.stem.replace("-", "_")
            files[name] = ("blimp", written(folder / file.name, pairs))
            ours[f"{name} as written"] = blimp(options.model, files[name][1])
            spaced = [row | {"good": f" {row['good']}", "bad": f" {row['bad']}"} for row in pairs]
            ours[name] = blimp(options.model, written(folder / f"spaced-{file.name}", spaced), ties=True)
        text = (options.data / "text" / "wikitext-2-test.txt").read_text(encoding="utf-8")[:200_000].rpartition("\n")[0]
        files["wikitext"] = ("wikitext", written(folder / "wikitext.jsonl", [{"text": text}]))
        ours["wikitext as lm perplexity"] = wikitext(options.model, files["wikitext"][1], context)
        ours["wikitext"] = wikitext_in_their_windows(options.model, text, context)
        wanted, apart = theirs(folder, options.model, files, options.items), 0.0
        for name, figures in ours.items():
            for figure, value in figures.items():
                other = wanted[name.partition(" ")[0]][f"{figure},none"]
                print(f"{name:<60} {figure:<16} ours {value:.6g}  lm-eval {other:.6g}  {apart_by(value, other):+.2e}")
                if name in wanted:
                    apart = max(apart, abs(apart_by(value, other)))
    return int(apart > 5e-5)


if __name__ == "__main__":
    sys.exit(main())
