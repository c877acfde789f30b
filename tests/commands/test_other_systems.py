"""The main job on a system without fcntl, resource, user ids, signals of Unix, and /proc.

The libraries under `lm` are made for the system of the test and are imported first. What this
shows is that `lm` itself asks for nothing that Windows or macOS lacks; it is no run on either.
"""

import subprocess
import sys

import pytest

from lmcli.kernels import build

PROGRAM = """
import builtins, io, json, os, signal, sys
import click, multiprocessing.connection, numpy, rich.console, safetensors.torch, tempfile
import tokenizers, torch, yaml

for name in [name for name in sys.modules if name.split(".")[0] == "filelock"]:
    del sys.modules[name]  # it then takes what it takes where there is no fcntl
for name in ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "readline"):
    sys.modules[name] = None
for module, names in (
    (os, "sysconf sched_getaffinity fork geteuid getuid getgid O_NOFOLLOW O_NONBLOCK O_CLOEXEC"),
    (os, "O_DIRECTORY fchmod mkfifo killpg setsid getpgid uname posix_fadvise openpty getloadavg"),
    (signal, "SIGHUP SIGALRM SIGUSR1 SIGUSR2 SIGKILL SIGPIPE SIGWINCH SIGCONT SIGTSTP SIGQUIT"),
    (signal, "SIGCHLD setitimer pause pthread_kill"),
):
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
original = builtins.open


def no_system_files(file, *arguments, **options):
    if str(file).startswith(("/proc", "/sys")):
        raise FileNotFoundError(2, "No such file or directory", str(file))
    return original(file, *arguments, **options)


builtins.open = io.open = no_system_files
from lmcli.commands import run

text, folder = sys.argv[1:]
small = ("model.hidden_size=32", "model.num_hidden_layers=1", "tokenizer.vocab_size=260")
sets = [word for setting in small for word in ("--set", setting)]
for command in (
    ["train", text, "--preset", "tiny", "--steps", "2", "-o", folder, *sets, "--threads", "1"],
    ["train", "--resume", folder, "--allow-changes", "--set", "train.steps=3", "--threads", "1"],
    ["generate", "-m", folder, "-n", "3", "Once", "--threads", "1"],
    ["score", "-m", folder, text, "-o", f"{folder}.tsv", "--threads", "1"],
    ["perplexity", "-m", folder, text, "--threads", "1"],
    ["tokenize", "-m", folder, text, "-o", f"{folder}.ids"],
    ["info", folder],
):
    assert run(command) == 0, command
from filelock import FileLock, SoftFileLock

assert FileLock is SoftFileLock
from lmcli.runs.run_folder import Lock

held = Lock(__import__("pathlib").Path(folder))
try:
    Lock(held.path.parent)
except Exception as error:
    assert "is training in this folder" in str(error)
else:
    raise AssertionError("two locks")
held.release()
assert not held.path.exists() and not held.problem
"""


@pytest.fixture
def compiler(tmp_path) -> dict[str, str]:
    """CC, which has compiled the kernels before: a system without /proc compiles its own."""
    if not build.library():
        return {}
    program = tmp_path / "compiler"
    program.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit\nwhile [ "$1" != -o ]; do shift; done\n'
        f'cp "{build._library_file()}" "$2"\n'
    )
    program.chmod(0o755)
    return {"CC": str(program)}


def test_the_main_job(tmp_path, environment, compiler):
    text, folder = tmp_path / "a.txt", tmp_path / "run"
    text.write_text("one two three\n" * 30)
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", PROGRAM, text, folder],
        capture_output=True,
        text=True,
        env={**environment, **compiler},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert len((tmp_path / "run.tsv").read_text().splitlines()) == 31
    assert (tmp_path / "run.ids").read_text().count("\n") == 30
