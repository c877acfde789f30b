"""Adapters beside PEFT: what we write it reads, what it writes we read, and both give the logits of transformers."""

import json

import pytest
import torch
from random_checkpoints import CASES, Case, batch, difference, forward, logits, pair, write

from lmcli.checkpoints import adapters, exporting, folder
from lmcli.config import TrainConfig
from lmcli.errors import UserError
from lmcli.first_model import choose_trained
from lmcli.model.adapters import LoraEmbedding, adapters_of
from lmcli.model.likelihood import summed_loss
from lmcli.model.transformer import Transformer
from lmcli.training import optimizers

peft = pytest.importorskip("peft", reason="pip install peft: the oracle of adapters")
transformers = pytest.importorskip("transformers")

TRAINED = [case for case in CASES if str(case) in (
    "qwen3-lm-grouped", "llama-lm-biases", "gpt2-lm-plain", "gpt_neox-lm-part", "bert-lm-plain", "bert-sequence-plain",
    "modernbert-lm-window", "distilbert-lm-plain", "t5-lm-1.0", "t5-lm-1.1", "marian-lm-swish", "bart-lm-plain")]
ROUNDING = 2e-5  # of float32: 1.05e-5 was seen with T5, whose scores are not scaled, on one kind of processor
each_case = pytest.mark.parametrize("case", TRAINED, ids=str)
# what transformers calls embedding and head of families that part them, and of some in which they are one matrix
UNTIED = {"qwen3-lm-grouped": ("embed_tokens", "lm_head"), "gpt2-lm-untied": ("wte", "lm_head"),
          "gpt_neox-lm-part": ("embed_in", "lm_head"), "bert-lm-untied": ("word_embeddings", "decoder")}
TIED = {"qwen3-lm-tied": ("embed_tokens", "lm_head"), "gpt2-lm-plain": ("wte", "lm_head"),
        "bert-lm-plain": ("word_embeddings", "decoder")}


def adapt(model: Transformer, **settings) -> Transformer:
    """The model with adapters whose every weight shows."""
    choose_trained(model, TrainConfig(lora_rank=3, lora_alpha=5.0, **settings))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for adapter in adapters_of(model).values():
            zero = adapter.lora_a if isinstance(adapter, LoraEmbedding) else adapter.lora_b
            zero.copy_(0.3 * torch.randn(zero.shape, generator=generator))
    return model.eval()


def trained_a_little(model: Transformer, **settings) -> Transformer:
    """The model after some steps of training with adapters."""
    config = TrainConfig(lora_rank=3, learning_rate=0.05, **settings)
    choose_trained(model, config)
    optimizer, ids = optimizers.build(model, config), torch.arange(40).view(2, 20)
    for _ in range(4):
        summed_loss(model.hidden(ids).flatten(0, 1), model.head, (ids.flatten() + 1) % 40).backward()
        optimizer.step()
        optimizer.zero_grad()
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


@pytest.mark.parametrize("name", UNTIED)
def test_peft_reads_ours_on_embedding_and_head(name, tmp_path):
    case = next(case for case in CASES if str(case) == name)
    found = pair(case, tmp_path / "base", folder.load)
    model = trained_a_little(found.ours, lora_targets=("all", "embedding", "head"))
    saved(found, tmp_path / "adapter", model, tmp_path / "base")
    adapted = peft.PeftModel.from_pretrained(found.theirs, tmp_path / "adapter").eval()
    assert {*UNTIED[name]} <= adapted.peft_config["default"].target_modules
    assert apart(case, model, adapted) < 1e-5
    with adapted.disable_adapter():
        assert apart(case, model, adapted) > 1e-3
    assert apart(case, folder.load(tmp_path / "adapter").model, adapted.merge_and_unload()) < 1e-5


@pytest.mark.parametrize("which", [(0, 1), (0,), (1,)], ids=["both", "embedding", "head"])
@pytest.mark.parametrize("name", [*UNTIED, *TIED])
def test_we_read_what_peft_writes_of_embedding_and_head(name, which, tmp_path):
    """Of a tied model too, in which an adapter makes two matrices of one; merged it is read by transformers."""
    case = next(case for case in CASES if str(case) == name)
    found = pair(case, tmp_path / "base", folder.load)
    targets = [(UNTIED | TIED)[name][one] for one in which]
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False)
    adapted = peft.get_peft_model(found.theirs, config).eval()
    adapted.save_pretrained(tmp_path / "theirs")
    _name_base(tmp_path / "theirs", tmp_path / "base")
    loaded = folder.load(tmp_path / "theirs").model
    assert apart(case, loaded, adapted) < 1e-5
    with adapted.disable_adapter():
        assert apart(case, loaded, adapted) > 1e-3
    exporting.export(tmp_path / "theirs", tmp_path / "whole", torch.float32, merge=True)
    kind = type(adapted.get_base_model())
    with torch.inference_mode():
        inputs = batch(case, "none", found.theirs.config)
        whole = logits(kind.from_pretrained(tmp_path / "whole").eval()(**inputs))
        assert difference(whole, logits(adapted(**inputs))) < 1e-5


@pytest.mark.parametrize("name, target", [("t5-lm-1.0", "shared"), ("t5-lm-1.0", "lm_head"),
                                          ("bart-lm-plain", "encoder.embed_tokens")])
def test_adapters_of_what_two_stacks_share_are_refused(name, target, tmp_path):
    found = pair(next(case for case in CASES if str(case) == name), tmp_path / "base", folder.load)
    config = peft.LoraConfig(r=4, target_modules=[target], init_lora_weights=False)
    peft.get_peft_model(found.theirs, config).save_pretrained(tmp_path / "theirs")
    _name_base(tmp_path / "theirs", tmp_path / "base")
    with pytest.raises(UserError, match="an adapter of an embedding that two stacks share, which is not supported"):
        folder.load(tmp_path / "theirs")


@pytest.mark.parametrize("case", [case for case in TRAINED if case.family in ("qwen3", "t5", "gpt2")], ids=str)
def test_transformers_loads_an_adapters_folder_by_itself(case, tmp_path):
    found = pair(case, tmp_path / "base", folder.load)
    model = adapt(found.ours, lora_targets=("all", "embedding", "head") if case.family == "qwen3" else ("all",))
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
