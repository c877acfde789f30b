"""Greedy, beam search and mask filling against transformers.

tests/acceptance/beam_comparison.py is the long form.
"""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

import lmcli
from lmcli.config import TokenizerConfig

transformers = pytest.importorskip("transformers")
PATH = Path(__file__).parents[1] / "acceptance" / "beam_comparison.py"
SETTINGS = (
    "greedy, rules",
    "length penalty 0.6, early stopping False",
    "length penalty 2.0, early stopping never",
    "length penalty 0.0, early stopping True",
    "no-repeat 3, all 4 beams",
    "forced first and last",
    "suppressed",
    "bad words",
    "lengths, penalty",
    "min_length, max_length",
)


@pytest.fixture(scope="module")
def comparison():
    spec = importlib.util.spec_from_file_location("beam_comparison", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("family", ["t5", "bart", "marian", "llama", "gpt2"])
def test_the_same_tokens_as_transformers(family, comparison):
    results = list(comparison.compare(family, 12, SETTINGS))
    assert [(name, same) for name, same, total, _ in results] == [
        (name, total) for name, _, total, _ in results
    ]
    assert max(lengths for *_, lengths in results) > 3


def test_an_old_folder_says_how_to_generate_in_its_config_json(comparison, tmp_path):
    model = comparison.make("bart", tmp_path)
    (tmp_path / "generation_config.json").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    old = {
        "num_beams": 3,
        "early_stopping": True,
        "length_penalty": 2.0,
        "no_repeat_ngram_size": 3,
        "min_length": 8,
        "max_length": 15,
        "forced_bos_token_id": 11,
        "forced_eos_token_id": 2,
    }
    (tmp_path / "config.json").write_text(json.dumps({**config, **old}))
    lm = lmcli.load(tmp_path)
    rows = [[*row, 2] for row in comparison.inputs(5)]
    settings = {
        **old,
        "eos_token_id": [2],
        "pad_token_id": 1,
        "decoder_start_token_id": 2,
        "bos_token_id": 0,
    }
    results = [results[0].tokens for results in lmcli.api.generate_all(lm.decoder(), rows)]
    assert results == comparison.theirs(model, rows, settings)
    assert all(text[0] == 11 and 7 <= len(text) <= 14 for text in results)


@pytest.fixture(scope="module")
def bert(small_tokenizer, randomize, tmp_path_factory):
    """(folder, model, mask id) of a random masked language model with the template of BERT."""
    from tokenizers import AddedToken, processors

    from lmcli.text.tokenizer import learn

    folder = tmp_path_factory.mktemp("bert")
    words = learn(["the dog saw a cat and the cat ran"] * 3, TokenizerConfig(300))
    words.core.add_special_tokens(
        [AddedToken(name, special=True) for name in ("[CLS]", "[SEP]", "[MASK]")]
    )
    ids = {name: words.core.token_to_id(name) for name in ("[CLS]", "[SEP]", "[MASK]")}
    words.core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])]
    )
    words.settings = {"tokenizer_class": "PreTrainedTokenizerFast", "mask_token": "[MASK]"}
    words.save(folder)
    model = randomize(
        transformers.BertForMaskedLM(
            transformers.BertConfig(
                vocab_size=320,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=48,
                max_position_embeddings=40,
            )
        ),
        5,
    )
    model.save_pretrained(folder)
    return folder, model, ids["[MASK]"]


def test_alternatives_of_a_mask_are_the_likeliest_tokens(bert):
    folder, model, mask = bert
    lm = lmcli.load(folder)
    for text in ("the [MASK] saw a cat", "[MASK] dog", "a cat and the dog ran [MASK]"):
        ids = torch.tensor([lm.prompt(text)])
        with torch.no_grad():
            logits = model(ids).logits[0, ids[0].tolist().index(mask)]
        best = logits.log_softmax(-1).topk(7)
        results = lm.generate([text, "the [MASK]"], num_samples=7)[:7]
        assert [result.tokens for result in results] == [[i] for i in best.indices.tolist()]
        assert [result.token_logprobs[0] for result in results] == pytest.approx(
            best.values.tolist(), abs=1e-4
        )
        filled = ids[0].where(ids[0] != mask, best.indices[0]).tolist()
        assert results[0].text == lm.tokenizer.decode(filled, special=False)


