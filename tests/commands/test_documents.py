"""The documents hold: README and guides name what exists, and their commands are commands."""

import re
import shlex
import shutil
import tomllib
from itertools import pairwise
from pathlib import Path

import click
import pytest

from lmcli.commands import COMMANDS, lm
from lmcli.recipes import preset_names, resolve

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "lmcli"
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDES = {
    file.stem: file.read_text(encoding="utf-8") for file in sorted(PACKAGE.glob("guides/*.md"))
}
NUMBERS = GUIDES["numbers"]
KNOWN = {*GUIDES, *COMMANDS, "preset", "keys"}  # topics of lm help


def fenced_blocks(page):
    """(language, text) of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def command_lines(page):
    """The shell lines of a page: all lines of `sh` blocks, those after "$ " of `console` blocks."""
    for language, text in fenced_blocks(page):
        for line in text.replace("\\\n", " ").splitlines():
            if language == "sh" and not line.startswith(("#", " ")):
                yield line
            elif language == "console" and line.startswith("$ "):
                yield line.removeprefix("$ ")


def simple_commands(line):
    """The simple commands of a shell line, as words: comments, pipes and redirections removed."""
    command: list[str] = []
    for word in [*shlex.split(line, comments=True), ";"]:
        if word in ("&&", "|", "<", ">", ";"):
            if command:
                yield command
            command = [">"] if word in ("<", ">") else []  # what follows is a file, no command
        else:
            command.append(word)


def parse(words):
    """Parses an `lm …` command line with the real command, without running it."""
    context = click.Context(lm, info_name="lm")
    assert words[1] in COMMANDS, words
    lm.get_command(context, words[1]).make_context(words[1], words[2:], parent=context)


def lm_commands(page):
    """The `lm …` commands of a page, as words."""
    for line in command_lines(page):
        for words in simple_commands(line):
            if Path(words[0]).name == "lm":
                yield words


class TestCommandLines:
    @pytest.mark.parametrize("page", ["README", *GUIDES])
    def test_every_command_line_is_valid(self, page):
        failures = []
        for words in lm_commands(README if page == "README" else GUIDES[page]):
            try:
                parse(words)
            except (click.ClickException, AssertionError) as error:
                failures.append((" ".join(words), str(error)))
        assert failures == []

    def test_there_are_command_lines(self):
        pages = [name for name, page in GUIDES.items() if list(lm_commands(page))]
        assert len(pages) >= 12 and len(list(lm_commands(README))) >= 5

    def test_quick_commands_of_the_guides_run(self, inside, trained, tmp_path, monkeypatch):
        """Those that only need a decoder, text and seconds; `lm help` shows users these lines."""
        (tmp_path / "runs").mkdir()
        for name in ("notes", "first", "book", "a", "b", "code"):
            shutil.copytree(trained[0], tmp_path / "runs" / name)
        for name in ("notes.txt", "lines.txt", "other.txt", "test.txt", "prompts.txt", "big.txt"):
            (tmp_path / name).write_text("The baker went home.\nShe slept.\n")
        (tmp_path / "person.json").write_text('{"enum": ["baker", "cook"]}')
        monkeypatch.chdir(tmp_path)
        failures, count = [], 0
        for page in ("quickstart", "generating", "scoring", "evaluating"):
            for line in command_lines(GUIDES[page]):
                files = re.findall(r"[\w-]+\.[a-z]+", line.split(" #")[0])
                texts = [word for word in files if word.endswith((".txt", ".jsonl", ".tsv"))]
                quick = re.match(r"lm (score|generate|perplexity|info) ", line)
                known = "runs/" in line and all((tmp_path / name).is_file() for name in texts)
                if not (quick and known) or "|" in line or "$(" in line or "nproc" in line:
                    continue
                (words,) = (words for words in simple_commands(line) if words[0] == "lm")
                stdin = (tmp_path / "prompts.txt").read_bytes() if "< " in line else b""
                done, count = inside(*words[1:], stdin=stdin), count + 1
                if done.returncode:
                    failures.append((line, done.stderr.decode()))
        assert failures == [] and count >= 8


class TestCommands:
    @pytest.mark.parametrize("name", COMMANDS)
    def test_help_begins_with_what_it_does_and_examples(self, name, inside):
        output = inside(name, "--help-all").stdout.decode()
        assert output.startswith(f"Usage: lm {name}")
        examples = output.partition("\nExamples:\n")[2].partition("\n\n")[0]
        lines = [line.strip() for line in examples.splitlines()]
        assert lines and any(f"lm {name}" in line for line in lines)
        for words in (w for line in lines for w in simple_commands(line.split("   ")[0])):
            if words and words[0] == "lm":
                parse(words)

    def test_the_groups_help_has_an_example_of_every_command(self, inside):
        output = inside("--help").stdout.decode()
        for name, (words, what) in COMMANDS.items():
            assert re.search(rf"^  lm {name} .*{re.escape(what[:14])}", output, re.MULTILINE)
            parse(["lm", name, *shlex.split(words)])

    def test_every_command_has_a_file_and_every_file_a_command(self):
        files = {file.stem for file in (PACKAGE / "commands").glob("*.py")} - {
            "__init__",
            "command",
            "options",
        }
        assert files == COMMANDS.keys()


class TestGuides:
    def test_each_has_a_title_and_short_sentences(self):
        failures = []
        for name, page in GUIDES.items():
            if not page.startswith("# "):
                failures.append(f"{name}: no title")
            prose = re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)
            prose = re.sub(r"^(\||#).*$", "", prose, flags=re.MULTILINE)
            for paragraph in re.split(r"\n\n|\n- ", prose):
                for sentence in re.split(r"(?<=[.!?:;])\s+", paragraph):
                    if len(sentence.split()) > 30:
                        failures.append(f"{name}: {' '.join(sentence.split())[:70]}…")
        assert failures == []

    def test_links_and_topics_exist(self):
        failures = []
        for name, page in {**GUIDES, "README": README}.items():
            topics = re.findall(r"`lm help ([a-z]+)`", page)
            failures += [f"{name}: {topic}" for topic in topics if topic not in KNOWN]
            links = re.findall(r"\]\(([^)#:]+)\)", page)
            base = ROOT if name == "README" else PACKAGE / "guides"
            failures += [f"{name}: {link}" for link in links if not (base / link).exists()]
        assert failures == []

    def test_every_guide_is_in_the_readme(self):
        assert [name for name in GUIDES if f"lmcli/guides/{name}.md" not in README] == []


class TestNumbers:
    def test_every_figure_of_the_commands_is_defined(self):
        from lmcli.output import perplexity, score, score_forms

        style = score.ScoreFormat()
        names = {
            name
            for rows in (
                score.RecordRows(style),
                score.PieceRows(style, "token", alternatives=1),
                score_forms.PairRows(style),
                score_forms.ChoiceRows(style),
            )
            for name in rows.columns
        }
        names |= set(perplexity.columns("file", True))
        plain = {
            "line",
            "index",
            "text",
            "file",
            "model",
            "documents",
            "context",
            "stride",
            "logprobs",
            "characters",
            "words",
        }
        figures = {re.sub(r"_[12]$", "", name) for name in names} - plain
        assert len(figures) > 20
        for name in figures:
            forms = (
                name,
                "NAME_se" if name.endswith("_se") else name,
                f"{name}_k",
                name.removeprefix("difference"),
            )
            assert any(f"`{form}`" in NUMBERS for form in forms), name

    def test_every_figure_of_predictions_is_defined(self):
        from lmcli.evaluation import text_metrics
        from lmcli.evaluation.label_metrics import build_label_metrics
        from lmcli.output import evaluate

        names = {name for several in (False, True) for name, _ in build_label_metrics(several)}
        names |= {name for figures in text_metrics.TEXT_FIGURES.values() for name in figures}
        names |= {
            *text_metrics.squad(2).figures,
            *evaluate.columns(True, True, True),
            *evaluate.COSTS,
        }
        names |= {"records", "empty", "majority_accuracy", "confusion"}
        for name in names - {"system", "group", "metric", "value"}:
            assert f"`{name}`" in NUMBERS, name


class TestReadme:
    def test_it_is_short(self):
        assert len(README.encode()) <= 12_288 and len(README.splitlines()) <= 200

    def test_every_command_is_mentioned(self):
        assert [name for name in COMMANDS if not re.search(rf"\blm {name}\b", README)] == []

    def test_every_preset_is_mentioned_and_loads(self):
        assert [name for name in preset_names() if f"`{name}`" not in README] == []
        for name in preset_names():
            resolve(name)

    def test_the_tree_has_a_line_for_each_folder(self):
        (tree,) = (text for _, text in fenced_blocks(README) if text.startswith("lmcli/\n"))
        lines = [line.lstrip("│├└─ ").split("/", 1) for line in tree.splitlines()[1:]]
        folders = {path.name for path in PACKAGE.iterdir() if path.is_dir()} - {"__pycache__"}
        assert {name for name, _ in lines} == folders and len(lines) == len(folders)
        assert all(comment.strip() for _, comment in lines)

    def test_the_command_of_ci_stands_in_it_word_for_word(self):
        script = (ROOT / ".ci" / "run").read_text(encoding="utf-8").strip().splitlines()
        assert script[-1] in README.splitlines() and "pytest" in script[-1]

    def test_what_the_set_up_commands_name_exists(self):
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        set_up = [
            line
            for _, text in fenced_blocks(README)
            for line in text.splitlines()
            if "pip install" in line
        ]
        assert len(set_up) == 2
        for words in (words for line in set_up for words in simple_commands(line)):
            for option, value in pairwise(words):
                if option == "-c" and words[0].endswith("pip"):
                    assert (ROOT / value).is_file()
            for extra in re.findall(r"\.\[(\w+)\]", " ".join(words)):
                assert extra in project["optional-dependencies"]
            for word in words:
                if word.startswith("data/"):
                    assert (ROOT / word).is_file()
        assert (
            project["scripts"] == {"lm": "lmcli.commands:main"} and project["readme"] == "README.md"
        )
