"""Scripts that let a shell complete `lm`, and their installation; errors there are silent."""

import os
import re
import shlex
from pathlib import Path

from lmcli import storage
from lmcli.errors import UsageError, UserError

# A word that ends so is followed by no space: more of it is to be typed.
OPEN_ENDS = ("=", "/", ".")
# Bash parts words at = and : too, so that it is given the whole line. A "file" or "dir" is left to
# the shell. %(…)s are those of click.
BASH_SCRIPT = """\
%(complete_func)s() {
    local response offer
    response=$(env COMP_LINE="${COMP_LINE:0:COMP_POINT}" COMP_WORDS="${COMP_WORDS[*]}" \\
        COMP_BREAKS="$COMP_WORDBREAKS" %(complete_var)s=bash_complete "$1" 2>/dev/null)
    COMPREPLY=()
    while IFS= read -r offer; do
        case "$offer" in
            dir,*) compopt -o dirnames ;;
            file,*) compopt -o default ;;
            open,*) compopt -o nospace; COMPREPLY+=("${offer#*,}") ;;
            plain,*) COMPREPLY+=("${offer#*,}") ;;
        esac
    done <<< "$response"
}

complete -o nosort -F %(complete_func)s %(prog_name)s
"""
ZSH_SCRIPT = """\
#compdef %(prog_name)s

%(complete_func)s() {
    local -a words_ open_ described open_described response
    (( ! $+commands[%(prog_name)s] )) && return 1
    response=("${(@f)$(env COMP_WORDS="${words[*]}" COMP_CWORD=$((CURRENT-1)) \\
        %(complete_var)s=zsh_complete %(prog_name)s 2>/dev/null)}")
    for type key descr in ${response}; do
        case "$type$descr" in
            dir*) _path_files -/ ;;
            file*) _path_files -f ;;
            plain_) words_+=("$key") ;;
            open_) open_+=("$key") ;;
            plain*) described+=("$key:$descr") ;;
            open*) open_described+=("$key:$descr") ;;
        esac
    done
    (( $#described )) && _describe -V unsorted described -U
    (( $#open_described )) && _describe -V unsorted open_described -U -S ''
    (( $#words_ )) && compadd -U -V unsorted -a words_
    (( $#open_ )) && compadd -U -V unsorted -S '' -a open_
    return 0
}

if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    %(complete_func)s "$@"
else
    (( $+functions[compdef] )) || { autoload -Uz compinit && compinit; }
    compdef %(complete_func)s %(prog_name)s
fi
"""
FISH_SCRIPT = """\
function %(complete_func)s
    set -l response (env %(complete_var)s=fish_complete COMP_WORDS=(commandline -cp) \\
        COMP_CWORD=(commandline -t) %(prog_name)s 2>/dev/null)
    for offer in $response
        set -l parts (string split -m 1 "," $offer)
        switch $parts[1]
            case dir
                __fish_complete_directories $parts[2]
            case file
                __fish_complete_path $parts[2]
            case '*'
                echo $parts[2]
        end
    end
end

complete --no-files --command %(prog_name)s --arguments "(%(complete_func)s)"
"""
SCRIPTS = {"bash": BASH_SCRIPT, "zsh": ZSH_SCRIPT, "fish": FISH_SCRIPT}
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
