"""`lm generate` at a terminal: a conversation, or prompts that are continued one by one.

Ctrl-C stops a text; a second one at the empty prompt ends the loop, and so does Ctrl-D. Lines that
begin with / are commands; HELP has them. prompt_toolkit reads the lines, or readline without it.
"""

import os
import re
import select
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any, TextIO

from lmcli import storage
from lmcli.data.output_file import json_line
from lmcli.errors import UserError
from lmcli.generation.batch_generation import speed, stream_one
from lmcli.generation.chat import Chat
from lmcli.generation.decoding import slid
from lmcli.generation.prompts import slid_note
from lmcli.terminal.wrapping import WordWrap, columns_of, message_for, wrap
from lmcli.text.characters import DIM, PLAIN, for_stream, shows_color, visible, without_surrogates
from lmcli.text.chat_template import ASSISTANT, Message

try:
    import readline
except ImportError:  # Windows
    readline = None  # type: ignore[assignment]

HELP = r'''/reset             forget what was said
/save FILE         add it to FILE as JSON Lines, which lm train reads
/set NAME VALUE    change an option: /set temperature 0.5; /set alone shows them
/help              show this; // at the start of a line stands for /
A line that ends in \ continues in the next one. """ begins and ends several lines.
With prompt_toolkit Alt-Enter begins a new line, and Tab completes commands.
Ctrl-C stops a text, and ends when pressed again; so does Ctrl-D.'''
HELP_INDENT = 19
HISTORY_LINES = 1000
HISTORY_FILE = "generate_history"
TEXT_COLOR = "\x1b[36m"


class StopText(KeyboardInterrupt):
    """Ctrl-C, unlike SIGTERM and SIGHUP: it stops a text, not the program; `typed` is the line."""

    def __init__(self, typed: str = ""):
        self.typed = typed


