"""Mistakes that new users make: each answer says what is wrong, where, and what to do.

Two more of the kind are in other files: a closed pipe (test_full_and_closed_outputs.py) and
--resume of a finished run (test_more_training.py).
"""

import os
import re
import sys

import pytest
from drawn_screen import InProcess, assert_whole

from lmcli import commands, storage
from lmcli.checkpoints import hub
from lmcli.commands import run
from lmcli.terminal.wrapping import COMMAND_TO_COPY

WORDS = ("good", "bad")
REVIEWS = [
    (f"this film is {word}, number {i}", word) for i in range(30) for word in ("good", "bad")
]
CHINESE = "红楼梦第一回，甄士隐梦幻识通灵，贾雨村风尘怀闺秀。此开卷第一回也。\n" * 40
LONG = "/".join(["a-folder-with-a-long-name"] * 3 + ["a-file-with-a-name-that-is-longer-than-60"])
FILES = {
    "empty.txt": b"",
    "blank.txt": b" \n\n\t\n",
    "binary.dat": bytes(range(256)) * 9,
    "broken.jsonl": b'{"text": "a b c"}\n{"text": \n',
    "stars.csv": ("review,stars\n" + "".join(f'"{t}",{len(w)}\n' for t, w in REVIEWS)).encode(),
    "pairs.tsv": b"en\tde\n" + b"".join(b"house %d\tHaus %d\n" % (k, k) for k in range(9)),
    "one.txt": b"This is one sentence.\n",
    "plain.txt": b"a good film\na bad film\n",
    "rows.jsonl": b'{"text": "a good film"}\n',
    "chinese.txt": CHINESE.encode(),
    "keys.yaml": b"extends: tiny\ntrain:\n  stepps: 5\n",
    "high.yaml": b"extends: tiny\ntrain:\n  dropout: 1.5\n",
    "红楼夢.txt": b"",
    "红楼夢.jsonl": b'{"text": "a b c"}\n{"text": \n',
    f"{LONG}.txt": b"",
    "damaged/model.safetensors": b"no weights",
    "unreadable/config.json": b"{",
    "labeled.jsonl": b'{"text": "a", "label": "good"}\n{"text": "b", "label": "bad"}\n',
}
WIDTHS = (60, 80, 120)


