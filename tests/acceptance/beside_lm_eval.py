"""The figures of lm-evaluation-harness (`--model hf` on the same folder) beside `lm score` and `lm perplexity`.

python tests/acceptance/beside_lm_eval.py DATA MODEL [--items 500]       needs lm_eval: pip install 'lm_eval[hf]'

DATA has lambada/lambada_test.jsonl, pairs/blimp-*.jsonl and text/wikitext-2-test.txt. Tasks are written as lm-eval's own
YAML for LAMBADA (OpenAI's), BLiMP and wikitext, reading those files. Ours are the command lines that a user types. Its
rules are not all ours, and each line says which were set alike:
LAMBADA: the last word after its context, no beginning token before a context (--no-bos).
BLiMP: each sentence from the beginning token (its prefix token); the good one must have the higher log-probability.
wikitext: windows that do not overlap; each after the first begins with the token before it, ours with the beginning token,
so both are given: ours as it stands, and ours by lm-eval's windows, which have one token of context (--no-bos, stride =
context) and then lack only the file's first token.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

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
doc_to_choice: "{{[sentence_good, sentence_bad]}}"
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
        model="hf", model_args={"pretrained": str(model), "dtype": "float32"}, tasks=list(files), device="cpu",
        task_manager=TaskManager(include_path=str(folder), include_defaults=False), batch_size=8, limit=items,
        bootstrap_iters=0)
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


def blimp(model: Path, file: Path) -> dict[str, float]:
    """How often the first text is the likelier."""
    rows = lm("score", "-m", model, "--bos", "--pairs", file)
    return {"acc": sum(bool(row["first_likelier"]) for row in rows) / len(rows)}


def wikitext(model: Path, file: Path, context: int) -> dict[str, dict[str, float]]:
    """Word perplexity and bits per byte, in windows as we lead them and as lm-eval does."""
    found = {}
    for name, options in {"": ["--bos"], " by their windows": ["--no-bos", "--context", context]}.items():
        (row,) = lm("perplexity", "-m", model, "--stride", context, *options, file)
        found[name] = {"word_perplexity": row["word_perplexity"], "bits_per_byte": row["bits_per_byte"]}
    return found


def written(path: Path, rows: list[dict]) -> Path:
    """The rows as JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


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
            ours[name] = blimp(options.model, files[name][1])
        text = (options.data / "text" / "wikitext-2-test.txt").read_text(encoding="utf-8")[:200_000].rpartition("\n")[0]
        files["wikitext"] = ("wikitext", written(folder / "wikitext.jsonl", [{"text": text}]))
        for name, figures in wikitext(options.model, files["wikitext"][1], context).items():
            ours[f"wikitext{name}"] = figures
        wanted, apart = theirs(folder, options.model, files, options.items), 0.0
        for name, figures in ours.items():
            for figure, value in figures.items():
                other = wanted[name.partition(" ")[0]][f"{figure},none"]
                print(f"{name:<60} {figure:<16} ours {value:.6g}  lm-eval {other:.6g}  {value / other - 1:+.2e}")
                if name != "wikitext":
                    apart = max(apart, abs(value / other - 1))
    return int(apart > 5e-5)


if __name__ == "__main__":
    sys.exit(main())