@dataclass
class Session:
    """What was said, and how the next text is generated.

    `options` are those of `model.decoder`. With a `chat` all texts are one conversation; without,
    each prompt is continued by itself.
    """

    model: Any
    chat: Chat | None
    options: dict[str, Any]
    stop: tuple[str, ...]
    bos: bool | None
    seed: int
    note: Callable[[str], None]
    messages: list[Message] = field(default_factory=list)
    first: int = 0  # the oldest message that still fits into the context
    noted: bool = False  # that a text outgrew the context

    def decoder(self, **options: Any) -> Any:
        """What generates the next text; raises UserError for options that it does not take."""
        return self.model.decoder(self.stop, self.bos, **{**self.options, **options})

    def answer(self, text: str) -> Generator[str, None, None]:
        """Yields the pieces of the text that follows; it is kept, also if it is stopped."""
        decoder = self.decoder()
        if self.chat:
            ids, limit = self._fitted(decoder.config.max_new_tokens, text)
            decoder = self.decoder(max_new_tokens=limit)
        else:
            ids = decoder.fit(self.model.prompt(text, self.bos))
        pieces: list[str] = []
        try:
            for chunk in stream_one(decoder, ids, self.seed):
                if chunk.result:
                    self.model.checked(chunk.result, "the text")
                    if not self.noted and slid(self.model.config, ids, chunk.result):
                        self.note(slid_note(1, self.model.context))
                        self.noted = True
                pieces.append(chunk.text)
                yield chunk.text
        except UserError:
            pieces.clear()
            raise
        finally:  # the caller may have stopped
            self.seed += 1
            if pieces:
                said = (("user", text), (ASSISTANT, "".join(pieces)))
                self.messages += [{"role": role, "content": content} for role, content in said]

    def _fitted(self, limit: int, text: str) -> tuple[list[int], int]:
        """The ids of the conversation with a new message, and the most tokens of its answer.

        The oldest turns are left out until the answer has room. Raises UserError if the message
        itself is too long.
        """
        assert self.chat is not None
        context = self.model.context
        room, noted = min(limit, context // 4), self.first
        while True:
            messages = [*self.messages[self.first :], {"role": "user", "content": text}]
            ids = self.chat.encode(messages).ids
            if len(ids) + room <= context or len(messages) == 1:
                break
            self.first += 2
        if self.first and not noted:
            self.note(f"more than the context of {context:,} tokens: the oldest turns are left out")
        if len(ids) >= context:
            over = len(ids) - context + 1
            raise UserError(f"the message is {over:,} tokens longer than the context allows")
        return ids, min(limit, context - len(ids))

    def reset(self) -> None:
        """Forgets what was said."""
        self.messages, self.first = [], 0

    def save(self, name: str) -> str:
        """Adds what was said to a file, and returns what was done. Raises UserError."""
        if not self.messages:
            raise UserError("nothing was said yet")
        if not name:
            raise UserError("/save needs the name of a file")
        messages, rows = self.messages, []
        if self.chat:
            start = [] if self.chat.system is None else [_system(self.chat.system)]
            rows.append({"messages": [*start, *messages]})
        else:
            texts = [message["content"] for message in messages]
            pairs = zip(texts[::2], texts[1::2])
            rows += [{"prompt": prompt, "completion": text} for prompt, text in pairs]
        path = Path(name).expanduser()
        with storage.user_errors(path, "write"), open(path, "a", encoding="utf-8") as file:
            file.writelines(map(json_line, rows))
        return f"{len(rows)} {'line' if len(rows) == 1 else 'lines'} added to {path}"

    def set(self, name: str, value: str) -> str:
        """Changes an option, and returns what the options are. Raises UserError."""
        name = name.replace("-", "_")
        if name == "system":
            if self.chat is None:
                raise UserError("there is no conversation that a system message could begin")
            self.chat.system = value or None
        elif name == "seed":
            if not value.isdecimal():
                raise UserError(f"seed: {value!r} is no whole number")
            self.seed = int(value)
        elif name:
            if name not in self.options:
                known = ", ".join(self.settings())
                raise UserError(f"{name} is no option", hint=f"known: {known}")
            self.decoder(**{name: value or None})
            self.options[name] = value or None
        values = self.settings().items()
        shown = {n: "none" if value in (None, "", ()) else value for n, value in values}
        return ", ".join(f"{n} {value}" for n, value in shown.items() if n == name or not name)

    def settings(self) -> dict[str, Any]:
        """The options that `set` changes, and their values."""
        config = self.decoder().config
        values = {name: getattr(config, name) for name in self.options} | {"seed": self.seed}
        return {**values, "system": self.chat.system if self.chat else None}

    def words(self, line: str) -> dict[str, str]:
        """The words that may come next in a command's line, and what they mean."""
        name, space, rest = line.partition(" ")
        if not space:
            commands = re.findall(r"^(/\w+)(.*?) {3,}([^,:;\n]+)", HELP, re.MULTILINE)
            return {word + " " * bool(more): meaning for word, more, meaning in commands}
        if name != "/set" or " " in rest:
            return {}
        values = self.settings().items()
        return {f"{option} ": visible(str(value), keep="") for option, value in values}

    def run(self, line: str) -> str:
        """Runs a command, and returns what it tells the user. Raises UserError."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/save":
            return self.save(rest)
        if name == "/set":
            option, _, value = rest.replace("=", " ", 1).partition(" ")
            return self.set(option, value.strip())
        if name == "/reset" and not rest:
            self.reset()
            return "forgotten"
        if name == "/help" and not rest:
            columns = columns_of(sys.stderr)
            indents = [HELP_INDENT * line.startswith("/") for line in HELP.split("\n")]
            return "\n".join(map(wrap, HELP.split("\n"), repeat(columns), indents))
        raise UserError(f"{name} is no command", hint="/help shows them")


def _system(text: str) -> Message:
    return {"role": "system", "content": text}


class Terminal:
    """Lines from a user, with editing and history at a terminal; texts and figures to them."""

    def __init__(self, quiet: bool, words: Callable[[str], dict[str, str]]):
        self.quiet, self.edits = quiet, sys.stdin.isatty() and sys.stdout.isatty()
        self.editor = _editor(words) if self.edits else None
        self.text_color = TEXT_COLOR if shows_color(sys.stdout) else ""
        columns = partial(columns_of, sys.stdout)
        self._wrap = WordWrap(columns) if sys.stdout.isatty() else None
        self.dim = DIM if shows_color(sys.stderr) else ""

    def message(self) -> str:
        """The user's next message or command, which may have several lines. Raises EOFError."""
        self.begun = False  # a message of several lines
        line = self._line(">>> ")
        self.begun = True
        if line.startswith('"""'):
            lines, rest = [], line[3:]
            while '"""' not in rest:
                lines.append(rest)
                rest = self._line("... ")
            return "\n".join([*lines, rest[: rest.index('"""')]])
        while line.endswith("\\"):
            line = f"{line[:-1]}\n{self._line('... ')}"
        return line

    def _line(self, prompt: str) -> str:
        if not self.edits and sys.stdin.isatty():  # standard output has only texts
            print(prompt, end="", file=sys.stderr, flush=True)
        try:
            if self.editor and not _line_waits():
                return without_surrogates(self.editor.read(prompt))
            return without_surrogates(input(prompt if self.edits else ""))
        except ValueError as error:
            raise UserError("invalid UTF-8 in this line") from error

    def end_prompt(self, stream: TextIO) -> None:
        """Ends the line of a prompt that the user left; prompt_toolkit has done so itself."""
        if not self.editor:
            print(file=stream)

    def text(self, piece: str) -> None:
        """Writes a piece of a generated text."""
        if piece:
            shown = for_stream(piece, sys.stdout)
            self._write(f"{self.text_color}{shown}{PLAIN}" if self.text_color else shown)

    def end_text(self, ended: bool) -> None:
        """Ends the line of a text; `ended` if it has done so itself."""
        self._write("" if ended else "\n")

    def _write(self, text: str) -> None:
        sys.stdout.write(self._wrap.push(text) if self._wrap else text)
        sys.stdout.flush()

    def figures(self, tokens: int, first: float, seconds: float) -> None:
        """Writes how fast a text came, the first token after `first` seconds, to a person."""
        if sys.stderr.isatty() and not self.quiet:
            line = speed(1, tokens, first, seconds)
            print(f"{self.dim}{line}{PLAIN if self.dim else ''}", file=sys.stderr)

    def note(self, text: str) -> None:
        """Writes what a command tells the user, or what is wrong."""
        print(message_for(sys.stderr, text), file=sys.stderr)


def _editor(words: Callable[[str], dict[str, str]]) -> Any:
    """What reads the lines; None without prompt_toolkit, and on a terminal that cannot draw."""
    if os.environ.get("TERM", "").lower() in ("dumb", "unknown"):
        return None
    try:
        from lmcli.generation.line_editor import LineEditor
    except ImportError:
        return None
    return LineEditor(readline, words, StopText)


def _line_waits() -> bool:
    """True if a line was typed before the prompt was there: its end is no key that begins one."""
    return os.name == "posix" and bool(select.select([sys.stdin], [], [], 0)[0])


def talk(session: Session, quiet: bool) -> None:
    """Reads messages and writes answers until the user ends it."""
    terminal = Terminal(quiet, session.words)
    interrupted = False  # by the last key
    with _stopping(), _history(terminal.edits):
        while True:
            try:
                line = terminal.message()
                interrupted = False
                if line.startswith("/") and not line.startswith("//"):
                    terminal.note(session.run(line))
                elif line.strip():
                    line = line[1:] if line.startswith("/") else line
                    interrupted = _answer(session, terminal, line)
            except EOFError:
                if terminal.edits:
                    terminal.end_prompt(sys.stdout)
                return
            except StopText as stop:
                terminal.end_prompt(sys.stderr)
                if interrupted and not (stop.typed or terminal.begun):
                    return
                terminal.note("Ctrl-C again, or Ctrl-D, ends")
                interrupted = True
            except UserError as error:
                terminal.note(f"error: {error}")


def _answer(session: Session, terminal: Terminal, text: str) -> bool:
    """Writes the answer to a message while it is generated; true if Ctrl-C stopped it."""
    start, first, tokens, last, stopped = time.perf_counter(), 0.0, 0, "", False
    try:
        with closing(session.answer(text)) as pieces:
            for piece in pieces:
                tokens += 1
                first = first or time.perf_counter() - start
                terminal.text(piece)
                last = piece[-1:] or last
    except StopText:
        stopped = True
    finally:
        if tokens or stopped:
            terminal.end_text(last == "\n")
    if tokens:
        terminal.figures(tokens, first, time.perf_counter() - start)
    return stopped


@contextmanager
def _stopping() -> Iterator[None]:
    """Ctrl-C raises StopText in the block."""

    def stop(number: int, frame: object) -> None:
        raise StopText(readline.get_line_buffer() if readline else "")

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _history(edits: bool) -> Iterator[None]:
    """Editing of lines, with those of earlier sessions, which a private file in the cache keeps."""
    if readline is None or not edits:
        yield
        return
    readline.parse_and_bind("tab: tab-insert")
    readline.set_history_length(HISTORY_LINES)
    file = storage.cache_folder() / HISTORY_FILE
    with suppress(OSError):
        readline.read_history_file(file)
    try:
        yield
    finally:
        with suppress(OSError, UserError), storage.atomic_path(file, private=True) as unfinished:
            readline.write_history_file(unfinished)
