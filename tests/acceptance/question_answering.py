"""Trains question answering on 800 rows, answers 200 others, and compares two simple baselines.

python tests/acceptance/question_answering.py DATA MODEL [--time 2m] [--threads N]
    [--set train.KEY=VALUE]...

DATA is JSON Lines with context, question and answers (SQuAD). The first 800 rows are for training
(every 10th of them validates), the last 200 for the test; in SQuAD's order those are about other
texts. MODEL is an encoder to start from, such as all-MiniLM-L6-v2. `lm train --preset qa --from
MODEL` trains, `lm classify` answers.

Baselines: the longest sequence of words that question and context have in common, and the sentence
of the context that contains it.

Prints exact match and F1 by SQuAD's rules with 95 % bootstrap intervals over the 200 questions, and
the differences from both baselines with theirs. Exits with 1 unless F1 is higher than that of the
longest common words, with the whole interval of the difference above 0.

MiniLM after 8 minutes on two cores: exact match 41.5 % (35.0 to 48.5), F1 53.9 % (47.9 to 60.0);
the baselines reach 0.0 and 0.5 % exact match, 7.1 and 21.7 % F1.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from lmcli.data.squad import exact_match, token_f1

TRAIN_ROWS, TEST_ROWS, RESAMPLES = 800, 200, 10_000


def lm(*arguments: object) -> str:
    """The standard output of `lm ARGUMENTS`; its standard error is shown."""
    command = [sys.executable, "-m", "lmcli", *map(str, arguments)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def longest_common_words(question: str, context: str) -> tuple[int, int]:
    """(start, end) in the context of the longest sequence of words that is in the question too.

    Case is ignored; (0, 0) without a common word.
    """
    question_words = [word.lower() for word in re.findall(r"\w+", question)]
    words = list(re.finditer(r"\w+", context))
    last, longest = 0, 0
    # lengths[j]: common words that end at this word of the context and before question word j
    lengths = [0] * (len(question_words) + 1)
    for i, match in enumerate(words):
        word = match.group().lower()
        lengths = [
            0,
            *(lengths[j] + 1 if other == word else 0 for j, other in enumerate(question_words)),
        ]
        if max(lengths) > longest:
            last, longest = i, max(lengths)
    return (words[last - longest + 1].start(), words[last].end()) if longest else (0, 0)


def sentence(context: str, at: int) -> str:
    """The sentence of the context that contains character `at`."""
    ends = re.finditer(r"[.!?]\s", context[:at])
    start = max((match.end() for match in ends), default=0)
    end = re.compile(r"[.!?](\s|$)").search(context, at)
    return context[start : end.start() if end else None]


def scores(answers: list[str | None], rows: list[dict]) -> np.ndarray:
    """(questions, 2): exact match and F1 of each answer."""
    gold = [[answer["text"] for answer in row["answers"]] for row in rows]
    return np.array(
        [
            (exact_match(answer, texts), token_f1(answer, texts))
            for answer, texts in zip(answers, gold)
        ]
    )


def interval(values: np.ndarray) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean."""
    samples = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(values[samples].mean(1), (0.025, 0.975))
    return float(low), float(high)


def table_row(name: str, values: np.ndarray) -> str:
    """A row of the table: means of exact match and F1 with their intervals."""
    cells = []
    for column, metric in enumerate(("exact match", "F1")):
        low, high = interval(values[:, column])
        cells.append(f"{metric} {values[:, column].mean():6.1%} ({low:.1%} to {high:.1%})")
    return f"{name:<40} {'   '.join(cells)}"


def write_rows(path: Path, rows: list[dict]) -> None:
    """Writes the fields that question answering needs, as JSON Lines."""
    fields = ("context", "question", "answers")
    lines = [json.dumps({key: row[key] for key in fields}) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


def train_and_answer(
    train: list[dict], test: list[dict], options: argparse.Namespace
) -> list[str | None]:
    """The answers to the test questions, by a model trained on other rows."""
    threads = ("--threads", options.threads) if options.threads else ()
    sets = [word for setting in options.sets for word in ("--set", setting)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run, train_file, test_file = folder / "run", folder / "train.jsonl", folder / "test.jsonl"
        write_rows(train_file, train)
        write_rows(test_file, test)
        recipe = ("--preset", "qa", "--from", options.model, "--time", options.time)
        lm("train", train_file, "-o", run, *recipe, *threads, *sets)
        started = time.monotonic()
        output = lm("classify", "-m", run, "--json", test_file, *threads)
        seconds = time.monotonic() - started
        print(f"{len(test)} questions answered in {seconds:.1f} s, with loading", flush=True)
    return [json.loads(line)["answer"] for line in output.splitlines()]


def main() -> int:
    """Prints the table; 1 if the model is not better than the longest common words."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("model")
    parser.add_argument("--time", default="2m")
    parser.add_argument("--threads", default="")
    parser.add_argument("--set", action="append", default=[], dest="sets")
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.data.read_text(encoding="utf-8").splitlines()]
    train, test = rows[:TRAIN_ROWS], rows[-TEST_ROWS:]

    # baselines
    contexts = [row["context"] for row in test]
    spans = [longest_common_words(row["question"], row["context"]) for row in test]
    baselines = {
        "longest common words": [text[start:end] for text, (start, end) in zip(contexts, spans)],
        "their sentence": [sentence(text, start) for text, (start, _) in zip(contexts, spans)],
    }
    baseline_scores = {name: scores(answers, test) for name, answers in baselines.items()}
    for name, values in baseline_scores.items():
        print(table_row(name, values), flush=True)

    # the model, and its difference from each baseline
    model_scores = scores(train_and_answer(train, test, options), test)
    print(table_row(f"{Path(options.model).name}, {options.time} of training", model_scores))
    for name, values in baseline_scores.items():
        print(table_row(f"difference from {name}", model_scores - values))
    difference = model_scores - baseline_scores["longest common words"]
    return 0 if interval(difference[:, 1])[0] > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
