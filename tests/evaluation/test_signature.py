"""Signatures: format, parsing, differences, and the hash of a model."""

from dataclasses import replace

import pytest

from lmcli.errors import UsageError
from lmcli.evaluation.signature import Signature, model_hash

SIGNATURE = Signature(
    "0123456789ab", "aa", "bb", "line", 256, 128, 1, 0, "float32", 12345.6789, 100, 400
)


def test_a_signature_is_parsed_from_its_line():
    line = str(SIGNATURE)
    assert line.startswith("lm-perplexity|model:0123456789ab|") and "|nats:12345.678900|" in line
    assert Signature.parse(line) == SIGNATURE and Signature.parse(f" {line}\n") == SIGNATURE


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "lm-perplexity",
        str(SIGNATURE).replace("nats:", "gnats:"),
        str(SIGNATURE).replace("256", "many"),
        str(SIGNATURE) + "|more:1",
    ],
)
def test_another_text_is_refused(text):
    with pytest.raises(UsageError, match="is no signature"):
        Signature.parse(text)


def test_differences_within_the_tolerance_and_the_version_do_not_count():
    assert SIGNATURE.differences(replace(SIGNATURE, nats=12345.7)) == []  # within 1e-5
    assert SIGNATURE.differences(replace(SIGNATURE, nats=12346.0)) == [
        "nats is 12346.0, not 12345.6789"
    ]
    assert SIGNATURE.differences(replace(SIGNATURE, text="cc", tokens=99)) == [
        "text is cc, not bb",
        "tokens is 99, not 100",
    ]
    assert SIGNATURE.differences(replace(SIGNATURE, version="9")) == []


def test_the_hash_of_a_model_depends_on_weights_and_configuration(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    first = model_hash(tmp_path)
    (tmp_path / "README.md").write_text("a card")
    assert model_hash(tmp_path) == first and len(first) == 12
    (tmp_path / "model.safetensors").write_bytes(b"Weights")
    second = model_hash(tmp_path)
    (tmp_path / "config.json").write_text("{ }")
    assert len({first, second, model_hash(tmp_path)}) == 3
