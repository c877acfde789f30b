"""Learns to answer questions from 800 rows and answers 200 others, beside two baselines that learn nothing.

python tests/acceptance/question_answering.py DATA MODEL [--time 2m] [--threads N] [--set train.KEY=VALUE]...

DATA is JSON Lines with context, question, answers (SQuAD), of which the first 800 rows are learnt (every tenth of them is
held out to choose the best step) and the last 200 answered: in SQuAD's order those are about other texts. MODEL is an
encoder to start from, such as all-MiniLM-L6-v2. Trains by `lm train --preset qa --from MODEL`, answers by `lm classify`.
Baselines: the longest run of words that question and context have in common, and the sentence of the context in which
that stands. Prints exact match and F1 by SQuAD's rules with their 95 % bootstrap intervals over the 200 questions, and the
differences from both baselines with theirs. Fails unless F1 is above that of the longest common words, interval and all.

MiniLM after 8 minutes on two cores: exact match 41.5 % (35.0 to 48.5), F1 53.9 % (47.9 to 60.0); the baselines 0.0 and
0.5 %, 7.1 and 21.7 %.
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

from lmcli.text.answers import exact_match, token_f1

LEARNT, ANSWERED, RESAMPLED = 800, 200, 10_000


def shell(*words: object) -> str:
    """What `lm WORDS` writes on standard output; its standard error goes through."""
    done = subprocess.run([sys.executable, "-m", "lmcli", *map(str, words)], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def longest_common_words(question: str, context: str) -> tuple[int, int]:
    """(start, end) in the context of the longest run of words that the question has too, whatever the case."""
    wanted = [word.lower() for word in re.findall(r"\w+", question)]
    words = list(re.finditer(r"\w+", context))
    best, length = 0, 0
    ends = [0] * (len(wanted) + 1)  # of runs that end at the word before, by where they end in the question
    for at, word in enumerate(words):
        ends = [0, *(ends[j] + 1 if wanted[j] == word.group().lower() else 0 for j in range(len(wanted)))]
        if max(ends) > length:
            best, length = at, max(ends)
    return (words[best - length + 1].start(), words[best].end()) if length else (0, 0)


def sentence(context: str, at: int) -> str:
    """The sentence of the context that character `at` stands in."""
    start = max((found.end() for found in re.finditer(r"[.!?]\s", context[:at])), default=0)
    end = re.compile(r"[.!?](\s|$)").search(context, at)
    return context[start:end.start() if end else None]


def figures(answers: list[str | None], rows: list[dict]) -> np.ndarray:
    """(questions, 2): exact match and F1 of each answer."""
    right = [[answer["text"] for answer in row["answers"]] for row in rows]
    return np.array([(exact_match(answer, texts), token_f1(answer, texts)) for answer, texts in zip(answers, right)])


def interval(values: np.ndarray) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean."""
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLED, len(values)))
    low, high = np.quantile(values[drawn].mean(1), (0.025, 0.975))
    return float(low), float(high)


def told(name: str, found: np.ndarray) -> str:
    parts = []
    for column, figure in enumerate(("exact match", "F1")):
        low, high = interval(found[:, column])
        parts.append(f"{figure} {found[:, column].mean():6.1%} ({low:.1%} to {high:.1%})")
    return f"{name:<40} {'   '.join(parts)}"


def learnt(rows: list[dict], test: list[dict], arguments: argparse.Namespace) -> list[str | None]:
    """The answers of a model trained on `rows`."""
    more = ("--threads", arguments.threads) if arguments.threads else ()
    with tempfile.TemporaryDirectory() as folder:
        for name, part in (("train", rows), ("test", test)):
            lines = (json.dumps({key: row[key] for key in ("context", "question", "answers")}) + "\n" for row in part)
            Path(folder, f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        run = Path(folder, "run")
        shell("train", f"{folder}/train.jsonl", "--preset", "qa", "--from", arguments.model, "-o", run, "--time",
              arguments.time, *more, *(word for setting in arguments.sets for word in ("--set", setting)))
        started = time.monotonic()
        written = shell("classify", "-m", run, "--json", f"{folder}/test.jsonl", *more)
        print(f"{len(test)} questions answered in {time.monotonic() - started:.1f} s, loading included", flush=True)
    return [json.loads(line)["answer"] for line in written.splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("model")
    parser.add_argument("--time", default="2m")
    parser.add_argument("--threads", default="")
    parser.add_argument("--set", action="append", default=[], dest="sets")
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.data.read_text(encoding="utf-8").splitlines()]
    train, test = rows[:LEARNT], rows[-ANSWERED:]
    common = [longest_common_words(row["question"], row["context"]) for row in test]
    baselines = {"longest common words": [row["context"][start:end] for row, (start, end) in zip(test, common)],
                 "the sentence they stand in": [sentence(row["context"], at) for row, (at, _) in zip(test, common)]}
    found = {name: figures(answers, test) for name, answers in baselines.items()}
    for name, values in found.items():
        print(told(name, values), flush=True)
    ours = figures(learnt(train, test, arguments), test)
    print(told(f"{Path(arguments.model).name}, {arguments.time} of training", ours))
    for name, values in found.items():
        print(told(f"more than {name}", ours - values))
    sys.exit(0 if interval((ours - found["longest common words"])[:, 1])[0] > 0 else 1)


if __name__ == "__main__":
    main()
