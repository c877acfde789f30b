"""Adapters beside PEFT: what we write it reads, what it writes we read, and both give the logits of transformers."""

import json

import pytest
import torch
from random_checkpoints import CASES, Case, batch, difference, forward, logits, pair, write

from lmcli.checkpoints import adapters, folder
from lmcli.config import TrainConfig
from lmcli.errors import UserError
from lmcli.first_model import choose_trained
from lmcli.model.adapters import adapters_of
from lmcli.model.transformer import Transformer

peft = pytest.importorskip("peft", reason="pip install peft: the oracle of adapters")
transformers = pytest.importorskip("transformers")

TRAINED = [case for case in CASES if str(case) in (
    "qwen3-lm-grouped", "llama-lm-biases", "gpt2-lm-plain", "gpt_neox-lm-part", "bert-lm-plain", "bert-sequence-plain",
    "modernbert-lm-window", "distilbert-lm-plain", "t5-lm-1.0", "t5-lm-1.1", "marian-lm-swish", "bart-lm-plain")]
ROUNDING = 2e-5  # of float32: 1.05e-5 was seen with T5, whose scores are not scaled, on one kind of processor
each_case = pytest.mark.parametrize("case", TRAINED, ids=str)


def adapt(model: Transformer, **settings) -> Transformer:
    """The model with adapters whose every weight shows."""
    choose_trained(model, TrainConfig(lora_rank=3, lora_alpha=5.0, **settings))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for adapter in adapters_of(model).values():
            adapter.lora_b.copy_(0.3 * torch.randn(adapter.lora_b.shape, generator=generator))
    return model.eval()


def saved(found, at, model: Transformer, base) -> None:
    at.mkdir(exist_ok=True)
    folder.save(at, model, found.checkpoint.tokenizer, found.checkpoint.generate, str(base))


@torch.inference_mode()
def apart(case: Case, ours: Transformer, theirs) -> float:
    """How far our logits are from theirs."""
    inputs = batch(case, "none", theirs.config)
    return difference(forward(ours, inputs), logits(theirs(**inputs)))


@each_case
@pytest.mark.parametrize("settings", [{}, {"lora_targets": ("query", "up")}, {"frozen_layers": 1}], ids=str)
def test_peft_reads_ours(case, settings, tmp_path):
    found = pair(case, tmp_path / "base", folder.load)
    before = apart(case, found.ours, found.theirs)
    model = adapt(found.ours, **settings)
    saved(found, tmp_path / "adapter", model, tmp_path / "base")
    adapted = peft.PeftModel.from_pretrained(found.theirs, tmp_path / "adapter").eval()
    assert before < ROUNDING
    assert apart(case, model, found.theirs) < ROUNDING
    with adapted.disable_adapter():
        assert apart(case, model, found.theirs) > 1e-3  # the adapter matters
    again = folder.load(tmp_path / "adapter").model
    assert apart(case, again, adapted.merge_and_unload()) < ROUNDING


@pytest.mark.parametrize("case", [case for case in TRAINED if case.family in ("qwen3", "t5", "gpt2")], ids=str)
def test_transformers_loads_an_adapters_folder_by_itself(case, tmp_path):
    found = pair(case, tmp_path / "base", folder.load)
    model = adapt(found.ours)
    saved(found, tmp_path / "adapter", model, tmp_path / "base")
    kind = transformers.AutoModelForCausalLM if case.shape == "decoder" else transformers.AutoModelForSeq2SeqLM
    assert apart(case, model, kind.from_pretrained(tmp_path / "adapter").eval()) < ROUNDING


@each_case
@pytest.mark.parametrize("options", [
    {}, {"use_rslora": True, "alpha_pattern": {"layers?.1.*": 9}, "rank_pattern": {"0": 2}}], ids=str)
