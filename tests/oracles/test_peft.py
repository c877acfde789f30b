"""Adapters against PEFT: each reads what the other writes, and both give the same logits."""

import json

import pytest
import torch
from random_checkpoints import CASES, Case, batch, difference, forward, logits, pair, write

from lmcli.checkpoints import adapter_folder, export, folder
from lmcli.config import TrainConfig
from lmcli.errors import UserError
from lmcli.model.likelihood import summed_loss
from lmcli.model.lora import LoraEmbedding, adapters_of
from lmcli.model.transformer import Transformer
from lmcli.runs.initial_model import set_trainable
from lmcli.training import optimizers

peft = pytest.importorskip("peft", reason="pip install peft: the oracle of adapters")
transformers = pytest.importorskip("transformers")

TRAINED = [
    case
    for case in CASES
    if str(case)
    in (
        "qwen3-lm-grouped",
        "llama-lm-biases",
        "gpt2-lm-plain",
        "gpt_neox-lm-part",
        "bert-lm-plain",
        "bert-sequence-plain",
        "modernbert-lm-window",
        "distilbert-lm-plain",
        "t5-lm-1.0",
        "t5-lm-1.1",
        "marian-lm-swish",
        "bart-lm-plain",
    )
]
# of float32: T5, whose scores are not scaled, has reached 1.05e-5 on one kind of processor
ROUNDING = 2e-5
each_case = pytest.mark.parametrize("case", TRAINED, ids=str)
# names of embedding and head in transformers, for untied and for tied models
UNTIED = {
    "qwen3-lm-grouped": ("embed_tokens", "lm_head"),
    "gpt2-lm-untied": ("wte", "lm_head"),
    "gpt_neox-lm-part": ("embed_in", "lm_head"),
    "bert-lm-untied": ("word_embeddings", "decoder"),
}
TIED = {
    "qwen3-lm-tied": ("embed_tokens", "lm_head"),
    "gpt2-lm-plain": ("wte", "lm_head"),
    "bert-lm-plain": ("word_embeddings", "decoder"),
}


def adapt(model: Transformer, **settings) -> Transformer:
    """The model with random adapters, so that every weight matters."""
    set_trainable(model, TrainConfig(lora_rank=3, lora_alpha=5.0, **settings))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for adapter in adapters_of(model).values():
            zero = adapter.lora_a if isinstance(adapter, LoraEmbedding) else adapter.lora_b
            zero.copy_(0.3 * torch.randn(zero.shape, generator=generator))
    return model.eval()


def briefly_trained(model: Transformer, **settings) -> Transformer:
    """The model after some steps of training with adapters."""
    config = TrainConfig(lora_rank=3, learning_rate=0.05, **settings)
    set_trainable(model, config)
    optimizer, ids = optimizers.build(model, config), torch.arange(40).view(2, 20)
    for _ in range(4):
        summed_loss(
            model.hidden(ids).flatten(0, 1), model.head, (ids.flatten() + 1) % 40
        ).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def save(both, path, model: Transformer, base) -> None:
    path.mkdir(exist_ok=True)
    checkpoint = both.checkpoint
    folder.save(path, model, checkpoint.tokenizer, checkpoint.generate, str(base))


@torch.inference_mode()
def logits_difference(case: Case, ours: Transformer, theirs) -> float:
    """The relative difference of our logits from theirs."""
    inputs = batch(case, "none", theirs.config)
    return difference(forward(ours, inputs), logits(theirs(**inputs)))


@each_case
@pytest.mark.parametrize(
    "settings", [{}, {"lora_targets": ("query", "up")}, {"frozen_layers": 1}], ids=str
)
def test_peft_reads_our_adapters(case, settings, tmp_path):
    both = pair(case, tmp_path / "base", folder.load)
    before = logits_difference(case, both.ours, both.theirs)
    model = adapt(both.ours, **settings)
    save(both, tmp_path / "adapter", model, tmp_path / "base")
    adapted = peft.PeftModel.from_pretrained(both.theirs, tmp_path / "adapter").eval()
    assert before < ROUNDING
    assert logits_difference(case, model, both.theirs) < ROUNDING
    with adapted.disable_adapter():
        assert logits_difference(case, model, both.theirs) > 1e-3  # the adapter matters
    again = folder.load(tmp_path / "adapter").model
    assert logits_difference(case, again, adapted.merge_and_unload()) < ROUNDING


