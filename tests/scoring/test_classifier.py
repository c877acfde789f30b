"""Labels of texts and tokens against transformers, in any batch."""

import json
import shutil

import pytest
import torch

SIZES = {
    "vocab_size": 30_522,
    "hidden_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 50,
    "max_position_embeddings": 60,
    "num_labels": 3,
}
SENTENCE = "This is a test sentence."


@pytest.fixture(scope="module")
def classifier(shared, randomize, tmp_path_factory):
    """classifier(family, head, **config): (random transformers model, lmcli.load of its folder)."""
    import transformers

    import lmcli

    own = {
        "DistilBert": {"dim": 36, "n_layers": 2, "n_heads": 3, "hidden_dim": 50},
        "Roberta": {
            "type_vocab_size": 1,
            "pad_token_id": 0,
            "bos_token_id": 101,
            "eos_token_id": 102,
        },
    }

    def build(family="Bert", head="SequenceClassification", **options):
        folder = tmp_path_factory.mktemp(family)
        config = getattr(transformers, f"{family}Config")(**SIZES, **own.get(family, {}), **options)
        model = randomize(getattr(transformers, f"{family}For{head}")(config))
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.ndim > 1 and any(
                    part in name for part in ("word_embeddings", "value", "v_lin", "attention.out")
                ):
                    weight.mul_(4)  # so that the text decides the logits, not the first token
        model.save_pretrained(folder)
        for file in (shared / "tokenizers" / "bert-minilm").iterdir():
            if file.name != "config.json":
                shutil.copy(file, folder)
        return model, lmcli.load(str(folder), device="cpu")

    return build


@pytest.fixture(scope="module")
def lines(shared):
    with (shared / "classification" / "sst2.dev.jsonl").open() as file:
        return [SENTENCE, *(json.loads(line)["text"] for line in file)][:151]