def test_we_read_what_peft_writes(case, options, tmp_path):
    found = pair(case, tmp_path / "base", folder.load)
    targets = json.loads(_config(found, tmp_path))["target_modules"]
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False, **options)
    adapted = peft.get_peft_model(found.theirs, config).eval()
    adapted.save_pretrained(tmp_path / "theirs")
    _name_base(tmp_path / "theirs", tmp_path / "base")
    loaded = folder.load(tmp_path / "theirs")
    assert apart(case, loaded.model, adapted) < 5e-5
    assert loaded.tokenizer.size == found.checkpoint.tokenizer.size


def _config(found, at) -> str:
    saved(found, at / "ours", adapt(folder.load(found.folder).model), found.folder)
    return (at / "ours" / adapters.CONFIG).read_text()


def _name_base(at, base) -> None:
    document = json.loads((at / adapters.CONFIG).read_text())
    (at / adapters.CONFIG).write_text(json.dumps({**document, "base_model_name_or_path": str(base)}))


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "modernbert"])
def test_a_new_head_goes_both_ways(family, tmp_path):
    """Three labels on a base of two: by our adapter in PEFT, and by PEFT's here."""
    case = next(case for case in CASES if case.family == family and case.head == "sequence")
    options = {**case.options(), "id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    kind = getattr(transformers, {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert",
                                  "modernbert": "ModernBert"}[family] + "ForSequenceClassification")
    base = write(tmp_path / "base", next(c for c in CASES if c.family == family and c.head == "lm").model())
    theirs = kind.from_pretrained(base, id2label=options["id2label"], label2id=options["label2id"]).eval()
    theirs.save_pretrained(tmp_path / "whole")
    write(tmp_path / "whole", theirs)
    checkpoint = folder.load(tmp_path / "whole")
    model = adapt(checkpoint.model)
    (tmp_path / "adapter").mkdir()
    folder.save(tmp_path / "adapter", model, checkpoint.tokenizer, checkpoint.generate, str(base))
    empty = kind.from_pretrained(base, num_labels=3)
    adapted = peft.PeftModel.from_pretrained(empty, tmp_path / "adapter").eval()
    assert apart(case, model, adapted) < ROUNDING
    again = folder.load(tmp_path / "adapter").model
    assert again.config.labels == ("LABEL_0", "LABEL_1", "LABEL_2") and apart(case, again, adapted) < ROUNDING
    (tmp_path / "adapter" / "recipe.yaml").write_text("model: {labels: [a, b, c]}")  # as a run has it
    assert folder.load(tmp_path / "adapter").model.config.labels == ("a", "b", "c")
    adapted.save_pretrained(tmp_path / "theirs")
    _name_base(tmp_path / "theirs", base)
    read = folder.load(tmp_path / "theirs").model
    assert read.config.labels == ("LABEL_0", "LABEL_1", "LABEL_2") and apart(case, read, adapted) < ROUNDING


@pytest.mark.parametrize(("options", "said"), [
    ({"use_dora": True}, "use_dora True is not supported"), ({"bias": "all"}, "bias 'all' is not supported"),
    ({"init_lora_weights": "olora"}, "init_lora_weights 'olora' is not supported"),
    ({"layer_replication": [[0, 1]]}, "layer_replication"),
    ({"lora_bias": True}, "lora_bias True is not supported")], ids=str)
def test_what_is_not_supported_is_refused_by_name(options, said, tmp_path):
    case = TRAINED[0]
    found = pair(case, tmp_path / "base", folder.load)
    if "layer_replication" in options:
        saved(found, tmp_path / "theirs", adapt(found.ours), tmp_path / "base")
        document = json.loads((tmp_path / "theirs" / adapters.CONFIG).read_text())
        (tmp_path / "theirs" / adapters.CONFIG).write_text(json.dumps({**document, **options}))
    else:
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], **options)
        peft.get_peft_model(found.theirs, config).save_pretrained(tmp_path / "theirs")
        _name_base(tmp_path / "theirs", tmp_path / "base")
    with pytest.raises(UserError, match=said):
        folder.load(tmp_path / "theirs")
