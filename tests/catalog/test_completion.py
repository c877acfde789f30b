"""Completion in Bash's, zsh's and fish's protocol, in-process; installation into start-up files."""

import os
import shutil
import subprocess
import sys

import pytest

from lmcli.catalog import completion, shells
from lmcli.commands import run
from lmcli.errors import UserError
from lmcli.recipes import preset_names


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with runs, a model, a table and rows; the Hub's cache has one model."""
    for name in ("runs/shake", "runs/hong", "my model", "empty"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("runs/shake", "runs/hong", "my model"):
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "runs/hong/state").mkdir()
    (tmp_path / "reviews.csv").write_text(
        'review,sentiment,"a, b"\ngood,1,\n', encoding="utf-8-sig"
    )
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "größe": 1}\n{"x": 1}\n')
    (tmp_path / "notes.txt").write_text("text\n")
    (tmp_path / "mine.yaml").write_text("")
    snapshot = tmp_path / "hub" / "models--bert--tiny" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("LM_MODEL", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def complete(folder, monkeypatch, capfd):
    """complete(line): what Bash is told for a line with the cursor at its end."""

    def call(line, after="") -> list[str]:
        monkeypatch.setenv("_LM_COMPLETE", "bash_complete")
        monkeypatch.setenv("COMP_LINE", line)
        monkeypatch.setenv("COMP_WORDS", line + after)
        monkeypatch.setenv("COMP_BREAKS", " \"'><=;|&(:")
        code = run([])
        out, err = capfd.readouterr()
        assert (code, err) == (0, "")
        return out.split("\n")[:-1] if out.strip() else []

    return call


@pytest.mark.parametrize(
    "line, offers",
    [
        ("lm tra", ["plain,train"]),
        ("lm train --pres", ["plain,--preset"]),
        ("lm train --preset tin", ["plain,tiny"]),
        ("lm train --preset=tin", ["plain,tiny"]),
        ("lm train --preset min", ["plain,mine.yaml"]),
        ("lm score -m runs/sh", ["plain,runs/shake"]),
        ("lm perplexity -m runs/shake -m runs/h", ["plain,runs/hong"]),
        ("lm train x --from bert", ["plain,bert/tiny"]),
        ("lm train --resume runs/", ["plain,runs/hong", "open,runs/shake/"]),
        ("lm score -m my", [r"plain,my\ model"]),
        ("lm score -m 'my", ["plain,my model"]),
        ("lm score -m emp", ["open,empty/"]),
        ("lm score -m /nowhere/x", []),
        ("lm info rev", ["plain,reviews.csv"]),
        ("lm train --set tr", ["open,train."]),
        ("lm train --set train.sched", ["open,train.schedule="]),
        ("lm train --set train.schedule=c", ["plain,cosine", "plain,constant"]),
        ("lm train --set=train.schedule=l", ["plain,linear"]),
        ("lm train --set model.gated_mlp=", ["plain,true", "plain,false"]),
        ("lm train --set train.learning_rate=", []),
        ("lm train reviews.csv --fields text=rev", ["plain,review"]),
        ("lm score reviews.csv --fields review,s", ["plain,review,sentiment"]),
        ("lm score reviews.csv --field se", ["plain,sentiment"]),
        ("lm perplexity rows.jsonl --by g", ["plain,größe"]),
        ("lm perplexity notes.txt --by g", []),
        ("lm help key", ["plain,keys"]),
        ("lm help gener", ["plain,generating", "plain,generate"]),
        ("lm help preset qa", ["plain,qa"]),
        ("lm help keys train.sched", ["plain,train.schedule"]),
        ("lm score --per w", ["plain,word"]),
        ("lm train ", ["file,"]),
        ("lm train --val no", ["file,no"]),
        ("lm train -o run", ["dir,run"]),
        ("lm train --no-such-option ", ["file,"]),
        ("lm generate 'an open quote ", []),
    ],
)
def test_words(complete, line, offers):
    assert complete(line) == offers


def test_all_presets_and_models_are_offered(complete):
    offers = complete("lm train --preset ")
    assert [offer.partition(",")[2] for offer in offers if "/" not in offer] == [
        *preset_names(),
        "mine.yaml",
    ]
    models = complete("lm score -m ")
    assert {"plain,runs/shake", "plain,runs/hong", "plain,bert/tiny"} < {*models}


def test_columns_come_from_a_file_that_follows_too(complete):
    assert complete("lm score --field ", " reviews.csv") == [
        "plain,review",
        "plain,sentiment",
        r"plain,a,\ b",
    ]


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe\x00a", b'{"a": ', b"[1]\n", b"\n\n", b'{"a": 1}' * 10**6]
)
def test_a_damaged_file_has_no_columns_and_no_message(complete, folder, content):
    for name in ("bad.jsonl", "bad.csv.gz"):
        (folder / name).write_bytes(content)
        assert complete(f"lm score {name} --field ") == []


def test_nothing_is_read_from_a_pipe(complete, folder):
    os.mkfifo(folder / "pipe.csv")
    assert complete("lm score pipe.csv --field ") == []


def test_zsh_and_fish_get_meanings(folder, monkeypatch, capfd):
    for shell, current in (("zsh", "3"), ("fish", "train.sched")):
        monkeypatch.setenv("_LM_COMPLETE", f"{shell}_complete")
        monkeypatch.setenv("COMP_WORDS", "lm train --set train.sched")
        monkeypatch.setenv("COMP_CWORD", current)
        assert run([]) == 0
    out, err = capfd.readouterr()
    meaning = "decay of the rate after warm-up"
    assert out == f"open\ntrain.schedule=\n{meaning}\nplain,train.schedule=\t{meaning}\n"
    assert err == ""


