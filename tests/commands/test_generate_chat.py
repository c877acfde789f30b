"""`lm generate` with messages, and its loop at a terminal, through the command line."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

HI = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No"}]'


class TestPrompts:
    def test_arguments_lines_and_rows_are_one_prompt(self, inside, chat_model):
        """All write what transformers' template gives; the fields of a row travel along."""
        from transformers import AutoTokenizer

        messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}]
        tokenizer = AutoTokenizer.from_pretrained(chat_model)
        options = {"tokenize": False, "add_generation_prompt": True}
        expected = tokenizer.apply_chat_template(messages, **options)
        chat = ("generate", "-m", chat_model, "--json", "--system", "S")
        calls = (
            inside(*chat, "Hi"),
            inside(*chat, stdin=b"Hi\n"),
            inside(*chat, "--whole", stdin=b"Hi"),
            inside(*chat, "--format", "jsonl", stdin=f'{HI}, "id": 7}}\n'.encode()),
            inside(*chat, "--format", "jsonl", stdin=b'{"prompt": "Hi", "id": 7}\n'),
        )
        rows = [json.loads(done.stdout) for done in calls]
        assert {row["prompt"] for row in rows} == {expected}
        assert len({tuple(row["tokens"]) for row in rows}) == 1 and rows[0]["tokens"]
        assert [row.get("id") for row in rows] == [None, None, None, 7, 7]
        assert rows[3]["messages"][1]["content"] == "No"

    def test_messages_need_no_option_and_echo_shows_the_prompt(self, inside, chat_model):
        call = ("generate", "-m", chat_model, "--format", "jsonl", "--echo")
        output = inside(*call, stdin=f"{HI}}}\n".encode()).stdout.decode()
        assert output.startswith("<|endoftext|><|user|>\\nHi\\n<|assistant|>\\n")

    def test_other_formats_and_fields(self, inside, chat_model):
        call = ("generate", "-m", chat_model, "--json", "-n", 1)
        table = inside(*call, "--format", "tsv", "--field", "b", stdin=b"a\tb\nx\ty\n")
        assert [json.loads(table.stdout)[name] for name in ("a", "b", "prompt")] == ["x", "y", "y"]

    @pytest.mark.parametrize("how, count", [("blank", 3), ("skip", 2)])
    def test_bad_rows(self, inside, chat_model, how, count):
        rows = f'{HI}}}\n{{"messages": []}}\n{HI}}}\n'.encode()
        call = ("generate", "-m", chat_model, "--format", "jsonl", "-n", 1)
        done = inside(*call, stdin=rows)
        assert done.returncode == 1
        assert b"standard input, line 2: field 'messages' is no list of messages" in done.stderr
        done = inside(*call, "--on-error", how, stdin=rows)
        assert done.returncode == 0 and done.stdout.count(b"\n") == count

    def test_a_template_that_refuses_a_row_is_an_error_of_its_line(
        self, inside, chat_model, tmp_path, small_tokenizer
    ):
        import shutil

        shutil.copytree(chat_model, tmp_path / "strict")
        refusing = "{% if messages[0].content == 'Hi' %}{{ raise_exception('no Hi') }}{% endif %}ok"
        (tmp_path / "strict" / "chat_template.jinja").write_text(refusing)
        rows = b"Ho\nHi\n"
        done = inside("generate", "-m", tmp_path / "strict", "--chat", "-n", 1, stdin=rows)
        assert (done.returncode, done.stderr.decode().strip()) == (
            1,
            "lm: error: standard input, line 2: the chat template cannot be applied: no Hi",
        )

    @pytest.mark.parametrize("arguments", [("--chat", "Hi"), ("--system", "S", "Hi"), ("rows",)])
    def test_a_model_without_a_template_is_refused(self, inside, trained, arguments):
        arguments = ("--format", "jsonl") if arguments == ("rows",) else arguments
        done = inside("generate", "-m", trained[0], *arguments, stdin=f"{HI}}}\n".encode())
        assert done.returncode == 1 and done.stdout == b""
        assert f"{trained[0]}: has no chat template" in done.stderr.decode()

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (("-i", "Hi"), "-i and PROMPT exclude each other"),
            (("-i", "--json"), "-i and --json exclude"),
            (("--system", "S", "--no-chat", "Hi"), "--system and --no-chat exclude"),
            (("--format", "jsonl", "Hi"), "--format and PROMPT exclude"),
            (("--format", "jsonl", "--whole"), "--format and --whole exclude"),
            (("--field", "a", "-0"), "--field and -0 exclude"),
        ],
    )
    def test_what_does_not_go_together(self, inside, chat_model, arguments, message):
        done = inside("generate", "-m", chat_model, *arguments)
        assert done.returncode == 2 and message in done.stderr.decode()


