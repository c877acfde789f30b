"""Compares every checkpoint family and head with transformers, in both directions.

python tests/acceptance/parity_table.py

Prints the largest relative errors of logits and hidden states: of checkpoints from transformers
loaded by lm, and of checkpoints saved by lm and loaded by transformers ("saved"). Exits with 1 if
one is above 1e-5.
"""

import argparse
import contextlib
import io
import sys
import tempfile
import warnings
from collections import defaultdict
from pathlib import Path

import torch
import transformers

from lmcli.checkpoints import folder as checkpoints

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "oracles"))
from random_checkpoints import CASES, Case, differences, pair

MAX_ERROR = 1e-5
COLUMNS = ("logits", "hidden", "saved")


def measure(case: Case) -> dict[str, float]:
    """The largest error over all paddings, by tensor; "saved …": of the checkpoint lm has saved."""
    worst: dict[str, float] = defaultdict(float)
    with tempfile.TemporaryDirectory() as original, tempfile.TemporaryDirectory() as saved:
        models = pair(case, Path(original), checkpoints.load)
        checkpoint = models.checkpoint
        checkpoints.save(Path(saved), checkpoint.model, checkpoint.tokenizer, checkpoint.generate)
        reloaded, loading = type(models.theirs).from_pretrained(saved, output_loading_info=True)
        if any(loading.values()):
            worst["saved"] = float("inf")
        for padding in case.paddings:
            for prefix, theirs in (("", models.theirs), ("saved ", reloaded.eval())):
                for tensor, error in differences(case, models.ours, theirs, padding).items():
                    worst[prefix + tensor] = max(worst[prefix + tensor], error)
    return worst


def column(tensor: str) -> str:
    """The column of the table in which a tensor's error counts."""
    if tensor.startswith("saved"):
        return "saved"
    return "logits" if tensor == "logits" else "hidden"


def main() -> int:
    """Prints a row per family and head; 1 if an error is too large."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    # errors of all variants
    rows: dict[tuple[str, str], dict[str, list[float]]] = {}
    for case in CASES:
        row = rows.setdefault((case.family, case.head), defaultdict(list))
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                errors = measure(case)
        except Exception as exception:
            print(f"{case}: {exception!r}", file=sys.stderr)
            errors = {"logits": float("inf")}
        for tensor, error in errors.items():
            row[column(tensor)].append(error)
        row["variants"].append(1)
    # the table
    print(f"{'family':12}{'head':10}{'variants':>8}  {'logits':>8}  {'hidden':>8}  {'saved':>8}")
    failed = 0
    for (family, head), row in rows.items():
        worst = [max(row[name], default=float("inf")) for name in COLUMNS]
        passed = all(error <= MAX_ERROR for error in worst)
        failed += not passed
        print(
            f"{family:12}{head:10}{len(row['variants']):8}  "
            + "  ".join(f"{error:8.1e}" for error in worst)
            + ("" if passed else f"  above {MAX_ERROR:.0e}")
        )
    print(f"{len(rows)} combinations of family and head, {failed} above {MAX_ERROR:.0e}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