@pytest.mark.parametrize("name", UNTIED)
def test_peft_reads_our_adapters_of_embedding_and_head(name, tmp_path):
    case = next(case for case in CASES if str(case) == name)
    both = pair(case, tmp_path / "base", folder.load)
    model = briefly_trained(both.ours, lora_targets=("all", "embedding", "head"))
    save(both, tmp_path / "adapter", model, tmp_path / "base")
    adapted = peft.PeftModel.from_pretrained(both.theirs, tmp_path / "adapter").eval()
    assert {*UNTIED[name]} <= adapted.peft_config["default"].target_modules
    assert logits_difference(case, model, adapted) < 1e-5
    with adapted.disable_adapter():
        assert logits_difference(case, model, adapted) > 1e-3
    assert (
        logits_difference(case, folder.load(tmp_path / "adapter").model, adapted.merge_and_unload())
        < 1e-5
    )


@pytest.mark.parametrize("which", [(0, 1), (0,), (1,)], ids=["both", "embedding", "head"])
@pytest.mark.parametrize("name", [*UNTIED, *TIED])
def test_we_read_adapters_of_embedding_and_head_from_peft(name, which, tmp_path):
    """Also of a tied model, which an adapter unties; transformers reads the merged model."""
    case = next(case for case in CASES if str(case) == name)
    both = pair(case, tmp_path / "base", folder.load)
    targets = [(UNTIED | TIED)[name][index] for index in which]
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False)
    torch.manual_seed(0)  # for peft's random weights
    adapted = peft.get_peft_model(both.theirs, config).eval()
    adapted.save_pretrained(tmp_path / "theirs")
    _name_base(tmp_path / "theirs", tmp_path / "base")
    loaded = folder.load(tmp_path / "theirs").model
    assert logits_difference(case, loaded, adapted) < 1e-5
    with adapted.disable_adapter():
        assert logits_difference(case, loaded, adapted) > 1e-3
    export.export(tmp_path / "theirs", tmp_path / "whole", torch.float32, merge=True)
    kind = type(adapted.get_base_model())
    with torch.inference_mode():
        inputs = batch(case, "none", both.theirs.config)
        whole = logits(kind.from_pretrained(tmp_path / "whole").eval()(**inputs))
        assert difference(whole, logits(adapted(**inputs))) < 1e-5


@pytest.mark.parametrize(
    "name, target",
    [("t5-lm-1.0", "shared"), ("t5-lm-1.0", "lm_head"), ("bart-lm-plain", "encoder.embed_tokens")],
)
def test_adapters_of_a_shared_embedding_are_an_error(name, target, tmp_path):
    both = pair(next(case for case in CASES if str(case) == name), tmp_path / "base", folder.load)
    config = peft.LoraConfig(r=4, target_modules=[target], init_lora_weights=False)
    torch.manual_seed(0)  # for peft's random weights
    peft.get_peft_model(both.theirs, config).save_pretrained(tmp_path / "theirs")
    _name_base(tmp_path / "theirs", tmp_path / "base")
    with pytest.raises(
        UserError, match="an adapter of an embedding that two stacks share, which is not supported"
    ):
        folder.load(tmp_path / "theirs")


@pytest.mark.parametrize(
    "case", [case for case in TRAINED if case.family in ("qwen3", "t5", "gpt2")], ids=str
)
def test_transformers_loads_an_adapter_folder(case, tmp_path):
    both = pair(case, tmp_path / "base", folder.load)
    model = adapt(
        both.ours, lora_targets=("all", "embedding", "head") if case.family == "qwen3" else ("all",)
    )
    save(both, tmp_path / "adapter", model, tmp_path / "base")
    kind = (
        transformers.AutoModelForCausalLM
        if case.shape == "decoder"
        else transformers.AutoModelForSeq2SeqLM
    )
    assert (
        logits_difference(case, model, kind.from_pretrained(tmp_path / "adapter").eval()) < ROUNDING
    )


