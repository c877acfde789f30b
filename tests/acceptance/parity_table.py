"""Every checkpoint family and head against transformers: the largest relative errors of logits and of hidden states.

python tests/acceptance/parity_table.py        exits 1 if one is above 1e-5, in either direction
"""

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

BOUND = 1e-5


def measured(case: Case) -> dict[str, float]:
    """The largest error of a case at each place, over all paddings: as read here, and as transformers reads what we save."""
    worst: dict[str, float] = defaultdict(float)
    with tempfile.TemporaryDirectory() as before, tempfile.TemporaryDirectory() as after:
        both = pair(case, Path(before), checkpoints.load)
        checkpoint = both.checkpoint
        checkpoints.save(Path(after), checkpoint.model, checkpoint.tokenizer, checkpoint.generate)
        again, loading = type(both.theirs).from_pretrained(after, output_loading_info=True)
        if any(loading.values()):
            worst["saved"] = float("inf")
        for padding in case.paddings:
            for prefix, theirs in (("", both.theirs), ("saved ", again.eval())):
                for place, error in differences(case, both.ours, theirs, padding).items():
                    worst[prefix + place] = max(worst[prefix + place], error)
    return worst


def main() -> int:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    rows: dict[tuple[str, str], dict[str, list[float]]] = {}
    for case in CASES:
        row = rows.setdefault((case.family, case.head), defaultdict(list))
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                errors = measured(case)
        except Exception as error:
            print(f"{case}: {error!r}", file=sys.stderr)
            errors = {"logits": float("inf")}
        for place, error in errors.items():
            column = "saved" if place.startswith("saved") else "logits" if place == "logits" else "hidden"
            row[column].append(error)
        row["variants"].append(1)
    print(f"{'family':12}{'head':10}{'variants':>8}  {'logits':>8}  {'hidden':>8}  {'saved':>8}")
    failed = 0
    for (family, head), row in rows.items():
        worst = {column: max(row[column], default=float("inf")) for column in ("logits", "hidden", "saved")}
        good = all(error <= BOUND for error in worst.values())
        failed += not good
        print(f"{family:12}{head:10}{len(row['variants']):8}  " + "  ".join(f"{error:8.1e}" for error in worst.values())
              + ("" if good else f"  above {BOUND:.0e}"))
    print(f"{len(rows)} of family × head, {failed} out of bounds")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
