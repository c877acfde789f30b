"""Scripts that let a shell complete `lm`, and their installation; errors there are silent."""

import os
import re
import shlex
from pathlib import Path

from lmcli import storage
from lmcli.errors import UsageError, UserError

# A word that ends so is followed by no space: more of it is to be typed.
OPEN_ENDS = ("=", "/", ".")
# A "file" or "dir" is left to the shell. %(…)s are those of click. Bash parts words at = and : too,
# so that lm is given the whole line.
SCRIPTS = {
    shell: Path(__file__).with_name(f"completion.{shell}").read_text(encoding="utf-8")
    for shell in ("bash", "zsh", "fish")
}
SPECIAL = re.compile(r"""([\s'"\\$&;()<>|*?`!#~\[\]{}])""")  # to a shell, in a word


def offer_type(kind: str, value: str) -> str:
    """How the scripts take an offer: dir, file, plain, or open if more of it is to be typed."""
    return "open" if kind == "plain" and value.endswith(OPEN_ENDS) else kind


def bash_offer(value: str, line: str, word: str, breaks: str) -> str:
    """An offer as Bash inserts it: quoted, without what stands before its last word break."""
    if word.startswith("--"):
        word = word.partition("=")[2]
    start = max((word.rfind(mark) for mark in "=:" if mark in breaks), default=-1) + 1
    value = value[start:] if value.startswith(word[:start]) else value
    typed = re.split(r"(?<!\\)\s", line)[-1]
    return value if typed[:1] in ("'", '"') else SPECIAL.sub(r"\\\1", value)


def default_shell() -> str:
    """The user's shell by $SHELL; UsageError if it is none of SCRIPTS."""
    name = os.path.basename(os.environ.get("SHELL", ""))
    if name not in SCRIPTS:
        raise UsageError(
            f"no completion for the shell {name!r}" if name else "SHELL is not set",
            where="--install-completion",
            hint=f"name one of {', '.join(SCRIPTS)}",
        )
    return name


def install(shell: str, script: str) -> list[str]:
    """Writes a shell's script, and lets its start-up file read it; returns what was done.

    The start-up file is appended to, once; nothing else in it changes. Raises UserError.
    """
    home = Path(os.path.expanduser("~"))
    if shell == "fish":  # reads it by itself
        config = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
        return _write_script(config / "fish" / "completions" / "lm.fish", script)
    data = Path(os.environ.get("XDG_DATA_HOME") or home / ".local" / "share")
    file = data / "lm" / f"completion.{shell}"
    done = _write_script(file, script)
    folder = Path(os.environ.get("ZDOTDIR") or home) if shell == "zsh" else home
    done.append(_source_from(folder / f".{shell}rc", file))
    return [*done, f"it works in new shells; in this one: source {shlex.quote(str(file))}"]


def _write_script(file: Path, script: str) -> list[str]:
    with storage.user_errors(file, "write"):
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_file() and file.read_text(encoding="utf-8", errors="replace") == script:
            return [f"{file}: is up to date"]
        storage.write_text(file, script)
    return [f"{file}: written"]


def _source_from(start_up: Path, script: Path) -> str:
    """Appends lines that read the script to a start-up file, unless it has them."""
    path = shlex.quote(str(script))
    line = f"if [ -r {path} ]; then . {path}; fi"
    try:
        before = start_up.read_bytes() if start_up.exists() else b""
        if line.encode() in before.splitlines():
            return f"{start_up}: reads it already"
        # a blank line ends what the last line may go on with
        text = f"\n# completion of lm, by lm --install-completion\n{line}\n"
        start_up.parent.mkdir(parents=True, exist_ok=True)
        with start_up.open("ab") as file:  # a link stays one
            file.write(b"\n" * bool(before and not before.endswith(b"\n")) + text.encode())
    except OSError as error:
        reason = f"cannot be changed: {error.strerror}"
        raise UserError(reason, where=str(start_up), hint=f"add this line to it: {line}") from error
    return f"{start_up}: 2 lines added"
