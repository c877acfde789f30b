"""Messages → prompts, written in a model's chat template."""

from collections.abc import Sequence
from typing import NamedTuple

from lmcli.text.chat_template import ASSISTANT, Message, require_template
from lmcli.text.tokenizer import Tokenizer


class ChatPrompt(NamedTuple):
    """The text that the assistant's answer continues, and its ids, special tokens included."""

    text: str
    ids: list[int]


class Chat:
    """Writes prompts in the chat template of a model that is called `name`.

    `system` is put first into messages that begin with no system message. Raises UserError if the
    model has no chat template.
    """

    def __init__(self, tokenizer: Tokenizer, name: str, system: str | None = None):
        template = require_template(tokenizer.settings, name)
        self.tokenizer, self.template, self.system = tokenizer, template, system

    def encode(self, messages: Sequence[Message]) -> ChatPrompt:
        """The prompt of messages; raises UserError if the template refuses them."""
        if self.system is not None and (not messages or messages[0].get("role") != "system"):
            messages = [{"role": "system", "content": self.system}, *messages]
        text = self.template.prompt(messages)
        return ChatPrompt(text, self.tokenizer.encode(text))

    def encode_user(self, text: str) -> ChatPrompt:
        """The prompt of a user's message."""
        return self.encode([{"role": "user", "content": text}])


def without_answer(messages: Sequence[Message]) -> Sequence[Message]:
    """Messages without the assistant's last one, which is the target of a row.

    It stays if it has `"prefix": true`: then it is the beginning of an answer.
    """
    last = messages[-1] if messages else {}
    is_answer = last.get("role") == ASSISTANT and last.get("prefix") is not True
    return messages[:-1] if is_answer else messages
