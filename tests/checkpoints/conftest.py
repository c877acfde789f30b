"""Folders written by transformers, an independent implementation of reading and writing."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for hostile_numbers.py


@pytest.fixture(scope="session")
def reference(randomize, small_tokenizer):
    """reference(folder, kind, seed, max_shard_size, dtype, **config): saves and returns a model.

    It is a random one of transformers, with our small tokenizer, an odd vocabulary, grouped heads,
    and a head width that does not divide the model's.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    families = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
    sizes = {
        "vocab_size": 409,
        "hidden_size": 36,
        "intermediate_size": 50,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
    }

    def build(folder, kind="llama", seed=0, max_shard_size="1GB", dtype=None, **options):
        config, model = families[kind]
        built = randomize(model(config(**{**sizes, **options})), seed)
        if dtype is not None:
            built = built.to(dtype)
        built.save_pretrained(folder, max_shard_size=max_shard_size)
        small_tokenizer.save(folder)
        return built

    return build
