"""Conversations as training reads them, against transformers' apply_chat_template."""

import json

import numpy as np
import pytest

from lmcli.config import TokenizerConfig
from lmcli.data import documents, examples
from lmcli.data.batches import IGNORED, ExampleCollator
from lmcli.data.documents import DocumentFormat
from lmcli.errors import UserError
from lmcli.text import tokenizer as tokenizers
from lmcli.text.chat_template import DEFAULT_TEMPLATE, chat_template
from lmcli.training.datasets import Source, source_from_facts

CHATML = """\
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}
{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
HEADERS = """\
{{- bos_token }}{% for m in messages %}
{{- '[' + m.role + ']\\n\\n' + m.content | trim + eos_token }}{% endfor %}
{%- if add_generation_prompt %}{{ '[assistant]\\n\\n' }}{% endif %}"""
MARKED = """\
{%- for m in messages %}{% if m.role == 'assistant' %}{{ '<<' }}{% generation %}{{ m.content }}
{{- eos_token + '\\n' }}{% endgeneration %}{{ '>>' }}{% else %}{{ '(' + m.content + ')' }}
{%- endif %}{% endfor %}{% if add_generation_prompt %}<<{% endif %}"""
TEMPLATES = {"default": DEFAULT_TEMPLATE, "chatml": CHATML, "headers": HEADERS, "marked": MARKED}

ASK, SAY = {"role": "user", "content": "Who? 你好 🎉"}, {"role": "assistant", "content": "It is I."}
CHATS = [
    [ASK, SAY],
    [{"role": "system", "content": "Be brief."}, ASK, SAY, ASK, {**SAY, "content": "é, no."}],
    [ASK, SAY, ASK],
]
CHAT_FORMAT = DocumentFormat(format="jsonl", fields=("messages",), paired=True, chat=True)


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.learn(["It is who? I am, no. " * 9], TokenizerConfig(300), "decoder")


@pytest.fixture
def encoded(tokenizer, tmp_path, monkeypatch):
    """encoded(template, chats): the examples of these chats."""
    monkeypatch.setenv("LM_CACHE", str(tmp_path / "cache"))

    def build(template, chats=CHATS):
        tokenizer.settings["chat_template"] = template
        file = tmp_path / "chats.jsonl"
        file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
        survey = documents.survey([str(file)], CHAT_FORMAT)
        template = chat_template(tokenizer.settings)
        return examples.build(
            survey.documents, survey.hashes, CHAT_FORMAT, tokenizer, template=template
        )

    return build


def expected_mask(theirs, chat):
    """By comparing the ids before the assistant's messages with those behind them."""
    mask = np.zeros(len(theirs.apply_chat_template(chat, return_dict=False)), dtype=int)
    for i, message in enumerate(chat):
        if message["role"] == "assistant":
            options = {"add_generation_prompt": True, "return_dict": False}
            start = len(theirs.apply_chat_template(chat[:i], **options))
            behind = theirs.apply_chat_template(chat[: i + 1], return_dict=False)
            while not theirs.decode(behind[-1:]).strip():
                behind.pop()
            mask[start : len(behind)] = 1
    return mask


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_and_mask_are_those_of_transformers(name, tokenizer, encoded, tmp_path):
    from transformers import AutoTokenizer

    learned = encoded(TEMPLATES[name])
    tokenizer.save(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == TEMPLATES[name]
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for i, chat in enumerate(CHATS):
        if name == "marked":
            both = theirs.apply_chat_template(
                chat, return_dict=True, return_assistant_tokens_mask=True
            )
            ids, mask = both["input_ids"], np.array(both["assistant_masks"])
        else:
            ids = theirs.apply_chat_template(chat, return_dict=False)
            mask = expected_mask(theirs, chat)
        ours, size = learned.sources[i].tolist(), len(learned.sources[i])
        assert ours == ids[:size] and learned.masks[i].tolist() == mask[:size].tolist()
        assert mask[size - 1] and not mask[size:].any()
    said = [
        sum(len(m["content"].encode()) for m in chat if m["role"] == "assistant") for chat in CHATS
    ]
    assert learned.sizes.tolist() == said


def test_the_loss_is_on_the_masked_tokens_alone(encoded, tokenizer):
    learned = encoded(CHATML)
    collator = ExampleCollator([7], [8], context=200, padding=0, eos=9, joined=True)
    batch = collator.batch(learned, np.arange(3))
    assert collator.lengths(learned)[:, 0].tolist() == (learned.sources.lengths - 1).tolist()
    for i, (ids, targets) in enumerate(zip(batch.ids, batch.targets)):
        row, mask = learned.sources[i].astype(int), learned.masks[i]
        assert ids[: len(row) - 1].tolist() == row[:-1].tolist()
        assert targets[targets != IGNORED].tolist() == row[1:][mask[1:] == 1].tolist()
    assert tokenizer.decode(batch.targets[0][batch.targets[0] != IGNORED]) == "It is I.<|im_end|>"


def test_a_long_conversation_loses_its_beginning(encoded):
    learned = encoded(DEFAULT_TEMPLATE)
    collator = ExampleCollator([], [], context=5, padding=0, joined=True)
    batch = collator.batch(learned, np.array([1]))
    assert batch.ids[0].tolist() == learned.sources[1][-6:-1].tolist()
    assert batch.targets[0][-1] == learned.sources[1][-1]


def test_messages_that_the_template_refuses_are_named(encoded):
    with pytest.raises(UserError, match="one turn") as error:
        encoded(
            "{{ raise_exception('one turn') if messages | length > 2 }}{{ messages[-1].content }}"
        )
    assert error.value.where.endswith("chats.jsonl, line 2")
    with pytest.raises(UserError, match="no message has the role 'assistant'"):
        encoded(CHATML, [[ASK]])


def test_a_run_of_before_reads_messages_as_it_did():
    facts = Source([], [], CHAT_FORMAT).facts()
    assert source_from_facts(facts).doc_format == CHAT_FORMAT
    facts.pop("chat")
    pair = source_from_facts(facts).doc_format.pair({"messages": CHATS[1]})
    assert pair[0].startswith("system: Be brief.\nuser: ") and pair[1] == " é, no."