@pytest.fixture(scope="module")
def expected(shared):
    """expected(model, texts): logits of transformers, one text at a time."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "bert-minilm")

    def run(model, texts, context):
        with torch.no_grad():
            return [
                model(
                    **tokenizer(
                        text,
                        truncation=True,
                        max_length=context,
                        return_tensors="pt",
                        return_token_type_ids=False,
                    )
                ).logits[0]
                for text in texts
            ]

    return run


@pytest.mark.parametrize("family", ["Bert", "Roberta", "DistilBert"])
def test_logits_equal_transformers_in_any_batch(family, classifier, expected, lines, difference):
    theirs, ours = classifier(family)
    texts = [*lines, "a long one " * 100]
    expected = torch.stack(expected(theirs, texts, ours.context))
    assert expected.std(0).min() > 0.02  # the text decides
    for batch in (0, 1, 300):
        results = ours.classify(texts, batch=batch)
        assert (
            max(difference(torch.tensor(one.logits), row) for one, row in zip(results, expected))
            < 1e-5
        )
        assert [one.truncated for one in results[-2:]] == [False, True]
        assert [one.label for one in results] == [f"LABEL_{i}" for i in expected.argmax(1).tolist()]
    for one, row in zip(results, expected.double().softmax(-1)):
        assert list(one.probabilities.values()) == pytest.approx(row.tolist(), abs=1e-5)
        assert one.probability == max(one.probabilities.values())


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_pairs_are_encoded_and_cut_as_by_transformers(
    family, classifier, lines, shared, difference
):
    from transformers import AutoTokenizer

    theirs, ours = classifier(family)
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "bert-minilm")
    long, longer = "a long one " * 14, "is it " * 40
    pairs = [
        *zip(lines[:40], lines[40:80]),
        (SENTENCE, ""),
        ("", SENTENCE),
        (long, SENTENCE),
        (SENTENCE, long),
        (long, longer),
        (longer, long),
        (long, long),
        (longer, longer + "x"),
        (SENTENCE, SENTENCE),
    ]
    results = ours.classify(pairs)
    for (first, second), one in zip(pairs, results):
        encoded = tokenizer(
            [first], [second], truncation=True, max_length=ours.context, return_tensors="pt"
        )
        if family == "Roberta":
            del encoded["token_type_ids"]  # it has one type
        with torch.no_grad():
            assert difference(torch.tensor(one.logits), theirs(**encoded).logits[0]) < 1e-5
    assert [one.truncated for one in results[-7:]] == [False, False, True, True, True, True, False]
    assert ours.classify([("", "")])[0].label is None


def test_tokens_are_labeled_with_their_bytes(classifier, expected, lines, difference):
    theirs, ours = classifier(head="TokenClassification")
    texts = [*lines[:60], "Café in Köln, 你好!", "a long one " * 100]
    for text, result, logits in zip(
        texts, ours.classify(texts), expected(theirs, texts, ours.context)
    ):
        found = torch.tensor([piece.logits for piece in result.pieces])
        assert difference(found, logits[1:-1]) < 1e-5
        data = text.encode()
        assert all(
            data[piece.start : piece.end].decode() == piece.piece.strip() != ""
            for piece in result.pieces
        )
        assert result.label is None and result.probabilities == {} and result.logits == []


def test_a_multi_label_model_gives_every_label_above_the_threshold(classifier, lines):
    _, ours = classifier(problem_type="multi_label_classification")
    counts = set()
    chances = sorted(
        chance for one in ours.classify(lines[:100]) for chance in one.probabilities.values()
    )
    for threshold in (chances[30], chances[150], chances[270]):
        for one in ours.classify(lines[:100], threshold=threshold):
            chances = torch.tensor(one.logits).double().sigmoid().tolist()
            assert list(one.probabilities.values()) == pytest.approx(chances)
            assert one.labels == [label for label, chance in one.top(3) if chance > threshold]
            assert (one.label, one.probability) == (one.top(1)[0] if one.labels else (None, None))
            counts.add(len(one.labels))
    assert len(counts) > 2


@pytest.mark.parametrize("text", ["", "   ", "\t"])
def test_a_text_without_tokens_has_no_label(classifier, text):
    _, ours = classifier()
    first, empty = ours.classify(["fine", text])
    assert first.label and (empty.label, empty.probability, empty.logits, empty.truncated) == (
        None,
        None,
        [],
        False,
    )
    assert ours.classify([]) == []


def test_labels_of_equal_names_stay_apart(classifier):
    _, ours = classifier(id2label={0: "same", 1: "same", 2: "other"})
    assert list(ours.classify("a")[0].probabilities) == ["same", "same_1", "other"]


def test_logits_of_every_shape(classifier, tmp_path, small_tokenizer, randomize):
    from transformers import T5Config, T5ForConditionalGeneration

    import lmcli
    from lmcli.errors import UsageError

    theirs, ours = classifier()
    ids, mask, types = (
        torch.tensor([[101, 2023, 102, 0], [101, 7, 8, 102]]),
        torch.tensor([[1, 1, 1, 0], [1] * 4]),
        torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]]),
    )
    with torch.no_grad():
        assert torch.allclose(
            ours.logits(ids, mask, token_type_ids=types), theirs(ids, mask, types).logits, atol=1e-5
        )
    theirs = randomize(
        T5ForConditionalGeneration(
            T5Config(vocab_size=401, d_model=24, d_kv=8, d_ff=30, num_layers=1, num_heads=3)
        )
    )
    theirs.save_pretrained(tmp_path)
    small_tokenizer.save(tmp_path)
    ours, target = lmcli.load(tmp_path, device="cpu"), [[0, 5, 9], [0, 7, 7]]
    with torch.no_grad():
        expected = theirs(ids % 400, mask, decoder_input_ids=torch.tensor(target)).logits
    assert torch.allclose(ours.logits(ids % 400, mask, target), expected, rtol=1e-5, atol=1e-4)
    with pytest.raises(UsageError, match="decoder_input_ids"):
        ours.logits(ids % 400)
