"""Predictions of baselines, a line each, to hold a model against: `lm evaluate --predictions FILE --predictions FILE TEST`.

    python tests/acceptance/baseline_predictions.py lead TEST            the first sentence of each source
    python tests/acceptance/baseline_predictions.py words TRAIN TEST     labels by logistic regression over a bag of words

`words` needs scikit-learn (in the extra `test`): counts of words and of pairs of words, which of C = 0.1, 1, 10 is told by
five-fold cross-validation on TRAIN.
"""

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
    return [" ".join(SENTENCE.split(row["source"].strip(), maxsplit=1)[0].split()) for row in rows(test)]


def words(train: str, test: str) -> list[str]:
    """The label of each text, by a model of what words it has."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline

    counted = make_pipeline(CountVectorizer(ngram_range=(1, 2), token_pattern=r"\S+", binary=True),
                            LogisticRegression(max_iter=1000))
    search = GridSearchCV(counted, {"logisticregression__C": [0.1, 1.0, 10.0]}, cv=5)
    known = rows(train)
    search.fit([row["text"] for row in known], [str(row["label"]) for row in known])
    return [str(label) for label in search.predict([row["text"] for row in rows(test)])]


if __name__ == "__main__":
    kind, *files = sys.argv[1:] or [""]
    if (kind, len(files)) not in (("lead", 1), ("words", 2)):
        sys.exit(__doc__)
    print("\n".join({"lead": lead, "words": words}[kind](*files)))