def test_many_masks_are_filled_most_confident_first(bert):
    folder, model, mask = bert
    lm = lmcli.load(folder)
    text = "the [MASK] saw [MASK] cat and [MASK] ran"
    ids, filled = torch.tensor([lm.prompt(text)]), {}
    while (ids == mask).any():
        with torch.no_grad():
            logprobs = model(ids).logits[0].log_softmax(-1)
        at = max((ids[0] == mask).nonzero()[:, 0].tolist(), key=lambda i: logprobs[i].max())
        ids[0, at] = logprobs[at].argmax()
        filled[at] = logprobs[at].max().item()
    (result,) = lm.generate(text)
    assert result.tokens == [ids[0, at].item() for at in sorted(filled)]
    assert result.token_logprobs == pytest.approx([filled[at] for at in sorted(filled)], abs=1e-4)
    samples = lm.generate(text, num_samples=4)
    scores = [sum(result.token_logprobs) for result in samples]
    assert scores == sorted(scores, reverse=True) and scores[0] >= sum(result.token_logprobs) - 1e-4
    assert len({tuple(result.tokens) for result in samples}) == 4


def test_filling_does_not_depend_on_the_batch_and_draws_follow_seeds(bert):
    lm = lmcli.load(bert[0])
    texts = ["the [MASK] saw", "a [MASK] and [MASK] dog ran and ran", "[MASK]"]
    for options in ({}, {"num_samples": 3}, {"temperature": 1.0, "seed": 4, "num_samples": 2}):
        together = lm.generate(texts, **options)
        count = options.get("num_samples", 1)
        for i, text in enumerate(texts):
            seed = {"seed": 4 + i * count} if "seed" in options else {}
            alone = lm.generate(text, **{**options, **seed})
            assert [result.tokens for result in alone] == [
                result.tokens for result in together[i * count : (i + 1) * count]
            ]
    drawn = lm.generate("the [MASK]", num_samples=40, temperature=1.0, seed=1)
    assert len({tuple(result.tokens) for result in drawn}) > 5
    assert [result.seed for result in drawn] == list(range(1, 41))


def test_impossible_options_are_refused(comparison, tmp_path):
    comparison.make("marian", tmp_path)
    lm = lmcli.load(tmp_path)
    assert lm.decoder(early_stopping=True).config.early_stopping == "true"
    with pytest.raises(
        lmcli.errors.UserError, match="forced_bos_token_id 9999 is not an id of this model"
    ):
        lm.decoder(forced_bos_token_id=9999)
    with pytest.raises(lmcli.errors.UserError, match="suppress_tokens: 'x' is not a list of ids"):
        lm.decoder(suppress_tokens="x")
    (tmp_path / "generation_config.json").write_text('{"early_stopping": "soon"}')
    with pytest.raises(
        lmcli.errors.UserError,
        match=r"generation_config\.json.*early_stopping: 'soon' is not one of",
    ):
        lmcli.load(tmp_path)


@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"num_beams": 3}], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bart"])
def test_alternatives_of_each_step_are_those_of_transformers(family, options, comparison, tmp_path):
    model = comparison.make(family, tmp_path)
    lm, rows = lmcli.load(tmp_path), comparison.inputs(6)
    decoder = lm.decoder(logprobs=5, max_new_tokens=12, **options)
    results = lmcli.api.generate_all(decoder, rows, seed=3)
    assert max(len(result.tokens) for (result,) in results) > 5
    for row, (result,) in zip(rows, results):
        start = [decoder.target_start] if decoder.has_encoder else row
        ids = torch.tensor([[*start, *result.tokens]])
        inputs = {"input_ids": ids}
        if decoder.has_encoder:
            inputs = {"input_ids": torch.tensor([row]), "decoder_input_ids": ids}
        with torch.no_grad():
            logprobs = model(**inputs).logits[0, len(start) - 1 : -1].log_softmax(-1)
        best = logprobs.topk(5)
        steps = result.alternatives
        tokens = [[each["token"] for each in step] for step in steps]
        values = torch.tensor([[each["logprob"] for each in step] for step in steps])
        assert tokens == best.indices.tolist()
        assert (values - best.values).norm() < 1e-5 * best.values.norm()
        assert steps[0][0]["text"] == lm.tokenizer.token_text(tokens[0][0])
