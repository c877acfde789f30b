"""Signatures: written, read back, and what of another one is told."""

from dataclasses import replace

import pytest

from lmcli.analysis.signature import Signature, of_model
from lmcli.errors import UsageError

ONE = Signature("0123456789ab", "aa", "bb", "line", 256, 128, 1, 0, "float32", 12345.6789, 100, 400)


def test_it_reads_back_from_its_line():
    line = str(ONE)
    assert line.startswith("lm-perplexity|model:0123456789ab|") and "|nats:12345.678900|" in line
    assert Signature.parse(line) == ONE and Signature.parse(f" {line}\n") == ONE


@pytest.mark.parametrize("text", ["", "x", "lm-perplexity", str(ONE).replace("nats:", "gnats:"),
                                  str(ONE).replace("256", "many"), str(ONE) + "|more:1"])
def test_what_is_none_is_usage(text):
    with pytest.raises(UsageError, match="is no signature"):
        Signature.parse(text)


def test_only_what_counts_makes_a_difference():
    assert ONE.differences(replace(ONE, nats=12345.7)) == []  # within a hundred-thousandth
    assert ONE.differences(replace(ONE, nats=12346.0)) == ["nats is 12346.0, not 12345.6789"]
    assert ONE.differences(replace(ONE, text="cc", tokens=99)) == ["text is cc, not bb", "tokens is 99, not 100"]
    assert ONE.differences(replace(ONE, version="9")) == []


def test_the_hash_of_a_model_goes_by_weights_and_configuration(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    first = of_model(tmp_path)
    (tmp_path / "README.md").write_text("a card")
    assert of_model(tmp_path) == first and len(first) == 12
    (tmp_path / "model.safetensors").write_bytes(b"Weights")
    second = of_model(tmp_path)
    (tmp_path / "config.json").write_text("{ }")
    assert len({first, second, of_model(tmp_path)}) == 3
