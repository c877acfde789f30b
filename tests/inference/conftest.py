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
