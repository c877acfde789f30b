"""Chat templates: messages → the text that a model was trained on, as transformers renders it.

A model brings a template in `chat_template` of tokenizer_config.json or in chat_template.jinja
(which goes first); DEFAULT_TEMPLATE is for one that brings none. A template begins a text with all
the special tokens that it needs. Special tokens that a message spells out are read as such, as
transformers does by default.
"""

import re
from collections.abc import Sequence
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from lmcli.errors import UserError
from lmcli.storage import user_errors
from lmcli.text.characters import byte_offsets

Message = dict[str, Any]

ASSISTANT = "assistant"
# Plain text and the two tokens that any of our decoders has. Only the assistant's messages end in
# EOS, so that a text ends where the assistant does, here and elsewhere, without stop strings. No
# {% generation %}: llama.cpp and older programs do not know it.
MARKED_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|' + message['role'] + '|>\\n' }}
    {%- generation %}
    {%- if message['content'] is string %}
        {{- message['content'] }}
    {%- else %}
        {{- message['content'] | map(attribute='text') | join }}
    {%- endif %}
    {%- if message['role'] == 'assistant' %}
        {{- eos_token }}
    {%- endif %}
    {%- endgeneration %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\\n' }}
{%- endif %}
"""
DEFAULT_TEMPLATE = re.sub(r"    {%- (end)?generation %}\n", "", MARKED_TEMPLATE)
GENERATION_BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# names under which a message may hold the model's reasoning; templates read the first
REASONING = ("reasoning_content", "thinking", "reasoning")
CONTINUED = "CONTINUED HERE "  # marks the end of a message that is to be continued


class AssistantSpan(NamedTuple):
    """Characters `start` to `end` of a text that the assistant says; its content ends before.

    From `content_end` on there is what closes the message, such as <|im_end|>.
    """

    start: int
    content_end: int
    end: int


class ChatTemplate:
    """A chat template with the special tokens that it may use; `where` is its model in errors."""

    def __init__(self, source: str, special: dict[str, str], where: str = "the model"):
        self.source, self.special, self.where = source, special, where

    @cached_property
    def _compiled(self) -> Any:
        return self._compile(self.source)

    @cached_property
    def _marked_default(self) -> Any:
        return self._compile(MARKED_TEMPLATE)

    def _compile(self, source: str) -> Any:
        from lmcli.text.template_sandbox import Sandbox

        sandbox = Sandbox()
        return sandbox, self._run(lambda: sandbox.template(source))

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The text of messages, with the start of an answer if that is asked for.

        Raises UserError for messages that the template refuses, and for a template that is broken,
        or does not end within TooMuchWork's bounds.
        """
        return self._render(messages, add_generation_prompt)[0]

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text that the assistant's answer continues, or its last message if it is the last.

        Raises UserError as `render`, and if the template drops the message to be continued.
        """
        last = messages[-1] if messages else {}
        content = last.get("content")
        if last.get("role") != ASSISTANT or not isinstance(content, str):
            return self.render(messages, add_generation_prompt=True)
        text = self.render([*messages[:-1], {**last, "content": content + CONTINUED}])
        at = text.rfind(CONTINUED.strip())
        if at < 0 or content.strip() not in text:
            raise self._error("drops the assistant's message, which is to be continued")
        is_trimmed = not text.startswith(CONTINUED, at)
        return text[:at].rstrip() if is_trimmed else text[:at]

    def text_and_spans(self, messages: Sequence[Message]) -> tuple[str, list[AssistantSpan]]:
        """The text of messages and what the assistant says in it.

        That is in the template's {% generation %} blocks; without any it is what the text has more
        after the assistant's message than before it. Raises UserError as `render`, and where the
        template does not show what the assistant says.
        """
        text, blocks = self._render(messages, marked=True)
        marked = bool(GENERATION_BLOCK.search(self.source))
        answers = [i for i, message in enumerate(messages) if message.get("role") == ASSISTANT]
        if self.source == DEFAULT_TEMPLATE:
            blocks = [blocks[i] for i in answers]
        elif not marked:
            blocks = []
            for i in answers:
                blocks.append(self._block(text, messages, i, blocks[-1][1] if blocks else 0))
        # the blocks of a template may be more or fewer than the assistant's messages
        contents = (
            [messages[i].get("content") for i in answers] if len(answers) == len(blocks) else ()
        )
        pairs = zip_longest(blocks, contents)
        return text, [_span(text, start, end, content, marked) for (start, end), content in pairs]

    def last_answer(self, messages: Sequence[Message]) -> tuple[str, str]:
        """(what precedes the assistant's last message, its text without what closes it).

        Raises UserError as `text_and_spans`, and if the assistant says nothing.
        """
        answers = [i for i, message in enumerate(messages) if message.get("role") == ASSISTANT]
        if not answers:
            raise UserError("there is no message of the assistant", where=self.where)
        text, spans = self.text_and_spans(messages[: answers[-1] + 1])
        if not spans:
            raise self._error("does not write what the assistant says")
        return text[: spans[-1].start], text[spans[-1].start : spans[-1].content_end]

    def _block(
        self, text: str, messages: Sequence[Message], i: int, earliest: int
    ) -> tuple[int, int]:
        """Where message `i` is, from `earliest` on, by comparing texts with and without it."""
        content = messages[i].get("content")
        content = content.strip() if isinstance(content, str) else ""
        start = text.find(content, earliest) if content else -1
        before = self.render(messages[:i], add_generation_prompt=True) if i else ""
        if i and text.startswith(before) and len(before) >= earliest:
            start = len(before)
        if start < 0:
            raise self._error(
                f"does not show what the assistant says in message {i + 1}",
                "put {% generation %} and {% endgeneration %} around it",
            )
        with_it = text if i == len(messages) - 1 else self.render(messages[: i + 1])
        if text.startswith(with_it):
            return start, len(with_it)
        # the last message is written in another way than one in the middle
        end = max(start, text.find(content, start)) + len(content)
        closing = with_it[with_it.rfind(content) + len(content) :]
        return start, end + (len(closing) if text.startswith(closing, end) else 0)

    def _render(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, marked: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        if not messages or not all(isinstance(message, dict) for message in messages):
            raise UserError("messages are a list of objects with role and content, at least one")
        is_default = marked and self.source == DEFAULT_TEMPLATE
        sandbox, template = self._marked_default if is_default else self._compiled
        values = {
            **self.special,
            "messages": [_without_nulls(message) for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        return self._run(lambda: sandbox.render(template, values))

    def _run(self, work: Any) -> Any:
        """The result of `work`; UserError for whatever a template raises."""
        try:
            return work()
        except (MemoryError, RecursionError) as error:
            raise self._error("takes too much memory or calls itself without end") from error
        except Exception as error:  # templates run into errors of any kind
            import jinja2

            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
            if isinstance(error, jinja2.TemplateSyntaxError):
                reason = f"{reason} (line {error.lineno})"
            raise self._error(f"cannot be applied: {reason}") from error

    def _error(self, what: str, hint: str | None = None) -> UserError:
        return UserError(f"the chat template {what}", where=self.where, hint=hint)


def _span(text: str, start: int, end: int, content: Any, marked: bool) -> AssistantSpan:
    """The span of a message; of one that is not marked, without white space behind its closing."""
    content_end = end
    if isinstance(content, str):
        stripped = content.strip()
        at = text.rfind(stripped, start, end) if stripped else start
        if at >= 0:
            content_end = at + len(stripped)
            space = content[len(content.rstrip()) :]  # kept by some templates
            content_end += len(space) if text.startswith(space, content_end, end) else 0
    closing = text[content_end:end]
    closing = closing if marked else closing.rstrip() or closing
    return AssistantSpan(start, content_end, content_end + len(closing))


def _without_nulls(message: Message) -> Message:
    """A message without keys that are null, its reasoning under the name that templates read."""
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[name] for name in REASONING if name in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, REASONING[0]: reasoning}


def chat_template(settings: dict[str, Any], where: str = "the model") -> ChatTemplate | None:
    """The chat template in a tokenizer's settings, or None; of several the one called default.

    Raises UserError if none of several has that name, and for a value that is no text.
    """
    source: Any = settings.get("chat_template")
    if isinstance(source, list):
        source = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
    if isinstance(source, dict):
        if "default" not in source:
            names = ", ".join(map(str, source)) or "none"
            raise UserError(f"has no chat template called default, but {names}", where=where)
        source = source["default"]
    if source is None:
        return None
    if not isinstance(source, str):
        raise UserError("chat_template is no text", where=where)
    return ChatTemplate(source, special_tokens(settings), where)


def require_template(settings: dict[str, Any], where: str) -> ChatTemplate:
    """The chat template in a tokenizer's settings; raises UserError if there is none."""
    template = chat_template(settings, where)
    if template is None:
        raise UserError(
            "has no chat template, which says how messages are written",
            where=where,
            hint="leave messages, --chat and --system out, or train it on messages",
        )
    return template


def default_template(settings: dict[str, Any], where: str = "the model") -> ChatTemplate:
    """DEFAULT_TEMPLATE with the special tokens in a tokenizer's settings."""
    return ChatTemplate(DEFAULT_TEMPLATE, special_tokens(settings), where)


def special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """The spelling of each special token that has a name, by which templates know it."""
    named = {name: value for name, value in settings.items() if name.endswith("_token")}
    extra = settings.get("extra_special_tokens")
    named |= extra if isinstance(extra, dict) else {}
    texts = {name: spelling(value) for name, value in named.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def spelling(token: Any) -> Any:
    """The text of a special token, which settings give as a text or as an object."""
    return token.get("content") if isinstance(token, dict) else token


def assistant_mask(
    text: str, assistant_spans: Sequence[AssistantSpan], ends: Sequence[int]
) -> list[bool]:
    """For each token of a text, whether it is (in part) what the assistant says.

    `ends` are the bytes where tokens end (Encoded.ends).
    """
    byte_at, mask, start = byte_offsets(text), [], 0
    ranges = [(byte_at[span.start], byte_at[span.end]) for span in assistant_spans]
    for end in ends:
        mask.append(any(first < end and start < last for first, last in ranges))
        start = end
    return mask


def read_files(folder: Path) -> dict[str, Any]:
    """{"chat_template": …} from a folder's template files; {} if it has none."""
    files = {"default": folder / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    templates = {}
    for name, file in files.items():
        if file.is_file():
            with user_errors(file, "read"):
                templates[name] = file.read_text(encoding="utf-8")
    if not templates:
        return {}
    only = templates.get("default") if len(templates) == 1 else None
    named = [{"name": name, "template": template} for name, template in templates.items()]
    return {"chat_template": named if only is None else only}
