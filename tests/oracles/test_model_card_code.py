"""The Python on a model card runs as it stands, and its pipeline exists, in transformers."""

import io
import re
from contextlib import redirect_stdout

import pytest

from lmcli.checkpoints import folder as checkpoints
from lmcli.checkpoints.families import FAMILIES
from lmcli.config import GenerateConfig, ModelConfig, TokenizerConfig, TrainConfig
from lmcli.runs.model_card import CommandExample, model_card
from lmcli.text.tokenizer import learn
from lmcli.training.objectives import OBJECTIVES

pipelines = pytest.importorskip("transformers.pipelines")
RESULT = {"seconds": 1.0, "steps": 2, "tokens": 3, "epochs": 1.0, "val_bytes": 4}
MODELS = {"decoder": "llama", "encoder": "bert", "encoder-decoder": "t5"}
TEXT = ["Once upon a time Tom saw the cat on the mat. Paris is the capital of France."] * 3


def card(name: str) -> str:
    class Figures(dict):
        def __missing__(self, key):
            return 1

    return model_card(
        example=CommandExample("DIR", "Once upon a time"),
        config=ModelConfig(vocab_size=300, max_position_embeddings=64),
        train=TrainConfig(),
        objective=OBJECTIVES[name],
        parameters=1,
        architecture="X",
        files=["a.txt"],
        result=Figures(RESULT),
    )


@pytest.mark.parametrize("name", [*OBJECTIVES])
def test_the_code_of_the_card_runs(name, small_model, tmp_path, monkeypatch):
    objective = OBJECTIVES[name]
    row = FAMILIES[MODELS[objective.shape]]
    tokenizer = learn(TEXT, TokenizerConfig(300), objective.shape)
    options = {
        **row.options_for(objective.head),
        "shape": objective.shape,
        "head": objective.head,
        "model_type": row.model_type,
        "vocab_size": tokenizer.size,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "type_vocab_size": 2 if objective.shape == "encoder" else 0,
        "decoder_start_token_id": 0 if objective.shape == "encoder-decoder" else None,
        **({"labels": ("good", "bad")} if objective.head in ("sequence", "token") else {}),
        **({"hidden_act": "relu", "gated_mlp": False} if row.model_type == "t5" else {}),
    }
    (tmp_path / "DIR").mkdir()
    generate = GenerateConfig(max_new_tokens=5, temperature=0.0)
    checkpoints.save(tmp_path / "DIR", small_model(**options), tokenizer, generate)
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", card(name), re.DOTALL)
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(code, {})
    if objective.head == "sequence":
        assert printed.getvalue().strip() in ("good", "bad")


@pytest.mark.parametrize("name", [*OBJECTIVES])
def test_the_pipeline_of_the_card_exists(name):
    tags = re.findall(r"^pipeline_tag: (.*)$", card(name), re.MULTILINE)
    assert {*tags} <= {*pipelines.SUPPORTED_TASKS}
    assert ("text-generation" in tags) == (OBJECTIVES[name].shape == "decoder")
    assert re.match(r"---\n(\w+: \S+\n)+---\n", card(name))
