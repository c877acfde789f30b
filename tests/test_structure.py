"""The layout holds: imports point down, help needs no torch, and the README names what exists."""

import ast
import os
import re
import shlex
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

import click
import pytest

from lmcli.commands import COMMANDS, lm
from lmcli.recipes import preset_names, resolve

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "lmcli"
FILES = sorted(PACKAGE.rglob("*.py"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
NUMBERS = (PACKAGE / "inference" / "NUMBERS.md").read_text(encoding="utf-8")

GROUND = ("errors", "storage", "config", "recipes")  # in this order
BELOW_2 = {*GROUND, "text", "model"}
BELOW_3 = {*BELOW_2, "checkpoints", "training", "inference"}
# who imports whom: a file or folder directly below lmcli/ → those it may import beside itself
MAY_IMPORT = {
    **{name: set(GROUND[:i]) for i, name in enumerate(GROUND)},
    "text": {*GROUND}, "model": {*GROUND},
    "checkpoints": BELOW_2, "training": BELOW_2, "inference": BELOW_2,
    "analysis": BELOW_3, "api": BELOW_3, "first_model": BELOW_3, "launch": {"errors"},
    "training_run": {*BELOW_3, "analysis"}, "resume_check": {*BELOW_3, "analysis", "runs"},
    "runs": {*BELOW_3, "analysis", "first_model", "launch", "training_run"},
    "display": {"errors", "config"},
    "commands": {*BELOW_3, "analysis", "api", "launch", "runs", "resume_check", "display"},
    "__init__": {"api"}, "__main__": {"commands"}}
# which libraries stand where: a part of lmcli/ → those it must not import
NEVER = {
    **{name: {"torch", "rich", "click", "numpy", "tokenizers"} for name in (*GROUND, "launch")},
    "text": {"torch", "safetensors", "rich", "click"}, "model": {"rich", "click", "tokenizers", "safetensors"},
    "display": {"torch", "numpy", "tokenizers", "click"},
    **{name: {"rich", "click"} for name in (*BELOW_3 - BELOW_2, "analysis", "api", "first_model", "training_run", "runs",
                                              "resume_check", "__init__")},
    "commands": {"rich"}, "__main__": {"rich", "click", "torch"}}
HEAVY = ("torch", "numpy", "tokenizers", "transformers", "safetensors", "rich")


def module_name(file):
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def part(module):
    """The file or folder directly below lmcli/ that a module belongs to."""
    return module.split(".")[1] if "." in module else "__init__"


MODULES = {module_name(file): file for file in FILES}


def imports(file):
    """(imported module, whether inside a function) of every import statement."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    late = {node for function in ast.walk(tree) if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node in late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else node.module, node in late


each_file = pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))


class TestImports:
    def test_every_part_has_its_place_in_the_table(self):
        parts = {part(module) for module in MODULES}
        assert parts == MAY_IMPORT.keys() == NEVER.keys()

    @each_file
    def test_they_point_down(self, file):
        own = part(module_name(file))
        for module, _ in imports(file):
            if module.split(".")[0] == "lmcli" and module != "lmcli" and part(module) != own:
                assert part(module) in MAY_IMPORT[own], f"{own} imports {module}"

    @each_file
    def test_each_library_has_its_place(self, file):
        own = part(module_name(file))
        for module, late in imports(file):
            library = module.split(".")[0]
            assert library not in NEVER[own], f"{own} imports {module}"
            assert library not in ("transformers", "pytest", "hypothesis"), f"{library} is for tests"
            if own in GROUND and library == "safetensors":
                assert own == "storage" and late, "safetensors leads to torch: import it inside the function"

    @each_file
    def test_a_command_knows_no_other_command(self, file):
        if part(module_name(file)) == "commands":
            found = {module for module, _ in imports(file) if module.startswith("lmcli.commands")}
            assert found <= {"lmcli.commands", "lmcli.commands.options"}

    @each_file
    def test_a_command_imports_what_is_heavy_in_its_function(self, file):
        if part(module_name(file)) == "commands":
            for module, late in imports(file):
                light = part(module) in (*GROUND, "commands", "__init__") if module.startswith("lmcli") else \
                    module in sys.stdlib_module_names or module.split(".")[0] in (*sys.stdlib_module_names, "click")
                assert late or light, f"{module} at the top"

    def test_there_is_no_ring(self):
        graph = {module: {target for target, _ in imports(file) if target in MODULES and target != "lmcli"} - {module}
                 for module, file in MODULES.items()}
        while graph:
            leaves = {module for module, targets in graph.items() if not targets & graph.keys()}
            assert leaves, f"a ring among {sorted(graph)}"
            graph = {module: targets for module, targets in graph.items() if module not in leaves}

    def test_within_model_layers_come_before_attention_before_the_transformer(self):
        order = {"kernels": set(), "dropout": {"kernels"}, "low_rank": {"dropout"},
                 "fused": {"kernels", "dropout", "low_rank"}, "head_loss": {"kernels"},
                 "layers": {"fused", "low_rank"}, "attention": {"fused", "layers"}, "recompute": {"device"},
                 "adapters": {"layers", "low_rank", "transformer"},
                 "transformer": {"kernels", "dropout", "fused", "head_loss", "layers", "attention", "recompute"},
                 "likelihood": {"fused", "head_loss"}, "device": set(), "group": set(), "cost": set(), "memory": {"cost"}}
        for name, allowed in order.items():
            found = {module.removeprefix("lmcli.model.") for module, _ in imports(PACKAGE / "model" / f"{name}.py")
                     if module.startswith("lmcli.model.")}
            assert found <= allowed


def loaded_after(program, folder=None, **options):
    """The heavy libraries that a fresh Python has loaded at the end of a program, and what it printed."""
    script = f"import sys\n{program}\nprint('loaded:', *(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=folder or ROOT,
                          env={**os.environ, "COLUMNS": "100"}, **options)
    assert done.returncode == 0, done.stderr
    output, _, names = done.stdout.rpartition("loaded:")
    return names.split(), output


def run_command(*arguments):
    return f"from lmcli.commands import run\nassert run({list(arguments)!r}) == 0"


class TestLazyImports:
    @pytest.mark.parametrize("arguments", [(), ("--version",), *((name,) for name in COMMANDS)], ids=" ".join)
    def test_help_loads_nothing_heavy(self, arguments):
        arguments = arguments if "--version" in arguments else (*arguments, "--help")
        assert loaded_after(run_command(*arguments))[0] == []

    def test_tokenize_loads_no_torch(self, tmp_path):
        from lmcli.config import TokenizerConfig
        from lmcli.text.tokenizer import learn

        learn(["one two"], TokenizerConfig(vocab_size=300)).save(tmp_path)
        names, output = loaded_after(run_command("tokenize", "-m", str(tmp_path)), input="a\nb\n")
        assert len(output.splitlines()) == 2  # it did its work
        assert "tokenizers" in names and not {"torch", "transformers", "safetensors", "rich"} & set(names)

    def test_learning_a_tokenizer_loads_no_torch(self, tmp_path):
        (tmp_path / "a.txt").write_text("one two one two\n")
        names, _ = loaded_after(run_command("tokenize", "--train", "-o", str(tmp_path / "tok"), str(tmp_path / "a.txt")))
        assert (tmp_path / "tok" / "tokenizer.json").is_file() and "torch" not in names

    def test_the_package_hands_on_load_without_loading_torch(self):
        assert loaded_after("import lmcli\nassert 'load' not in vars(lmcli)")[0] == []
        assert "torch" in loaded_after("import lmcli\nlmcli.load")[0]

    def test_ground_text_display_and_commands_load_no_torch(self):
        light = [name for name in MODULES if part(name) in (*GROUND, "text", "display", "commands")]
        program = "import importlib\n" + "\n".join(f"importlib.import_module({name!r})" for name in light)
        assert "torch" not in loaded_after(program)[0]


def readme_blocks(page=README):
    """(language, text) of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def shell_commands(text):
    """The simple commands of shell lines, as words: comments, pipes and redirections cut away."""
    for line in text.splitlines():
        words = shlex.split(line.strip().removeprefix("$ "), comments=True)
        command: list[str] = []
        for word in [*words, ";"]:
            if word in ("&&", "|", "<", ">", ";"):
                if command:
                    yield command
                command = []
                if word in ("<", ">"):
                    command = [">"]
            else:
                command.append(word)


def parse(words):
    """Parses an `lm …` command line with the real command, without running it."""
    context = click.Context(lm, info_name="lm")
    assert words[1] in COMMANDS, words
    lm.get_command(context, words[1]).make_context(words[1], words[2:], parent=context)


LM_LINES = [words for page in (README, NUMBERS) for language, text in readme_blocks(page) if language == "sh"
            for words in shell_commands(text) if Path(words[0]).name == "lm"]


class TestCommands:
    @pytest.mark.parametrize("name", COMMANDS)
    def test_help_says_what_it_does_and_ends_in_examples(self, name):
        _, output = loaded_after(run_command(name, "--help"))
        assert f"Usage: lm {name}" in output and "Options:" in output
        examples = output.partition("Examples:\n")[2]
        lines = [line.strip() for line in examples.splitlines() if line.strip()]
        assert lines and any(f"lm {name}" in line for line in lines)
        for words in shell_commands("\n".join(lines)):
            if words[0] == "lm":
                parse(words)

    def test_the_groups_help_names_every_command(self):
        output = loaded_after(run_command("--help"))[1]
        for name, what in COMMANDS.items():
            assert re.search(rf"^  {name}\s+{re.escape(what[:20])}", output, re.MULTILINE)

    def test_every_command_has_a_file_and_every_file_a_command(self):
        files = {file.stem for file in (PACKAGE / "commands").glob("*.py")} - {"__init__", "options"}
        assert files == COMMANDS.keys()


class TestReadme:
    def test_every_figure_of_the_commands_is_defined(self):
        from lmcli.analysis import perplexity_rows, score_rows

        style = score_rows.Style()
        names = {name for rows in (score_rows.Records(style), score_rows.Units(style, "token", 1), score_rows.Pairs(style),
                                   score_rows.Choices(style)) for name in rows.columns}
        names |= set(perplexity_rows.columns("file", True))
        plain = {"line", "index", "text", "file", "model", "documents", "context", "stride", "logprobs", "characters",
                 "words"}
        figures = {re.sub(r"_[12]$", "", name) for name in names} - plain
        assert len(figures) > 20
        for name in figures:
            forms = (name, "NAME_se" if name.endswith("_se") else name, f"{name}_k", name.removeprefix("difference"))
            assert any(f"`{form}`" in NUMBERS for form in forms), name

    def test_every_figure_of_predictions_is_defined(self):
        from lmcli.analysis import system_rows, text_metrics
        from lmcli.analysis.metrics import label_scores

        names = {name for several in (False, True) for name, _ in label_scores(("x",), several)}
        names |= {name for figures in text_metrics.FIGURES.values() for name in figures}
        names |= {*text_metrics.answers(2).scores, *system_rows.columns(True, True, True), *system_rows.COSTS}
        names |= {"records", "empty", "majority_accuracy", "confusion"}
        for name in names - {"system", "group", "metric", "value"}:
            assert f"`{name}`" in NUMBERS, name

    @pytest.mark.parametrize("name", COMMANDS)
    def test_every_command_is_mentioned(self, name):
        assert re.search(rf"\blm {name}\b", README)

    @pytest.mark.parametrize("name", preset_names())
    def test_every_preset_is_mentioned_and_loads(self, name):
        assert f"`{name}`" in README
        resolve(name)

    def test_it_has_commands(self):
        assert len(LM_LINES) >= 8

    @pytest.mark.parametrize("words", LM_LINES, ids=" ".join)
    def test_every_command_line_is_one(self, words):
        parse(words)

    def test_the_tree_names_exactly_the_files_there_are(self):
        (tree,) = (text for _, text in readme_blocks() if text.startswith("lmcli/\n"))
        found, folder = [], ""
        for line in tree.splitlines()[1:]:
            bare = line.lstrip("│├└─ \t")
            name, _, comment = bare.partition(" ")
            if name.endswith("/"):
                folder = name
            elif name:
                inside = line[0] in "│ " and folder
                found.append((folder if inside else "") + name)
                assert comment.strip(), f"{name} has no comment"
        files = (*FILES, *PACKAGE.rglob("*.c"))
        existing = [str(file.relative_to(PACKAGE)) for file in files if file.name != "__init__.py" or file.stat().st_size]
        assert sorted(found) == sorted(existing)

    def test_the_command_of_ci_stands_in_it_word_for_word(self):
        script = (ROOT / ".ci" / "run").read_text(encoding="utf-8").strip().splitlines()
        assert script[-1] in README.splitlines() and "pytest" in script[-1]

    def test_what_the_set_up_commands_name_exists(self):
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        set_up = [line for _, text in readme_blocks() for line in text.splitlines() if "pip install" in line]
        assert len(set_up) == 2
        for words in (words for line in set_up for words in shell_commands(line)):
            for option, value in pairwise(words):
                if option == "-c" and words[0].endswith("pip"):
                    assert (ROOT / value).is_file()
            for extra in re.findall(r"\.\[(\w+)\]", " ".join(words)):
                assert extra in project["optional-dependencies"]
            for word in words:
                if word.startswith("data/"):
                    assert (ROOT / word).is_file()
        assert project["scripts"] == {"lm": "lmcli.commands:main"} and project["readme"] == "README.md"


def functions(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def public(body, inside=""):
    """(name, node) of the classes and functions a caller may use; what overrides another's method needs no words."""
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            yield f"{inside}{node.name}", node
            if isinstance(node, ast.ClassDef):
                own = not any(base for base in node.bases
                              if ast.unparse(base).startswith(("click.", "nn.", "gzip.", "torch.")))
                yield from public(node.body if own else [], f"{node.name}.")


class TestSizes:
    @each_file
    def test_no_file_is_longer_than_600_lines_and_no_function_than_80(self, file):
        assert len(file.read_text(encoding="utf-8").splitlines()) <= 600
        for function in functions(file):
            assert function.end_lineno - function.lineno < 80, function.name

    def test_nine_functions_of_ten_have_fewer_than_40_lines(self):
        sizes = sorted(function.end_lineno - function.lineno + 1 for file in FILES for function in functions(file))
        assert sizes[len(sizes) * 9 // 10] < 40

    def test_no_folder_in_a_folder(self):
        folders = [path for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"]
        inner = [path for folder in folders for path in folder.iterdir() if path.is_dir() and path.name != "__pycache__"]
        assert folders and inner == []

    def test_no_code_in_an_init_but_the_group_and_the_package(self):
        filled = {module_name(file) for file in FILES if file.name == "__init__.py" and file.stat().st_size}
        assert filled == {"lmcli", "lmcli.commands"}

    @each_file
    def test_what_is_public_says_what_it_does(self, file):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        bare = [name for name, node in public(tree.body) if not ast.get_docstring(node)]
        assert bare == []
        assert ast.get_docstring(tree) or file.name in ("__init__.py", "__main__.py")