def test_an_error_is_silent(folder, monkeypatch, capfd):
    for variables in ({"_LM_COMPLETE": "zsh_complete"}, {"_LM_COMPLETE": "nothing"}):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("COMP_WORDS", raising=False)
        assert run([]) == 1
    monkeypatch.setattr(completion, "candidates", lambda *_: 1 / 0)
    monkeypatch.setenv("_LM_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_LINE", "lm train --preset t")
    assert run([]) == 0
    assert capfd.readouterr() == ("\n", "")


class TestInstallation:
    @pytest.fixture
    def home(self, tmp_path, monkeypatch):
        for name in ("XDG_DATA_HOME", "XDG_CONFIG_HOME", "ZDOTDIR"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HOME", str(tmp_path))
        return tmp_path

    @pytest.mark.parametrize("shell", ["bash", "zsh"])
    def test_it_is_said_what_was_written_and_twice_changes_nothing(self, home, shell, capsys):
        start_up = home / f".{shell}rc"
        start_up.write_bytes(b"export A=\xff \\")  # not UTF-8, and an unfinished line
        script = home / ".local/share/lm" / f"completion.{shell}"
        assert run(["--install-completion", shell]) == 0
        written = start_up.read_bytes()
        assert written.startswith(b"export A=\xff \\\n\n# completion of lm")
        assert f". {script}; fi\n".encode() in written
        assert "lm train" not in script.read_text() and "_lm_completion" in script.read_text()
        lines = capsys.readouterr().out.splitlines()
        assert lines[:2] == [f"{script}: written", f"{start_up}: 2 lines added"]
        assert lines[2].endswith(f"source {script}")
        assert run(["--install-completion", shell]) == 0
        assert start_up.read_bytes() == written
        assert capsys.readouterr().out.splitlines()[:2] == [
            f"{script}: is up to date",
            f"{start_up}: reads it already",
        ]

    def test_fish_reads_its_folder_by_itself(self, home, capsys, monkeypatch):
        monkeypatch.setenv("SHELL", "/usr/bin/fish")
        assert run(["--install-completion"]) == 0
        script = home / ".config/fish/completions/lm.fish"
        assert script.is_file() and capsys.readouterr().out == f"{script}: written\n"

    @pytest.mark.parametrize("shell", ["", "/bin/tcsh"])
    def test_another_shell_is_refused(self, home, monkeypatch, capsys, shell):
        monkeypatch.setenv("SHELL", shell)
        assert run(["--install-completion"]) == 2
        assert run(["--install-completion", "tcsh"]) == 2
        assert capsys.readouterr().err.count("name one of bash, zsh, fish") == 2
        assert not any(home.iterdir())

    def test_a_link_stays_one_and_a_file_that_cannot_be_written_is_an_error(self, home):
        (home / "dotfiles").mkdir()
        (home / "dotfiles" / "bashrc").write_text("alias a=b\n")
        (home / ".bashrc").symlink_to("dotfiles/bashrc")
        shells.install("bash", "script")
        assert (home / ".bashrc").is_symlink()
        assert (home / "dotfiles" / "bashrc").read_text().startswith("alias a=b\n\n# completion")
        (home / ".zshrc").mkdir()
        with pytest.raises(UserError, match="cannot be changed") as caught:
            shells.install("zsh", "script")
        assert "add this line to it: if [ -r" in (caught.value.hint or "")


def test_nothing_heavy_is_loaded(folder, monkeypatch):
    program = (
        "import os, sys\nfrom lmcli.commands import run\n"
        "for line in ('lm train --set tr', 'lm score -m r', 'lm train --preset t',"
        " 'lm score reviews.csv --field r'):\n"
        "    os.environ['COMP_LINE'] = line\n    assert run([]) == 0\n"
        "print('loaded:', *{'torch', 'numpy', 'tokenizers', 'rich'} & {*sys.modules})"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setenv("_LM_COMPLETE", "bash_complete")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.endswith("plain,review\nloaded:\n") and "runs/shake" in done.stdout


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_bash_itself_inserts_the_word(folder, tmp_path):
    """Readline's own word breaks, quoting and spaces; `lm` is a function that runs this one."""
    from lmcli.catalog.shells import SCRIPTS

    names = {"complete_func": "_lm_completion", "complete_var": "_LM_COMPLETE", "prog_name": "lm"}
    (folder / "script").write_text(SCRIPTS["bash"] % names)
    answers = "open,train.schedule=\\nplain,cosine\\nfile,x"
    program = f"""
    env() {{ printf '{answers}\\n'; echo noise >&2; }}
    compopt() {{ options+=("$2"); }}
    . ./script
    COMP_LINE='lm train --set tr'; COMP_POINT=17; _lm_completion lm
    printf '%s|' "${{COMPREPLY[@]}}" "${{options[@]}}"
    complete -p lm
    """
    done = subprocess.run(["bash", "--norc", "-c", program], capture_output=True, text=True)
    assert done.stdout == (
        "train.schedule=|cosine|nospace|default|complete -o nosort -F _lm_completion lm\n"
    )
    assert done.stderr == ""