@pytest.fixture(scope="module")
def classifier(lm, tmp_path_factory):
    """A folder with a classifier of one step."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "reviews.csv").write_bytes(FILES["stars.csv"])
    sizes = ("--set", "model.hidden_size=32", "--set", "tokenizer.vocab_size=270")
    fields = ("--fields", "text=review,label=stars", "--steps", 1)
    done = lm("train", folder / "reviews.csv", "-o", folder / "run", *fields, *sizes)
    assert done.returncode == 0, done.stderr.decode()
    return folder / "run"


@pytest.fixture
def here(tmp_path, monkeypatch, story, trained, classifier):
    """The working folder: FILES, shakespeare.txt, runs/shake and classifier."""
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "shakespeare.txt").symlink_to(story)
    (tmp_path / "runs").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "runs" / "shake").symlink_to(trained[0])
    (tmp_path / "classifier").symlink_to(classifier)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "damaged" / name).symlink_to(trained[0] / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub._announce.cache_clear()
    return tmp_path


# number in the list of typical mistakes, command line, exit code, the answer: what and where, then
# what to do
ERRORS = [
    (1, "trian x", 2, "no command is named 'trian'; did you mean 'train'?", "lm --help"),
    (1, "plain.txt", 2, "no command is named 'plain.txt'", "as in lm train plain.txt"),
    (
        2,
        "train shakespear.txt",
        1,
        "shakespear.txt: no such file or directory; did you mean 'shakespeare.txt'?",
        "give a file or a folder, or pipe text in",
    ),
    (2, "train texts/a.txt", 1, "there is no folder 'texts'", "give a file"),
    (2, "score -m runs/shake plan.txt", 1, "plan.txt: no such file", "'plain.txt'"),
    (
        2,
        "train shakespeare.txt --val shakespear.txt",
        1,
        "did you mean 'shakespeare.txt'?",
        "give a file",
    ),
    (3, "train plain.txt --preset tinny", 2, "did you mean 'tiny'?", "shipped preset (auto, base"),
    (3, "train plain.txt --preset my.yaml", 2, "my.yaml: no such preset file", "auto, base"),
    (4, "generate -m runs/shake --temp 0 a", 2, "did you mean '--temperature'?", "generate --help"),
    (4, "--hlp", 2, "no such option --hlp; did you mean '--help'?", "see lm --help"),
    (4, "train plain.txt --sett a=1", 2, "no such option --sett; did you mean '--set'?", "--help"),
    (
        5,
        "train plain.txt --set model.hiden_size=64",
        2,
        "--set: unknown key model.hiden_size; did you mean 'hidden_size'?",
        "lm help keys",
    ),
    (
        5,
        "train plain.txt --set train.hidden_size=64",
        2,
        "unknown key train.hidden_size; did you mean 'model.hidden_size'?",
        "lm help keys",
    ),
    (
        6,
        "train plain.txt --set hidden_size=64",
        2,
        "--set: 'hidden_size=64' is not section.key=value",
        "write it as in --set model.hidden_size=64",
    ),
    (
        7,
        "train plain.txt --set train.learning_rate=high",
        2,
        "--set: train: learning_rate: 'high' is not a number",
        "learning_rate: peak rate",
    ),
    (8, "train plain.txt --time 5minutes", 2, "--time: '5minutes' is not a dur", "90s, 10m, 1h30m"),
    (9, "train plain.txt -o runs/shake", 2, "runs/shake: holds a run already", "--resume runs/sh"),
    (10, "train empty.txt", 1, "lm: error: empty.txt: no text in it", "give a file with text"),
    (10, "train blank.txt", 1, "lm: error: blank.txt: no text in it", "give a file with text"),
    (11, "train binary.dat", 1, "binary.dat, line 2: invalid UTF-8", "iconv -f LATIN1"),
    (12, "train broken.jsonl", 1, "broken.jsonl, line 2: invalid JSON", "--on-error skip leaves"),
    (
        13,
        "train stars.csv",
        2,
        "stars.csv: a language model learns from text; columns in its first line: 'review', 's",
        "a classifier: lm train stars.csv --fields text=review,label=stars",
    ),
    (
        13,
        "train pairs.tsv",
        2,
        "pairs.tsv: a language model learns from text; columns in its first line: 'en', 'de'",
        "a translator: lm train pairs.tsv --fields source=en,target=de; a language model: lm",
    ),
    (
        14,
        "train one.txt",
        1,
        "one.txt: only 19 bytes, too few tokens to train on",
        "at least 32 are needed",
    ),
    (15, "train", 1, "standard input: no text in it", "give a file with text, or pipe some in"),
    (17, "generate Once", 2, "no model was given", "give one with -m DIR, or set LM_MODEL"),
    (18, "generate -m runs/nope a", 1, "runs/nope: no such model", "models here: runs/shake; a"),
    (
        18,
        "generate -m runs/shak a",
        1,
        "no such model in the folder runs",
        "did you mean runs/shake",
    ),
    (18, "generate -m ./runs/shak a", 1, "no such model folder", "did you mean runs/shake?"),
    (
        19,
        "generate -m shak a",
        1,
        "shak: no such model folder, and not in",
        "did you mean runs/sha",
    ),
    (20, "generate -m runs a", 1, "runs: holds no config.json", "models here: runs/shake"),
    (21, "generate -m classifier a", 1, "which lm generate cannot use", "use lm classify"),
    (21, "classify -m runs/shake plain.txt", 1, "which lm classify cannot use", "use lm generate"),
    (
        22,
        "score -m runs/shake --per words plain.txt",
        2,
        "--per: 'words' is not one of record, word, token; did you mean 'word'?",
        "lm score --help",
    ),
    (22, "generate -m runs/shake --temperature -1 a", 2, "is not between 0 and 100", "--help"),
    (22, "generate -m runs/shake -n 0 a", 2, "--max-new-tokens: 0 is not 1 or more", "Most new"),
    (22, "train plain.txt --epochs 0", 2, "--epochs: 0.0 is not above 0", "Passes over"),
    (22, "generate -m runs/shake -n", 2, "--max-new-tokens: needs a value", "Most new tokens"),
    (22, "export", 2, "MODEL: is missing", "see lm export --help"),
    (22, "export a b", 2, "unexpected argument 'b'", "see lm export --help"),
    (
        23,
        "score -m runs/shake --field txt rows.jsonl",
        1,
        "line 1: field 'txt' is missing; fields: 'text'; did you mean 'text'?",
        "did you mean 'text'",
    ),
    (22, "generate -m runs/shake -n x a", 2, "--max-new-tokens: 'x' is not a whole number", "Most"),
    (22, "generate -m runs/shake --top-p x a", 2, "--top-p: 'x' is not a number", "lm generate --"),
    (22, "generate -m runs/shake --json-schema no a", 2, "--json-schema: no: No such", "give a fi"),
    (
        25,
        "evaluate -m classifier stars.csv",
        2,
        "stars.csv: which task? a row with 'review', 'stars' does not show it",
        "--fields text=review,label=stars if it has labels, or --task",
    ),
    (
        25,
        "evaluate -m classifier stars.csv --fields text=review,label=star",
        2,
        "--fields: no column 'star'; did you mean 'stars'?",
        "the columns in stars.csv: 'review', 'stars'",
    ),
    (19, "generate -m plain.txt a", 1, "plain.txt: is a file, not a model folder", "a config.json"),
    (19, "train plain.txt --tokenizer one.txt", 1, "one.txt: is no tokenizer", "tokenize --train"),
    (27, "perplexity -m . --validation", 1, ".: holds no config.json", "models here: "),
    (10, "train empty", 1, "empty: holds no text files", "it has no files that are not hidden"),
    (23, "score -m runs/shake --pairs stars.csv", 1, "no pair of fields", "name two with --field"),
    (32, "train plain.txt --device gpu", 2, "'gpu' is not one of auto, cpu, cuda, mps\n", "a GPU"),
    (24, "evaluate -m runs/shake labeled.jsonl", 2, "classify needs a classifier of", "use --task"),
    (
        25,
        "evaluate -m classifier plain.txt",
        1,
        "plain.txt, line 1: no input for the model: this plain line is read as the reference",
        "give rows with text and label (.jsonl, .tsv, .csv), or plain inputs in FILE and their "
        "references, line by line, in --references FILE",
    ),
    (26, "train shakespeare.txt -o /proc/x", 1, "/proc/x: cannot make this folder", "with -o"),
    (27, "train --resume runs/nope", 1, "runs/nope: holds no run", "runs here: runs/shake"),
    (29, "export runs/shake --format gguf", 2, "no such option --format", "--gguf"),
    (30, "train plain.txt --lora 8", 2, "--lora (train.lora_rank) needs a model", "with --from"),
    (32, "generate -m runs/shake --device mps a", 2, "no mps device on this machine", "choose cpu"),
    (
        23,
        "score -m runs/shake --field revie stars.csv",
        1,
        "'stars'; did you mean 'review'?",
        "line 2",
    ),
    (
        23,
        "score -m runs/shake stars.csv",
        1,
        "no text field among 'review', 'stars'",
        "with --field",
    ),
    (
        33,
        "score -m runs/shake -m runs/shake plain.txt",
        2,
        "shake is given twice",
        "leave one of them out",
    ),
    (33, "perplexity -m runs/shake -m ./runs/shake plain.txt", 2, "shake is given twice", "leave"),
    (33, "evaluate -m classifier -m classifier a", 2, "-m: classifier is given twice", "leave one"),
    (33, "generate -m classifier -m runs/shake a", 2, "given 2 values", "give one of them"),
    (34, "score -m runs/shake --color --json plain.txt", 2, "--color and --json exclude", "leave"),
    # not in that list: presets, folders and names that are read wrongly
    (0, "train plain.txt --preset keys.yaml", 2, "keys.yaml: unknown key train.stepps", "'steps'"),
    (0, "train plain.txt --preset high.yaml", 2, "high.yaml: train: dropout", "dropout of sub"),
    (0, "generate -m damaged a", 1, "damaged/model.safetensors: is damaged", "again"),
    (0, "generate -m unreadable a", 1, "unreadable/config.json", "JSON"),
    (0, f"score -m runs/shake {LONG}.tsv", 1, f"{LONG}.tsv: no such file", "give a file"),
    (0, f"train {LONG}.txt", 1, f"{LONG}.txt: no text in it", "give a file with text"),
    (0, "train 红楼梦.txt", 1, "红楼梦.txt: no such file or directory", "give a file"),
    (0, "train 红楼夢.jsonl", 1, "红楼夢.jsonl, line 2: invalid JSON", "--on-error skip leaves"),
    (0, "classify -m classifier --field 评论 stars.csv", 1, "field '评论'", "'review', 'stars'"),
    (0, "plan plain.txt --devices 8,x", 2, "--devices: ", "lm plan --help"),
]


@pytest.mark.parametrize(
    ("number", "line", "code", "what", "advice"), ERRORS, ids=[f"{e[0]} {e[1]}" for e in ERRORS]
)
def test_a_mistake_is_answered(here, inside, monkeypatch, number, line, code, what, advice):
    errors, show = [], commands._print_error
    monkeypatch.setattr(commands, "_print_error", lambda each: (errors.append(each), show(each)))
    done = inside(*line.split())
    error = done.stderr.decode()
    assert (done.returncode, done.stdout) == (code, b""), error
    assert what in error and advice in error
    assert len(error.splitlines()) <= 2 and error.startswith("lm: error: ")
    # on a terminal it is wrapped at words, and what is to be copied stays whole
    monkeypatch.delenv("COLUMNS", raising=False)
    for columns in WIDTHS:
        shown = InProcess(lambda _: show(errors[0]), columns).draw()
        assert_whole(shown, error)
        assert " ".join(shown.written).split() == error.split()
        for command in COMMAND_TO_COPY.findall(error):
            assert any(command in line for line in shown.written), (command, shown.written)


def test_16_nothing_on_a_terminal(here, monkeypatch, capfd):
    _, slave = os.openpty()
    with open(slave) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        assert run(["train"]) == 2
    assert "nothing to train on: give DATA, or pipe text in" in capfd.readouterr().err


def test_19_a_run_is_found_by_its_name(here, inside):
    done = inside("tokenize", "-m", "shake", "--count", "plain.txt")
    assert (done.returncode, done.stderr) == (0, b"lm: shake is runs/shake\n")
    assert done.stdout == inside("tokenize", "-m", "runs/shake", "--count", "plain.txt").stdout
    quiet = inside("perplexity", "-m", "shake", "-q", "--validation")
    assert (quiet.returncode, quiet.stderr) == (0, b"")
    assert b"\trun\n" in inside("info", "shake").stdout.splitlines(keepends=True)[0]


def test_36_a_full_disk(here, inside, monkeypatch):
    monkeypatch.setattr(storage, "free_bytes", lambda path: 1000)
    done = inside("export", "runs/shake", "-o", "copy")
    error = done.stderr.decode()
    assert done.returncode == 1 and "are needed, 0.0 MB are free" in error
    assert "free some space; everything saved before is intact" in error


def test_38_a_text_that_the_tokenizer_was_not_made_for(here, inside):
    options = ("--from", "runs/shake", "--steps", 1, "-o", "more", "--set", "train.context=16")
    done = inside("train", "chinese.txt", *options)
    assert done.returncode == 0
    (line,) = [line for line in done.stderr.decode().splitlines() if "not made for" in line]
    assert re.fullmatch(
        r"lm: the tokenizer is not made for this text: (2\.9|3\.\d) tokens per character, 1\.0 "
        r"bytes a token; learn one with lm tokenize --train -o tok chinese\.txt and a model with "
        "--tokenizer tok",
        line,
    )


COMMANDS = [
    "score --per word",
    "score",
    "perplexity",
    "evaluate --pairs",
    "tokenize",
    "tokenize --count",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_38_such_a_text_is_named_once_wherever_it_is_read(here, inside, command):
    (here / "pairs.tsv").write_text(
        "good\tbad\n" + "".join(f"{CHINESE[k : k + 9]}\t{CHINESE[:9]}\n" for k in range(5))
    )
    name = "pairs.tsv" if "--pairs" in command else "chinese.txt"
    files = (name, name) if command == "perplexity" else (name,)
    done = inside(*command.split(), "-m", "runs/shake", *files)
    (said,) = [line for line in done.stderr.decode().splitlines() if "not made for" in line]
    assert said.startswith(
        f"lm: {'shake' if 'score' in command else 'runs/shake'}: the tokenizer is"
    )
    assert ("learn one with lm tokenize --train" in said) == ("tokenize" in command)
    quiet = inside(*command.split(), "-m", "runs/shake", "-q", name)
    assert quiet.stderr == b"" and quiet.returncode == done.returncode == 0
    assert "score" not in command or quiet.stdout == done.stdout


@pytest.mark.parametrize("command", ["score", "tokenize", "perplexity"])
def test_38_a_text_that_suits_the_tokenizer_is_no_remark(here, inside, command):
    assert inside(command, "-m", "runs/shake", "shakespeare.txt").stderr.count(b"not made") == 0


ROWS = b'{"text": "a b", "label": "good"}\n{"text": "b", "label": "bad"}\n'


@pytest.mark.parametrize("command", ["evaluate -m classifier", "evaluate"])
def test_rows_in_a_pipe_are_recognized_by_their_look(here, inside, command):
    for stdin, name in ((ROWS, "jsonl"), (b"text\tlabel\na\tgood\n", "tsv")):
        done = inside(*command.split(), stdin=stdin)
        assert done.returncode in (1, 2)
        assert f"add --format {name}" in done.stderr.decode().splitlines()[1]


@pytest.mark.parametrize("command", ["score", "tokenize"])
def test_rows_that_are_read_as_plain_text_are_named(here, inside, command):
    line = (command, "-m", "runs/shake")
    done = inside(*line, stdin=ROWS)
    said = (
        b"lm: standard input is read as plain text, and looks like JSON Lines: add --format jsonl\n"
    )
    assert (done.returncode, done.stderr) == (0, said)
    for option in ("-q", "--format"):
        more = (option, "text")[: 1 if option == "-q" else 2]
        again = inside(*line, *more, stdin=ROWS)
        assert (again.stdout, again.stderr) == (done.stdout, b"")


def test_little_text_is_said_in_one_line(here, inside):
    (here / "line.txt").write_text("One line of text that is long enough to train on it.")
    options = ("--preset", "tiny", "--set", "model.num_hidden_layers=1", "-o", "runs/line")
    done = inside("train", "line.txt", *options, "--steps", 1)
    assert done.returncode == 0
    assert b"bytes are little text for a new model: expect letters" in done.stderr


@pytest.mark.parametrize("label", ["sentiment", "stars"])
def test_35_a_classifier_from_a_csv_at_the_first_attempt(here, inside, label):
    """By the example of `lm train --help`, with the columns of this file."""
    example = "lm train reviews.csv --fields text=review,label=sentiment"
    assert example in " ".join(inside("train", "--help").stdout.decode().split())
    rows = "".join(f'"{text}",{label_}\n' for text, label_ in REVIEWS)
    (here / "reviews.csv").write_text(f"review,{label}\n{rows}")
    command = example.replace("sentiment", label).split()[1:]
    done = inside(*command, "--steps", 60, "--set", "train.learning_rate=0.01")
    assert (done.returncode, done.stdout) == (0, b"runs/reviews\n")
    assert b"2 labels: bad 50.0%, good 50.0%" in done.stderr
    given = inside("classify", "-m", "reviews", "plain.txt").stdout.decode()
    assert [line.split("\t")[0] for line in given.splitlines()] == ["good", "bad"]


def test_errors_on_a_terminal(screen, here):
    shown = screen("train", "stars.csv", "--time", "5minutes", columns=60, folder=here)
    assert shown.code == 2 and shown.lines[0].startswith("lm: error: --time: '5minutes' is not a")
    assert all(len(line) <= 60 for line in shown.lines) and "Usage" not in shown.text
