"""`lm score` of rows with messages, against the log-probabilities of transformers."""

import json

import pytest

from lmcli.checkpoints import folder
from lmcli.config import GenerateConfig
from lmcli.text.chat_template import DEFAULT_TEMPLATE
from lmcli.text.tokenizer import Tokenizer

ASK = {"role": "user", "content": "Who slept?"}
SAY = {"role": "assistant", "content": "The baker slept.  é\n"}


@pytest.fixture(scope="module")
def chat_model(small_model, small_tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("chat")
    settings = {**small_tokenizer.settings, "chat_template": DEFAULT_TEMPLATE}
    model = small_model(max_position_embeddings=256, vocab_size=small_tokenizer.size)
    folder.save(path, model, Tokenizer(small_tokenizer.core, settings), GenerateConfig())
    return path


def lines(*rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_the_last_answer_is_scored_as_transformers_does(inside, chat_model):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(chat_model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    rows = [[ASK, SAY], [ASK, SAY, ASK, {**SAY, "content": "No"}], [ASK, SAY, ASK]]
    stdin = lines(*({"messages": messages, "id": 7} for messages in rows))
    done = inside("score", "-m", chat_model, "--format", "jsonl", "--json", stdin=stdin)
    assert done.returncode == 0, done.stderr
    for messages, line in zip(rows, done.stdout.splitlines(), strict=True):
        scored = json.loads(line)
        messages = messages[:2] if messages[-1] is ASK else messages
        before = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)
        ids = tokenizer.apply_chat_template(messages)["input_ids"][:-2]  # EOS and a line end
        start = len(before["input_ids"])
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = sum(float(logprobs[i - 1, ids[i]]) for i in range(start, len(ids)))
        assert scored["logprob"] == pytest.approx(expected, abs=1e-3)
        assert scored["tokens"] == len(ids) - start
        assert (scored["text"], scored["id"]) == (messages[-1]["content"], 7)
        assert scored["bytes"] == len(scored["text"].encode())


def test_nothing_is_put_between_and_pieces_are_those_of_the_answer(inside, chat_model, tmp_path):
    import shutil

    shutil.copytree(chat_model, tmp_path / "tight")
    tight = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    tight += "{% if add_generation_prompt %}[assistant]{% endif %}"
    (tmp_path / "tight" / "chat_template.jinja").write_text(tight)
    call = ("score", "-m", tmp_path / "tight", "--format", "jsonl", "--no-header")
    row = {"messages": [ASK, {**SAY, "content": "Yes"}]}
    joined = {"prefix": "[user]Who slept?[assistant]", "text": "Yes"}
    pieces = inside(*call, "--per", "token", stdin=lines(row)).stdout.decode()
    options = ("--prefix-field", "prefix", "--join", "", "--per", "token")
    assert pieces and pieces == inside(*call, *options, stdin=lines(joined)).stdout.decode()


def test_text_and_messages_may_be_mixed_and_a_field_named(inside, chat_model):
    call = ("score", "-m", chat_model, "--format", "jsonl", "--no-header")
    both = inside(*call, stdin=lines({"messages": [ASK, SAY]}, {"text": "The"})).stdout
    assert both.count(b"\n") == 2
    named = inside(*call, "--field", "chat", stdin=lines({"chat": [ASK, SAY]})).stdout
    assert named == both.splitlines(keepends=True)[0]


@pytest.mark.parametrize(
    "messages, message",
    [
        ([ASK], "there is no message of the assistant"),
        ([{"content": "x"}], "field 'messages' is no list of messages"),
        ([ASK, {**SAY, "content": 3}], "the chat template cannot be applied"),
    ],
)
def test_bad_rows_name_their_line(inside, chat_model, messages, message):
    call = ("score", "-m", chat_model, "--format", "jsonl", "--no-header")
    rows = lines({"text": "The"}, {"messages": messages})
    done = inside(*call, stdin=rows)
    assert done.returncode == 1 and f"line 2: {message}" in done.stderr.decode()
    done = inside(*call, "--on-error", "blank", stdin=rows)
    assert done.returncode == 0 and done.stdout.count(b"\n") == 2


def test_an_answer_without_text_scores_as_an_empty_line(inside, chat_model):
    call = ("score", "-m", chat_model, "--format", "jsonl", "--no-header")
    stdin = lines({"messages": [ASK, {**SAY, "content": ""}]}, {"text": ""})
    first, second = inside(*call, stdin=stdin).stdout.splitlines()
    assert first == second == b"0\t0\t0\tNA\t"


def test_models_without_a_template_are_refused(inside, trained):
    call = ("score", "-m", trained[0], "--format", "jsonl")
    done = inside(*call, stdin=lines({"messages": [ASK, SAY]}))
    assert done.returncode == 1 and f"{trained[0]}: has no chat template" in done.stderr.decode()


def test_the_signature_is_of_plain_texts_only(inside, chat_model):
    call = ("score", "-m", chat_model, "--format", "jsonl", "-v")
    plain = inside(*call, stdin=lines({"text": "The"})).stderr
    chat = inside(*call, stdin=lines({"messages": [ASK, SAY]})).stderr
    assert len(plain.splitlines()) == len(chat.splitlines()) + 1
