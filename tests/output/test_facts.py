"""The facts of `lm info` as lines and as a table."""

from lmcli.errors import UserError
from lmcli.output.facts import Summary, as_lines, as_table

FACTS = {
    "kind": "model",
    "labels": ["a", "b\tc"],
    "parameters": {"total": 2_000_000, "mlp": 500_000},
    "memory": {"float32": 8_000_000},
    "tokenizer": {"special": {f"<{k}>": k for k in range(14)}, "template": None},
    "tie": True,
    "loss": 0.123456789,
}


def test_lines_have_dotted_keys_and_escaped_values():
    lines = dict(line.split("\t") for line in as_lines(FACTS).splitlines())
    assert lines["labels"] == "a, b\\tc" and lines["parameters.mlp"] == "500000"
    assert lines["tokenizer.special"].startswith("<0>=0, <1>=1") and lines["tie"] == "true"
    assert lines["tokenizer.template"] == "NA" and lines["loss"] == "0.123457"


def test_a_table_has_units_and_shares_and_cuts_long_lists():
    table = as_table(FACTS, 60)
    assert "parameters.mlp      500,000 (25.0%)\n" in table
    assert "memory.float32      8.0 MB\n" in table and "…=2 more\n" in table
    assert max(map(len, table.splitlines())) <= 60


def test_damage_is_noted_once():
    summary = Summary({})
    for _ in range(2):
        with summary.noting():
            raise UserError("is damaged", where="file")
    assert [error.what for error in summary.damage] == ["is damaged"]
