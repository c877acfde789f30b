"""Rows with messages → the assistant's last message, as the continuation of all before it."""

from collections.abc import Callable
from dataclasses import dataclass

from lmcli.data.schema import Row, row_messages, row_text
from lmcli.errors import UserError
from lmcli.text.chat_template import ChatTemplate


@dataclass
class MessageFields:
    """What `lm score` reads of a row: its text, or of one with messages (text, (prefix, "")).

    The last, empty text says that nothing comes between the two. Messages are in the one field of
    `names`, or else in `messages`. `find_template` raises UserError for a model without a chat
    template; `found` tells whether there were messages.
    """

    names: tuple[str, ...]
    find_template: Callable[[], ChatTemplate]
    found: bool = False

    def __call__(self, row: Row | str) -> tuple[str, tuple[str, ...]]:
        """Raises ValueError for a row without these fields, or messages that are refused."""
        name = self.names[0] if self.names else "messages"
        if isinstance(row, str) or len(self.names) > 1 or not isinstance(row.get(name), list):
            return row_text(row, self.names), ()
        messages, template = row_messages(row, name), self.find_template()
        self.found = True
        try:
            prefix, text = template.last_answer(messages)
        except UserError as error:
            raise ValueError(error.what) from error
        return text, (prefix, "")