@each_case
@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True, "alpha_pattern": {"layers?.1.*": 9}, "rank_pattern": {"0": 2}}],
    ids=str,
)
def test_we_read_adapters_from_peft(case, options, tmp_path):
    both = pair(case, tmp_path / "base", folder.load)
    targets = json.loads(_config(both, tmp_path))["target_modules"]
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False, **options
    )
    torch.manual_seed(0)  # for peft's random weights
    adapted = peft.get_peft_model(both.theirs, config).eval()
    adapted.save_pretrained(tmp_path / "theirs")
    _name_base(tmp_path / "theirs", tmp_path / "base")
    loaded = folder.load(tmp_path / "theirs")
    assert logits_difference(case, loaded.model, adapted) < 5e-5
    assert loaded.tokenizer.size == both.checkpoint.tokenizer.size


def _config(both, path) -> str:
    save(both, path / "ours", adapt(folder.load(both.folder).model), both.folder)
    return (path / "ours" / adapter_folder.ADAPTER_CONFIG).read_text()


def _name_base(path, base) -> None:
    document = json.loads((path / adapter_folder.ADAPTER_CONFIG).read_text())
    (path / adapter_folder.ADAPTER_CONFIG).write_text(
        json.dumps({**document, "base_model_name_or_path": str(base)})
    )


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "modernbert"])
def test_a_new_head_round_trips(family, tmp_path):
    """Three labels on a base with two: our adapter in PEFT, and PEFT's adapter here."""
    case = next(case for case in CASES if case.family == family and case.head == "sequence")
    options = {
        **case.options(),
        "id2label": {0: "a", 1: "b", 2: "c"},
        "label2id": {"a": 0, "b": 1, "c": 2},
    }
    kind = getattr(
        transformers,
        {
            "bert": "Bert",
            "roberta": "Roberta",
            "distilbert": "DistilBert",
            "modernbert": "ModernBert",
        }[family]
        + "ForSequenceClassification",
    )
    base = write(
        tmp_path / "base", next(c for c in CASES if c.family == family and c.head == "lm").model()
    )
    theirs = kind.from_pretrained(
        base, id2label=options["id2label"], label2id=options["label2id"]
    ).eval()
    theirs.save_pretrained(tmp_path / "whole")
    write(tmp_path / "whole", theirs)
    checkpoint = folder.load(tmp_path / "whole")
    model = adapt(checkpoint.model)
    (tmp_path / "adapter").mkdir()
    folder.save(tmp_path / "adapter", model, checkpoint.tokenizer, checkpoint.generate, str(base))
    empty = kind.from_pretrained(base, num_labels=3)
    adapted = peft.PeftModel.from_pretrained(empty, tmp_path / "adapter").eval()
    assert logits_difference(case, model, adapted) < ROUNDING
    again = folder.load(tmp_path / "adapter").model
    assert (
        again.config.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
        and logits_difference(case, again, adapted) < ROUNDING
    )
    (tmp_path / "adapter" / "recipe.yaml").write_text("model: {labels: [a, b, c]}")  # as in a run
    assert folder.load(tmp_path / "adapter").model.config.labels == ("a", "b", "c")
    adapted.save_pretrained(tmp_path / "theirs")
    _name_base(tmp_path / "theirs", base)
    read = folder.load(tmp_path / "theirs").model
    assert (
        read.config.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
        and logits_difference(case, read, adapted) < ROUNDING
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora True is not supported"),
        ({"bias": "all"}, "bias 'all' is not supported"),
        ({"init_lora_weights": "olora"}, "init_lora_weights 'olora' is not supported"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"lora_bias": True}, "lora_bias True is not supported"),
    ],
    ids=str,
)
def test_an_unsupported_option_is_named(options, message, tmp_path):
    case = TRAINED[0]
    both = pair(case, tmp_path / "base", folder.load)
    if "layer_replication" in options:
        save(both, tmp_path / "theirs", adapt(both.ours), tmp_path / "base")
        document = json.loads((tmp_path / "theirs" / adapter_folder.ADAPTER_CONFIG).read_text())
        (tmp_path / "theirs" / adapter_folder.ADAPTER_CONFIG).write_text(
            json.dumps({**document, **options})
        )
    else:
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], **options)
        peft.get_peft_model(both.theirs, config).save_pretrained(tmp_path / "theirs")
        _name_base(tmp_path / "theirs", tmp_path / "base")
    with pytest.raises(UserError, match=message):
        folder.load(tmp_path / "theirs")