class Screen:
    """`lm` in a terminal of its own."""

    def __init__(self, environment, *arguments):
        self.end, other = pty.openpty()
        command = [sys.executable, "-m", "lmcli", "generate", "-i", *map(str, arguments)]
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), other)
        self.process = subprocess.Popen(
            command,
            env={**environment, "TERM": "xterm"},
            start_new_session=True,
            **streams,
            preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
        )
        os.close(other)
        self.shown = ""

    def type(self, text: str) -> None:
        if text == "\x03":
            # Python's readline misses a signal just after it drew a key, until the next key
            time.sleep(0.3)
        os.write(self.end, text.encode())

    def wait_for(self, pattern: str, seconds: float = 60) -> str:
        """What was shown up to the end of the pattern; it is not shown again."""
        limit = time.monotonic() + seconds
        while not (match := re.search(pattern, self.shown, re.DOTALL)):
            assert time.monotonic() < limit, self.shown
            if select.select([self.end], [], [], 1)[0]:
                try:
                    self.shown += os.read(self.end, 1 << 16).decode(errors="replace")
                except OSError:  # Linux: the other end was closed
                    assert re.search(pattern, self.shown, re.DOTALL), self.shown
        before, self.shown = self.shown[: match.end()], self.shown[match.end() :]
        return before

    def ends(self) -> int:
        code = self.process.wait(60)
        os.close(self.end)
        return code


@pytest.fixture
def terminal(environment, inside, chat_model, tmp_path):
    """terminal(*arguments, **variables): a Screen with the model, whose kernels are compiled.

    There is no prompt_toolkit: readline reads the lines.
    """
    inside("generate", "-m", chat_model, "-n", 1, "Hi")
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "prompt_toolkit.py").write_text("raise ImportError")
    paths = [str(tmp_path / "hidden"), environment.get("PYTHONPATH", "")]

    def open_(*arguments, model=chat_model, **variables) -> Screen:
        options = ("--temperature", 1, "--threads", 1)
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        screen = Screen({**environment, **variables}, "-m", model, *options, *arguments)
        screen.wait_for(">>> ")
        return screen

    return open_


class TestLoop:
    def test_ctrl_c_stops_the_text_and_ctrl_d_ends(self, environment, terminal, tmp_path):
        screen = terminal("-n", 8000, "--min-new-tokens", 8000)  # the text ends by Ctrl-C alone
        screen.type("Hello\n")
        screen.wait_for("(\x1b\\[36m.*){4}")  # the text in its color
        screen.type("\x03")
        screen.wait_for(r"\d+ tokens, [\d,.]+ tokens/s, the first after [\d.]+ s.*>>> ")
        for setting in ("min_new_tokens", "max_new_tokens"):
            screen.type(f"/set {setting} 3\n")
            screen.wait_for(f"{setting} 3\r\n.*>>> ")
        screen.type("One\\\n")
        screen.wait_for(r"\.\.\. ")
        screen.type("two\n")
        screen.wait_for("3 tokens.*>>> ")
        screen.type(f"/save {tmp_path}/saved.jsonl\n")
        screen.wait_for("1 line added.*>>> ")
        # none of these is an empty prompt
        for line, shown in (("half", "half"), ("again", "again"), ('"""\nsome\n', "some.*[.] ")):
            screen.type(line)
            screen.wait_for(shown)
            screen.type("\x03")
            screen.wait_for("Ctrl-C again, or Ctrl-D, ends.*>>> ")
        screen.type("\x04")
        assert screen.ends() == 0
        messages = json.loads((tmp_path / "saved.jsonl").read_text())["messages"]
        assert [message["content"] for message in messages[::2]] == ["Hello", "One\ntwo"]
        history = Path(environment["LM_CACHE"]) / "generate_history"
        assert history.stat().st_mode & 0o777 == 0o600
        assert "Hello" in history.read_text().splitlines()

    def test_a_second_ctrl_c_ends_and_no_control_character_is_sent(
        self, terminal, chat_model, tmp_path
    ):
        import shutil

        shutil.copytree(chat_model, tmp_path / "evil")
        evil = "{{ raise_exception('\x1b]0;title\x07') }}"
        (tmp_path / "evil" / "chat_template.jinja").write_text(evil)
        screen = terminal(model=tmp_path / "evil", NO_COLOR="1")
        screen.type("Hi\n")
        assert "\x1b]0" not in screen.wait_for(r"error:\s.*␛]0;title␇.*>>> ")
        screen.type("\x03")
        screen.wait_for("Ctrl-C again.*>>> ")
        screen.type("\x03")
        assert screen.ends() == 0

    def test_sigterm_ends_it(self, terminal):
        screen = terminal("-n", 8000, "--min-new-tokens", 8000)
        screen.type("Hello\n")
        screen.wait_for("\x1b\\[36m")
        screen.process.send_signal(signal.SIGTERM)
        assert screen.ends() == 130

    def test_lines_from_a_pipe_give_texts_alone(self, inside, chat_model):
        lines = b"Hi\n/set max_new_tokens 2\n\n//x\n/nothing\n"
        done = inside("generate", "-m", chat_model, "-i", "-q", stdin=lines)
        assert done.returncode == 0 and b"/nothing is no command" in done.stderr
        assert b">>>" not in done.stdout and b"\x1b" not in done.stdout
        whole = inside("generate", "-m", chat_model, "--chat", "Hi").stdout
        assert whole.strip() and done.stdout.startswith(whole)

    def test_invalid_utf_8_is_an_error_of_its_line(self, inside, chat_model):
        done = inside("generate", "-m", chat_model, "-i", "-q", stdin=b"\xff\xfe\n")
        assert done.returncode == 0 and b"error: invalid UTF-8" in done.stderr
