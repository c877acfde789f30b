"""Prints the predictions of simple baselines, one per line, for comparison with a model's.

python tests/acceptance/baseline_predictions.py lead TEST          the first sentence of each source
python tests/acceptance/baseline_predictions.py words TRAIN TEST   labels from a bag of words

`lm evaluate --predictions FILE --predictions FILE TEST` compares them with other predictions.

`words` is a logistic regression over words and pairs of words; five-fold cross-validation on TRAIN
chooses C among 0.1, 1 and 10. It needs scikit-learn (in the extra `test`).
"""

import argparse
import json
import re
import sys
from pathlib import Path

SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(])")


def rows(file: str) -> list[dict]:
    """The rows of a JSON Lines file."""
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").split("\n") if line]


def lead(test: str) -> list[str]:
    """The first sentence of each source."""
    return [
        " ".join(SENTENCE.split(row["source"].strip(), maxsplit=1)[0].split()) for row in rows(test)
    ]


def words(train: str, test: str) -> list[str]:
    """The label of each text, predicted from the words in it."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline

    classifier = make_pipeline(
        CountVectorizer(ngram_range=(1, 2), token_pattern=r"\S+", binary=True),
        LogisticRegression(max_iter=1000),
    )
    search = GridSearchCV(classifier, {"logisticregression__C": [0.1, 1.0, 10.0]}, cv=5)
    labeled = rows(train)
    search.fit([row["text"] for row in labeled], [str(row["label"]) for row in labeled])
    return [str(label) for label in search.predict([row["text"] for row in rows(test)])]


def main() -> None:
    """Prints the predictions of the baseline."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("baseline", choices=("lead", "words"))
    parser.add_argument("files", nargs="+", metavar="FILE", help="TEST, or TRAIN TEST for words")
    options = parser.parse_args()
    expected = {"lead": 1, "words": 2}[options.baseline]
    if len(options.files) != expected:
        sys.exit(f"{options.baseline} takes {expected} files, not {len(options.files)}")
    predictions = lead(*options.files) if options.baseline == "lead" else words(*options.files)
    print("\n".join(predictions))


if __name__ == "__main__":
    main()
