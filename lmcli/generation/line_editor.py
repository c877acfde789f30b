"""Messages typed with prompt_toolkit: several lines, completion, and readline's history."""

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import History
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.layout.processors import TabsProcessor


class ReadlineHistory(History):
    """Readline's lines; in it all lines of a message but the last end in a backslash."""

    def __init__(self, readline: Any):
        super().__init__()
        self.readline = readline  # None on Windows

    def load_history_strings(self) -> Iterable[str]:
        """The messages, the newest first."""
        count = self.readline.get_current_history_length() if self.readline else 0
        lines = (self.readline.get_history_item(i + 1) for i in range(count))
        texts = "\n".join(lines).replace("\\\n", "\0").split("\n")
        return [text.replace("\0", "\n") for text in reversed(texts) if text]

    def store_string(self, string: str) -> None:
        """Adds a message."""
        if self.readline:
            for line in string.replace("\0", "").replace("\n", "\\\n").split("\n"):
                self.readline.add_history(line)


class WordCompleter(Completer):
    """Completes with `words(line)`, a word → what it means; `line` goes up to the cursor."""

    def __init__(self, words: Callable[[str], Mapping[str, str]]):
        self.words = words

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
        """The words that begin with what is typed."""
        line = document.text_before_cursor
        typed = line.rpartition(" ")[2]
        for word, meaning in self.words(line).items():
            if word.startswith(typed):
                yield Completion(word, -len(typed), word.strip(), meaning)


class LineEditor:
    """Reads what a person types at the terminal.

    `stopped(typed)` is raised for Ctrl-C. Tab completes lines that begin with "/" with `words`.
    """

    def __init__(
        self,
        readline: Any,
        words: Callable[[str], Mapping[str, str]],
        stopped: Callable[[str], BaseException],
    ):
        # the answer of a slow terminal could come when the program has ended
        os.environ.setdefault("PROMPT_TOOLKIT_NO_CPR", "1")
        is_command = Condition(lambda: self.session.default_buffer.text.startswith("/"))
        keys = KeyBindings()
        keys.add("escape", "enter")(_insert("\n"))
        # Ctrl-J stays what sends a message: the terminal sends it for Enter while a text is written
        keys.add("tab", filter=~is_command)(_insert("\t"))
        self.session: PromptSession[str] = PromptSession(
            history=ReadlineHistory(readline),
            completer=WordCompleter(words),
            complete_while_typing=is_command,
            key_bindings=keys,
            prompt_continuation=lambda width, line, wraps: "" if wraps else "... ",
            input_processors=[TabsProcessor(char1=" ", char2=" ")],
            enable_suspend=True,
            interrupt_exception=lambda: stopped(self.session.default_buffer.text),  # type: ignore[arg-type]
        )

    def read(self, prompt: str) -> str:
        """The next message. Raises UnicodeError for invalid UTF-8, EOFError for Ctrl-D."""
        text = self.session.prompt(prompt)
        text.encode()  # an invalid byte is half a surrogate pair in it
        return text


def _insert(text: str) -> Callable[[KeyPressEvent], None]:
    return lambda event: event.current_buffer.insert_text(text)
