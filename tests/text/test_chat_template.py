"""Chat templates: text and ids of transformers, spans of the assistant, bounded work."""

import json
import time

import pytest
from jinja2 import UndefinedError

from lmcli.errors import UserError
from lmcli.text import tokenizer as tokenizers
from lmcli.text.chat_template import (
    DEFAULT_TEMPLATE,
    ChatTemplate,
    assistant_mask,
    chat_template,
    default_template,
)
from lmcli.text.tokenizer import END_OF_TEXT

# written for these tests in the manner of the templates that well-known models bring
CHATML = """\
{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{% endif %}
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
TEMPLATES = {
    "default": DEFAULT_TEMPLATE,
    "chatml": CHATML,
    "llama 2": """\
{% if messages[0]['role'] == 'system' %}
    {% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}
    {% set turns = messages[1:] %}
{% else %}
    {% set system, turns = '', messages %}
{% endif %}
{% for turn in turns %}
    {% if (turn['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('roles must alternate user/assistant') }}
    {% endif %}
    {% if turn['role'] == 'user' %}
        {{ bos_token + '[INST] ' + (system if loop.first else '') + turn['content'].strip()
           + ' [/INST]' }}
    {% else %}
        {{ ' ' + turn['content'] | trim + ' ' + eos_token }}
    {% endif %}
{% endfor %}
""",
    "llama 3": """\
{% set ns = namespace(date=strftime_now('%Y')) %}
{{ bos_token }}{% for m in messages %}
{% set text = '<|start_header_id|>' ~ m['role'] ~ '<|end_header_id|>\\n\\n' ~ (m['content'] | trim)
   ~ '<|eot_id|>' %}
{% if m['role'] == 'system' %}{% set text = text | replace('YEAR', ns.date) %}{% endif %}
{{ text }}{% endfor %}
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
""",
    "gemma": """\
{{ bos_token }}{% for m in messages if m.role != 'system' %}
{%- set role = 'model' if m.role == 'assistant' else m.role -%}
<start_of_turn>{{ role }}
{{ m.content | trim }}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}""",
    "mistral": """\
{%- set system = messages | selectattr('role', 'equalto', 'system') | map(attribute='content')
   | join('\\n') -%}
{%- set ns = namespace(users=0) -%}
{%- set total = messages | selectattr('role', 'equalto', 'user') | list | length -%}
{{- bos_token }}
{%- for m in messages if m['role'] in ('user', 'assistant') %}
    {%- if m['role'] == 'user' %}
        {%- set ns.users = ns.users + 1 %}
        {{- '[INST]' }}{% if ns.users == total and system %}{{ system + '\\n\\n' }}{% endif %}
        {{- m['content'] + '[/INST]' }}
    {%- else %}{{- ' ' + m['content'] + eos_token }}{% endif %}
{%- endfor %}""",
    "qwen 3": """\
{%- macro head(role) %}{{ '<|im_start|>' + role + '\\n' }}{% endmacro %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages[::-1] %}
    {%- set i = (messages | length - 1) - loop.index0 %}
    {%- if m.role == 'user' and ns.last < 0 %}{% set ns.last = i %}{% endif %}
{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {%- set said = m.content %}
        {%- set why = m.reasoning_content if m.reasoning_content is string else '' %}
        {%- if '</think>' in said %}
            {%- set why = said.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set said = said.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- head(m.role) }}
        {%- if loop.index0 > ns.last %}
            {{- '<think>\\n' + why + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- said + '<|im_end|>\\n' }}
    {%- else %}{{- head(m.role) + m.content + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ head('assistant') }}{% endif %}""",
    "json": """\
{% for m in messages %}{% if loop.index > 100 %}{% break %}{% endif %}
{% if m.role == 'tool' %}{% continue %}{% endif %}
{{ m | tojson }} {{ m.content | tojson(indent=2) }} {{ loop.last }} {{ tools is none }}
{%- endfor %}{{ dict(a='é', b=[1, 2.5, true, none]) | tojson(separators=(',', ':')) }}
{{ messages | map(attribute='role') | unique | sort | join(', ') }} {{ '%s:%d' % ('x', 3) }}
{{ '{}-{:>4}'.format(messages | length, 'ab') }} {{ 7 // 2 ** 1 * 'ab' }}
{{ messages | groupby('role') | list | length }} {{ range(5) | batch(2) | list }}""",
    "generation": """\
{%- for m in messages %}{% if m.role == 'assistant' %}<<{% generation %}{{ m.content }}
{{- eos_token }}{% endgeneration %}>>{% else %}({{ m.content }}){% endif %}{% endfor %}""",
}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
ASK = {"role": "user", "content": "Was it 2024? 你好 🎉\n"}
SAY = {"role": "assistant", "content": "  Yes; it’s so.\n\nAnd <s> is text."}
CHATS = [
    [ASK],
    [ASK, SAY],
    [ASK, SAY, {"role": "user", "content": "Why"}],
    [{"role": "system", "content": "In YEAR </s>"}, ASK, SAY, ASK, {**SAY, "content": "No."}],
    [ASK, {**SAY, "content": "<think>\nhm\n</think>\n\nGood.", "tool_calls": None}, ASK, SAY],
    [ASK, {**SAY, "thinking": "perhaps"}],
]


def by_transformers(source, messages, **options):
    """(text, characters of the generation blocks) of transformers."""
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [{k: v for k, v in message.items() if v is not None} for message in messages]
    texts, spans = render_jinja_template([messages], chat_template=source, **SPECIAL, **options)
    return texts[0], spans[0] if spans else []


@pytest.fixture(scope="module")
def folders(shared, small_tokenizer, tmp_path_factory):
    """Tokenizer folders with a chat template: ours, GPT-2's, BERT's, one of SentencePiece."""
    base = tmp_path_factory.mktemp("tokenizers")
    names = {"gpt2": "tokenizers/gpt2", "bert": "tokenizers/bert-minilm"}
    names["stories"] = "models/stories260K"
    sources = {name: tokenizers.load(shared / path) for name, path in names.items()}
    for name, tokenizer in {**sources, "ours": small_tokenizer}.items():
        (base / name).mkdir()
        tokenizer.save(base / name)
    return base


class TestAgainstTransformers:
    @pytest.mark.parametrize("name", TEMPLATES)
    def test_texts_are_equal(self, name):
        template = ChatTemplate(TEMPLATES[name], SPECIAL)
        for messages in CHATS:
            for start in (False, True):
                expected, _ = by_transformers(
                    TEMPLATES[name], messages, add_generation_prompt=start
                )
                assert template.render(messages, start) == expected

    @pytest.mark.parametrize("name", ["ours", "gpt2", "bert", "stories"])
    def test_ids_are_equal(self, folders, name):
        from transformers import AutoTokenizer

        theirs = AutoTokenizer.from_pretrained(folders / name)
        ours = tokenizers.load(folders / name)
        for source in TEMPLATES.values():
            ours.settings["chat_template"] = theirs.chat_template = source
            template = chat_template(ours.settings)
            for messages in CHATS:
                try:
                    expected = theirs.apply_chat_template(messages, add_generation_prompt=True)
                except UndefinedError:  # BERT has no bos_token
                    with pytest.raises(UserError, match="_token' is undefined"):
                        template.render(messages, True)
                    continue
                assert ours.encode(template.render(messages, True)) == expected["input_ids"]

    @pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "json"])
    @pytest.mark.parametrize("text", ["Well", "Well. ", " x\n"])
    def test_a_message_of_the_assistant_is_continued(self, name, text):
        messages = [ASK, {**SAY, "content": text}]
        expected, _ = by_transformers(TEMPLATES[name], messages, continue_final_message=True)
        assert ChatTemplate(TEMPLATES[name], SPECIAL).prompt(messages) == expected

    def test_generation_blocks_are_equal(self):
        template = ChatTemplate(TEMPLATES["generation"], SPECIAL)
        for messages in CHATS:
            expected = by_transformers(
                TEMPLATES["generation"], messages, return_assistant_tokens_mask=True
            )
            text, spans = template.text_and_spans(messages)
            assert (text, [(span.start, span.end) for span in spans]) == expected

    def test_the_mask_is_that_of_transformers(self, folders):
        from transformers import AutoTokenizer

        theirs = AutoTokenizer.from_pretrained(folders / "ours")
        ours = tokenizers.load(folders / "ours")
        ours.settings["chat_template"] = theirs.chat_template = TEMPLATES["generation"]
        template = chat_template(ours.settings)
        for messages in CHATS[1:]:
            expected = theirs.apply_chat_template(messages, return_assistant_tokens_mask=True)
            text, spans = template.text_and_spans(messages)
            (encoded,) = ours.encode_with_ends([text])
            assert assistant_mask(text, spans, encoded.ends) == expected["assistant_masks"]


class TestWhereItIs:
    @pytest.mark.parametrize("form", ["string", "list", "file", "files"])
    def test_it_is_read_as_transformers_reads_it_and_saved(self, folders, tmp_path, form):
        from transformers import AutoTokenizer

        named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
        folder = tmp_path / "given"
        ours = tokenizers.load(folders / "ours")
        ours.settings["chat_template"] = named if form == "list" else CHATML
        folder.mkdir()
        ours.save(folder)
        if form.startswith("file"):  # goes before the settings
            (folder / "chat_template.jinja").write_text("file {{ bos_token }}")
        if form == "files":
            (folder / "additional_chat_templates").mkdir()
            (folder / "additional_chat_templates" / "tool_use.jinja").write_text("other")
        saved = tmp_path / "saved"
        saved.mkdir()
        tokenizers.load(folder).save(saved)
        expected = AutoTokenizer.from_pretrained(folder).get_chat_template()
        assert expected == ("file {{ bos_token }}" if form.startswith("file") else CHATML)
        for place in (folder, saved):
            assert chat_template(tokenizers.load(place).settings).source == expected
            assert AutoTokenizer.from_pretrained(place).get_chat_template() == expected

    def test_none_and_wrong_ones(self, tmp_path):
        assert chat_template({}) is None
        with pytest.raises(UserError, match="no chat template called default, but rag, tools"):
            chat_template({"chat_template": {"rag": "a", "tools": "b"}})
        with pytest.raises(UserError, match="is no text"):
            chat_template({"chat_template": 3})

    def test_ours_begins_and_ends_as_our_models_do(self, small_tokenizer):
        template = default_template(small_tokenizer.settings)
        text = template.render([ASK, SAY], True)
        assert text.startswith(f"{END_OF_TEXT}<|user|>\nWas") and text.count(END_OF_TEXT) == 2
        assert text.endswith(f"is text.{END_OF_TEXT}\n<|assistant|>\n")

    def test_ours_reads_lists_of_parts(self):
        parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
        messages = [{"role": "user", "content": parts}]
        assert ChatTemplate(DEFAULT_TEMPLATE, {}).render(messages) == "<|user|>\nab\n"


class TestSpans:
    @pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "json"])
    def test_they_are_what_the_assistant_says(self, name):
        messages = [ASK, SAY, ASK, {**SAY, "content": "No."}]
        text, (first, second) = ChatTemplate(TEMPLATES[name], SPECIAL).text_and_spans(messages)
        assert text[first.start : first.content_end].strip() == SAY["content"].strip()
        said = text[second.start : second.content_end].removeprefix("<think>\n\n</think>\n\n")
        assert said.strip() == "No."
        closing = text[second.content_end : second.end].strip()
        assert closing in (END_OF_TEXT, "</s>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>")
        assert closing == text[first.content_end : first.end].strip()

    def test_a_repeated_text_is_found_where_it_was_said(self):
        messages = [{"role": "user", "content": "No."}, {**SAY, "content": "No."}] * 2
        source = TEMPLATES["llama 2"].replace("[INST]", "x")
        text, spans = ChatTemplate(source, SPECIAL).text_and_spans(messages)
        assert [text[: span.start].count("No.") for span in spans] == [1, 3]

    def test_a_first_message_of_the_assistant(self):
        text, (span,) = ChatTemplate(CHATML, {}).text_and_spans([{**SAY, "content": "Hi"}, ASK])
        assert text[span.start : span.end] == "Hi<|im_end|>"

    def test_a_template_that_hides_it(self):
        source = "{% for m in messages %}{{ m.content | upper }}{{ loop.length }}{% endfor %}"
        with pytest.raises(UserError, match="what the assistant says in message 2") as error:
            ChatTemplate(source, {}, "some/model").text_and_spans(
                [ASK, {**SAY, "content": "yes"}, ASK]
            )
        assert "{% generation %}" in str(error.value) and "some/model" in str(error.value)


GROWING = "{%% set ns = namespace(x='ab') %%}{%% for i in range(99) %%}%s{%% endfor %%}{{ ns.x }}"
HUGE = {
    "a long range": "{% for i in range(10 ** 12) %}x{% endfor %}",
    "loops in loops": "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3,
    "output": "{% for i in range(99999) %}" * 2 + "0123456789" * 9 + "{% endfor %}" * 2,
    "a repeated text": "{{ 'a' * 10 ** 12 }}",
    "a repeated list": "{{ [1] * 10 ** 10 }}",
    "a power": "{{ 9 ** (9 ** 9) }}",
    "squares": GROWING % "{% set ns.x = (3 if loop.first else ns.x * ns.x) %}",
    "joining": GROWING % "{% set ns.x = ns.x ~ ns.x %}",
    "adding": GROWING % "{% set ns.x = ns.x + ns.x %}",
    "lists of lists": GROWING % "{% set ns.x = [ns.x, ns.x] %}",
    "dicts of dicts": GROWING % "{% set ns.x = dict(a=ns.x, b=ns.x) %}",
    "a block": GROWING % "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}",
    "a cycle": "{% set ns = namespace() %}{% set ns.x = [ns] %}{{ ns }}",
    "a macro": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "a wide filter": "{{ 'a' | center(10 ** 11) }}",
    "a wide method": "{{ 'a'.center(10 ** 11) }}",
    "a wide %": "{{ '%99999999999d' % 1 }}{{ '%*d' % (99999999999, 1) }}",
    "a wide format": "{{ '%99999999999d' | format(1) }}",
    "a wide brace": "{{ '{:>99999999999}'.format(1) }}",
    "a nested width": "{{ '{:>{w}}'.format(1, w=99999999999) }}",
    "a date": "{{ strftime_now('%99999999999Y') }}",
    "replacing": "{% set x = 'a' * 10 ** 5 %}{{ x.replace('a', x) }}",
    "joined items": "{{ (range(99999) | map('string')).__class__ }}"
    "{% set x = 'a' * 10 ** 5 %}{{ x.join(range(99999) | map('string')) }}",
    "items by default": "{% set x = 'a' * 10 ** 6 %}"
    "{{ range(99999) | map(attribute='none', default=x) | join }}",
    "rounding": "{{ 5 | round(-(10 ** 9)) }}",
    "indented JSON": "{{ [1, [2]] | tojson(indent=10 ** 10) }}",
    "slices": "{% set x = 'a' * 10 ** 6 %}"
    "{% for i in range(99999) %}{% set y = x[1:] %}{% endfor %}",
    "searches": "{% set x = 'a' * 10 ** 6 %}{% for i in range(99999) %}{{ 'b' in x }}{% endfor %}",
    "its own text": "{% macro f() %}" + "x" * 200_000 + "{% endmacro %}"
    "{% for i in range(99999) %}{% set y = f() %}{% endfor %}",
    "a long template": "x" * 300_000,
    "sums of lists": "{{ ([[1]] * 9999) | sum(start=[]) | length }}",
}


class TestBounds:
    @pytest.mark.parametrize("name", HUGE)
    def test_a_template_that_asks_for_too_much_ends_in_an_error(self, name, monkeypatch):
        from lmcli.text import template_sandbox

        monkeypatch.setattr(template_sandbox, "MAX_STEPS", 20_000)  # 1,000,000 take seconds
        monkeypatch.setattr(template_sandbox, "MAX_SIZE", 1 << 20)
        start = time.process_time()
        with pytest.raises(UserError, match="the chat template"):
            ChatTemplate(HUGE[name], {}).render([ASK])
        assert time.process_time() - start < 5

    def test_long_conversations_are_in_bounds(self):
        messages = [{**ASK, "content": "word " * 1000}, {**SAY, "content": "word " * 1000}] * 500
        for name in ("default", "chatml", "llama 2", "llama 3", "gemma", "mistral", "qwen 3"):
            assert len(ChatTemplate(TEMPLATES[name], SPECIAL).render(messages)) > 4_000_000
        many = [{**ASK, "content": "?"}] * 20_000
        assert len(ChatTemplate(TEMPLATES["qwen 3"], SPECIAL).render(many)) > 500_000

    @pytest.mark.parametrize(
        "source, message",
        [
            ("{% for %}", "Expected an expression, got 'end of statement block' (line 1)"),
            ("\n{{ x", "unexpected end of template"),
            ("{{ raise_exception('roles\nmust alternate') }}", "applied: roles"),
            ("{{ nothing.at.all }}", "'nothing' is undefined"),
            ("{{ messages.append(1) }}", "unsafe"),
            ("{{ messages.__class__ }}{{ ''.__class__.__mro__ }}", "unsafe"),
            ("{{ dict.update(messages[0], {}) }}", "no attribute 'update'"),
            ("{{ namespace(_x=1) }}", "no '_x'"),
            ("{% include 'other' %}", "no loader"),
            ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "calls itself without end"),
        ],
    )
    def test_what_a_template_does_wrong_is_one_line(self, source, message):
        with pytest.raises(UserError) as error:
            ChatTemplate(source, {}, "runs/x").render([ASK])
        assert str(error.value).startswith("runs/x: the chat template ")
        assert message in str(error.value) and "\n" not in str(error.value)

    @pytest.mark.parametrize("messages", [[], ["text"], [None]])
    def test_what_is_no_list_of_messages_is_refused(self, messages):
        with pytest.raises(UserError, match="messages are a list of objects"):
            ChatTemplate(CHATML, {}).render(messages)

    def test_a_message_that_is_dropped_cannot_be_continued(self):
        with pytest.raises(UserError, match="drops the assistant's message"):
            ChatTemplate("{{ messages[0].content }}", {}).prompt([ASK, SAY])


def test_reading_a_tokenizer_imports_no_jinja2(tmp_path, small_tokenizer):
    import subprocess
    import sys

    small_tokenizer.save(tmp_path)
    settings = tmp_path / "tokenizer_config.json"
    document = json.loads(settings.read_text()) | {"chat_template": CHATML}
    settings.write_text(json.dumps(document))
    code = f"""import sys
from lmcli.text import chat_template, tokenizer
assert chat_template.chat_template(tokenizer.load({str(tmp_path)!r}).settings)
assert not {{"jinja2", "torch"}} & set(sys.modules), "imported"
"""
    subprocess.run([sys.executable, "-c", code], check=True)
