"""Labels against transformers: the same logits for real lines whatever the batch, for texts and for tokens."""

import json
import shutil

import pytest
import torch

SIZES = {"vocab_size": 30_522, "hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 3,
         "intermediate_size": 50, "max_position_embeddings": 60, "num_labels": 3}
SENTENCE = "This is a test sentence."


@pytest.fixture(scope="module")
def classifier(shared, randomize, tmp_path_factory):
    """classifier(family, head, **config): (random model of transformers, lmcli.load of its folder); real WordPiece."""
    import transformers

    import lmcli

    own = {"DistilBert": {"dim": 36, "n_layers": 2, "n_heads": 3, "hidden_dim": 50},
           "Roberta": {"type_vocab_size": 1, "pad_token_id": 0, "bos_token_id": 101, "eos_token_id": 102}}

    def build(family="Bert", head="SequenceClassification", **options):
        folder = tmp_path_factory.mktemp(family)
        config = getattr(transformers, f"{family}Config")(**SIZES, **own.get(family, {}), **options)
        made = randomize(getattr(transformers, f"{family}For{head}")(config))
        with torch.no_grad():
            for name, weight in made.named_parameters():
                if weight.ndim > 1 and any(part in name for part in ("word_embeddings", "value", "v_lin", "attention.out")):
                    weight.mul_(4)  # so that the text decides the logits, not the first token
        made.save_pretrained(folder)
        for file in (shared / "tokenizers" / "bert-minilm").iterdir():
            if file.name != "config.json":
                shutil.copy(file, folder)
        return made, lmcli.load(str(folder), device="cpu")
    return build


@pytest.fixture(scope="module")
def lines(shared):
    with (shared / "classification" / "sst2.dev.jsonl").open() as file:
        return [SENTENCE, *(json.loads(line)["text"] for line in file)][:501]


@pytest.fixture(scope="module")
def wanted(shared):
    """wanted(model, texts): transformers' logits, a text at a time, cut at the context, with AutoTokenizer's template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "bert-minilm")

    def run(model, texts, context):
        with torch.no_grad():
            return [model(**tokenizer(text, truncation=True, max_length=context, return_tensors="pt",
                                      return_token_type_ids=False)).logits[0] for text in texts]
    return run


@pytest.mark.parametrize("family", ["Bert", "Roberta", "DistilBert"])
def test_logits_are_those_of_transformers_whatever_the_batch(family, classifier, wanted, lines, difference):
    made, ours = classifier(family)
    texts = [*lines, "a long one " * 100]
    expected = torch.stack(wanted(made, texts, ours.context))
    assert expected.std(0).min() > 0.02  # the text decides
    for batch in (0, 1, 300):
        found = ours.classify(texts, batch=batch)
        assert max(difference(torch.tensor(one.logits), row) for one, row in zip(found, expected)) < 1e-5
        assert [one.truncated for one in found[-2:]] == [False, True]
        assert [one.label for one in found] == [f"LABEL_{i}" for i in expected.argmax(1).tolist()]
    for one, row in zip(found, expected.double().softmax(-1)):
        assert list(one.probabilities.values()) == pytest.approx(row.tolist(), abs=1e-5)
        assert one.probability == max(one.probabilities.values())


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_pairs_are_read_and_cut_as_transformers_does_it(family, classifier, lines, shared, difference):
    from transformers import AutoTokenizer

    made, ours = classifier(family)
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "bert-minilm")
    long, longer = "a long one " * 14, "is it " * 40
    pairs = [*zip(lines[:40], lines[40:80]), (SENTENCE, ""), ("", SENTENCE), (long, SENTENCE), (SENTENCE, long),
             (long, longer), (longer, long), (long, long), (longer, longer + "x"), (SENTENCE, SENTENCE)]
    found = ours.classify(pairs)
    for (first, second), one in zip(pairs, found):
        encoded = tokenizer([first], [second], truncation=True, max_length=ours.context, return_tensors="pt")
        if family == "Roberta":
            del encoded["token_type_ids"]  # it has one type
        with torch.no_grad():
            assert difference(torch.tensor(one.logits), made(**encoded).logits[0]) < 1e-5
    assert [one.truncated for one in found[-7:]] == [False, False, True, True, True, True, False]
    assert ours.classify([("", "")])[0].label is None


def test_tokens_are_labelled_and_lie_where_they_say(classifier, wanted, lines, difference):
    made, ours = classifier(head="TokenClassification")
    texts = [*lines[:60], "Café in Köln, 你好!", "a long one " * 100]
    for text, found, expected in zip(texts, ours.classify(texts), wanted(made, texts, ours.context)):
        assert difference(torch.tensor([piece.logits for piece in found.pieces]), expected[1:-1]) < 1e-5
        data = text.encode()
        assert all(data[piece.start:piece.end].decode() == piece.piece.strip() != "" for piece in found.pieces)
        assert found.label is None and found.probabilities == {} and found.logits == []


def test_a_multi_label_model_gives_every_label_above_the_threshold(classifier, lines):
    _, ours = classifier(problem_type="multi_label_classification")
    counts = set()
    chances = sorted(chance for one in ours.classify(lines[:100]) for chance in one.probabilities.values())
    for threshold in (chances[30], chances[150], chances[270]):
        for one in ours.classify(lines[:100], threshold=threshold):
            chances = torch.tensor(one.logits).double().sigmoid().tolist()
            assert list(one.probabilities.values()) == pytest.approx(chances)
            assert one.labels == [label for label, chance in one.top(3) if chance > threshold]
            assert (one.label, one.probability) == (one.top(1)[0] if one.labels else (None, None))
            counts.add(len(one.labels))
    assert len(counts) > 2


@pytest.mark.parametrize("text", ["", "   ", "\t"])
def test_a_text_without_tokens_has_no_verdict(classifier, text):
    _, ours = classifier()
    first, empty = ours.classify(["fine", text])
    assert first.label and (empty.label, empty.probability, empty.logits, empty.truncated) == (None, None, [], False)
    assert ours.classify([]) == []


def test_labels_of_one_name_do_not_hide_each_other(classifier):
    _, ours = classifier(id2label={0: "same", 1: "same", 2: "other"})
    assert list(ours.classify("a")[0].probabilities) == ["same", "same_1", "other"]


def test_logits_of_every_shape(classifier, tmp_path, small_tokenizer, randomize):
    from transformers import T5Config, T5ForConditionalGeneration

    import lmcli
    from lmcli.errors import UsageError

    made, ours = classifier()
    ids, mask, types = torch.tensor([[101, 2023, 102, 0], [101, 7, 8, 102]]), torch.tensor([[1, 1, 1, 0], [1] * 4]), \
        torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
    with torch.no_grad():
        assert torch.allclose(ours.logits(ids, mask, token_type_ids=types), made(ids, mask, types).logits, atol=1e-5)
    made = randomize(T5ForConditionalGeneration(T5Config(vocab_size=401, d_model=24, d_kv=8, d_ff=30, num_layers=1,
                                                         num_heads=3)))
    made.save_pretrained(tmp_path)
    small_tokenizer.save(tmp_path)
    ours, target = lmcli.load(tmp_path, device="cpu"), [[0, 5, 9], [0, 7, 7]]
    with torch.no_grad():
        expected = made(ids % 400, mask, decoder_input_ids=torch.tensor(target)).logits
    assert torch.allclose(ours.logits(ids % 400, mask, target), expected, rtol=1e-5, atol=1e-4)
    with pytest.raises(UsageError, match="decoder_input_ids"):
        ours.logits(ids % 400)
