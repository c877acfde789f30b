"""Decoders and scorers around small random models."""

import pytest


@pytest.fixture(scope="session")
def decoder(small_model, small_tokenizer):
    """decoder(model, stops, stop_strings, use_cache, beginning, **options): greedy unless `options` say otherwise."""
    from lmcli.config import GenerateConfig
    from lmcli.inference.decoding import Decoder

    def build(model=None, stops=(), stop_strings=(), use_cache=True, beginning=(0,), **options) -> Decoder:
        config = GenerateConfig(**{"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 20, **options})
        return Decoder(model or small_model(max_position_embeddings=64, vocab_size=small_tokenizer.size),
                       small_tokenizer, list(beginning), list(stops), config, tuple(stop_strings), use_cache)
    return build


@pytest.fixture(scope="session")
def twin(small_model, small_tokenizer, tmp_path_factory):
    """One of our models (context 32) and the same as transformers reads it from the folder we saved."""
    from transformers import AutoModelForCausalLM

    from lmcli.checkpoints import folder as checkpoints
    from lmcli.config import GenerateConfig

    folder = tmp_path_factory.mktemp("twin")
    model = small_model(vocab_size=small_tokenizer.size)
    checkpoints.save(folder, model, small_tokenizer, GenerateConfig())
    return model, AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="session")
def scorer(twin, small_tokenizer):
    """scorer(beginning, **options): a Scorer around our half of the twins."""
    from lmcli.inference.scoring import Scorer

    def build(beginning=(0,), **options) -> Scorer:
        return Scorer(twin[0], small_tokenizer, list(beginning), **options)
    return build
