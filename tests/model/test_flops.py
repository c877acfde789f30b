"""Parameters and FLOPs from a configuration, compared with modules and torch's FLOP counter."""

import dataclasses
from dataclasses import astuple

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lmcli.config import ModelConfig
from lmcli.model import flops
from lmcli.model.transformer import Transformer
from lmcli.recipes import preset_names, resolve

SIZES = {
    "vocab_size": 48,
    "max_position_embeddings": 24,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
BERT = {
    "shape": "encoder",
    "query_key_norm": False,
    "attention_bias": "all",
    "positions": "learned",
    "norm": "layer",
    "post_norm": True,
    "embedding_norm": True,
    "gated_mlp": False,
    "mlp_bias": True,
    "type_vocab_size": 2,
    "head_dense": True,
}
OPTIONS = {
    "qwen3": {},
    "llama, grouped, untied": {
        "query_key_norm": False,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    },
    "qwen2": {"query_key_norm": False, "attention_bias": "qkv", "head_dim": 16},
    "gpt2": {
        "query_key_norm": False,
        "attention_bias": "all",
        "positions": "learned",
        "norm": "layer",
        "gated_mlp": False,
        "mlp_bias": True,
    },
    "neox": {
        "norm": "layer",
        "parallel_block": True,
        "rotary_fraction": 0.25,
        "attention_bias": "all",
        "mlp_bias": True,
        "tie_word_embeddings": False,
        "gated_mlp": False,
    },
    "bert": {**BERT, "head_norm": True, "head_bias": True},
    "bert, labels": {**BERT, "head": "sequence", "labels": ("a", "b", "c")},
    "bert, spans": {**BERT, "head": "span", "head_dense": False},
    "bert, bare": {**BERT, "head": "none"},
    "modernbert": {
        "shape": "encoder",
        "norm": "layer",
        "norm_bias": False,
        "embedding_norm": True,
        "first_attention_norm": False,
        "head_dense": True,
        "head_norm": True,
        "sliding_window": 4,
    },
    "t5": {
        "shape": "encoder-decoder",
        "num_encoder_layers": 2,
        "positions": "relative",
        "query_key_norm": False,
        "head_dim": 16,
    },
    "bart": {
        "shape": "encoder-decoder",
        "num_encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_intermediate_size": 96,
        "positions": "learned",
        "position_offset": 2,
        "norm": "layer",
        "post_norm": True,
        "embedding_norm": True,
        "attention_bias": "all",
        "head_bias": True,
    },
    "two stacks, grouped": {
        "shape": "encoder-decoder",
        "encoder_attention_heads": 2,
        "num_key_value_heads": 2,
    },
}
each_family = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


def config(options) -> ModelConfig:
    return ModelConfig(**{**SIZES, **options}).complete()


def modules(model_config: ModelConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(model_config)


def assert_counted(model_config: ModelConfig) -> None:
    model = modules(model_config)
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    tables = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    assert flops.parameters(model_config) == (
        sum(weight.numel() for weight in model.parameters()),
        sum(linear.weight.numel() for linear in linears),
        sum(table.weight.numel() for table in tables),
    )


@each_family
def test_parameters_equal_those_of_the_modules(options):
    assert_counted(config(options))


@pytest.mark.parametrize("name", preset_names())
def test_parameters_of_presets(name):
    recipe = resolve(name)
    assert_counted(
        dataclasses.replace(
            recipe.model,
            vocab_size=recipe.tokenizer.vocab_size,
            max_position_embeddings=recipe.train.context,
        ).complete()
    )


def test_the_published_size_of_gpt2():
    sizes = ModelConfig(
        vocab_size=50257,
        max_position_embeddings=1024,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        **OPTIONS["gpt2"],
    ).complete()
    assert flops.parameters(sizes).total == 124_439_808


def test_the_convention_by_hand():
    shape = ModelConfig(
        vocab_size=4096,
        max_position_embeddings=256,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=6,
    ).complete()
    a_layer, head, attention = 12 * 384 * 384, 4096 * 384, 12 * 6 * 384 * 256
    assert flops.training_flops_per_token(shape, 256) == 6 * (6 * a_layer + head) + attention
    assert round(flops.training_flops_per_token(shape, 256) / 1e6, 1) == 80.2
    untied = dataclasses.replace(shape, tie_word_embeddings=False)
    assert flops.training_flops_per_token(untied, 256) == flops.training_flops_per_token(shape, 256)


@each_family
def test_the_products_add_up_to_the_convention(options):
    model_config = config(options)
    for passes in (
        flops.whole_rows(model_config, 3, 20),
        flops.whole_rows(model_config, 2, 24)._replace(predicted=5),
    ):
        products = flops.products(model_config, passes)
        assert sum(product.flops for product in products) == flops.training_flops(
            model_config, passes
        )
        assert all(min(astuple(product)[1:]) > 0 for product in products)


def test_a_linear_layer_has_three_products_and_attention_six():
    products = flops.products(config({"num_hidden_layers": 1}), flops.ForwardPass(2, 0, 10, 20))
    kinds = [product.kind for product in products]
    assert (
        kinds.count("linear")
        == kinds.count("linear input")
        == kinds.count("linear weight")
        == len(products) // 3 - 2
    )
    assert flops.MatrixProduct("linear", 1, 1, 20, 32, 48) in products  # the head
    assert flops.MatrixProduct("linear weight", 1, 1, 48, 20, 32) in products
    assert (
        flops.MatrixProduct("scores", 1, 8, 10, 8, 10) in products
        and flops.MatrixProduct("value", 1, 8, 10, 10, 8) in products
    )


@each_family
def test_torch_counts_the_same_flops(options):
    model_config = config(options)
    model = Transformer(model_config)  # plain products, whose FLOPs torch counts in full
    source, target = torch.randint(48, (2, 3, 20))
    counter = FlopCounterMode(display=False)
    with counter:
        logits = (
            model(source, decoder_input_ids=target)
            if model_config.shape == "encoder-decoder"
            else model(source)
        )
        logits.sum().backward()
    assert counter.get_total_flops() == flops.training_flops(
        model_config, flops.whole_rows(model_config, 3, 20)
    )
