"""The rules of the house: imports point down, heavy imports are late, sizes, names, rows of data.

contributing.md states them for people; every check lists all offenders.
"""

import ast
import functools
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

from lmcli.checkpoints.families import FAMILIES
from lmcli.commands import COMMANDS
from lmcli.config import GenerateConfig, ModelConfig, Recipe, TokenizerConfig, TrainConfig
from lmcli.data.documents import DocumentFormat
from lmcli.training.datasets import Source
from lmcli.training.objectives import OBJECTIVES

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "lmcli"
FILES = sorted(PACKAGE.rglob("*.py"))

# floors, from the ground: a file or folder of lmcli/ imports from lower floors and itself only
# in this order
GROUND = ("errors", "ownership", "storage", "config", "recipes")
FLOORS = (
    *((name,) for name in GROUND),
    ("text", "model"),
    ("terminal",),
    ("data", "kernels"),
    ("distributed", "checkpoints"),
    ("generation", "scoring", "training", "catalog"),
    ("api", "__init__", "planning"),
    ("evaluation", "runs"),
    ("output", "display"),
    ("commands", "__main__"),
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
# exceptions: `import lmcli` exposes load(), `python -m lmcli` runs the commands
ALSO = {("__init__", "api"), ("__init__", "runs"), ("__main__", "commands")}
# a file or folder of lmcli/ → libraries that it must not import
SHARED = ("command", "options")  # of lmcli/commands/: what all commands may import
NO_SCREEN = ("rich", "click")
NEVER = {
    **{name: {*NO_SCREEN} for name in FLOOR},
    **{name: {"torch", "numpy", "tokenizers", *NO_SCREEN} for name in GROUND},
    "text": {"torch", "safetensors", *NO_SCREEN},
    "data": {"torch", "safetensors", *NO_SCREEN},
    "model": {"tokenizers", "safetensors", *NO_SCREEN},
    "kernels": {"tokenizers", "safetensors", *NO_SCREEN},
    "display": {"torch", "numpy", "tokenizers", "click"},
    "catalog": {"torch", "numpy", "tokenizers", "safetensors", *NO_SCREEN},
    "terminal": {"torch", "numpy", "tokenizers", "safetensors", "click"},
    "commands": {"rich"},
    "__main__": {"rich", "click", "torch"},
}
HEAVY = ("torch", "numpy", "tokenizers", "transformers", "safetensors", "rich", "prompt_toolkit")
COMPILER = ("torch._dynamo", "torch._inductor", "sympy")  # takes as long as torch itself


def module_name(file):
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def part(module):
    """The file or folder directly below lmcli/ that a module belongs to."""
    return module.split(".")[1] if "." in module else "__init__"


MODULES = {module_name(file): file for file in FILES}


@functools.cache
def tree_of(file):
    return ast.parse(file.read_text(encoding="utf-8"))


@functools.cache
def imports(file):
    """(imported module, whether it is late: in a function or for types only) of every import."""
    return tuple(imports_in(tree_of(file).body, late=False))


def imports_in(statements, late):
    """The same of these statements and those inside them."""
    for node in statements:
        if isinstance(node, ast.Import):
            yield from ((alias.name, late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else node.module, late
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ("body", "orelse", "handlers", "finalbody", "cases"):
            yield from imports_in(getattr(node, inner, ()), late or function or types)


def offenders(check):
    """What a check of one file finds, over all files: "file: what" for each."""
    return [f"{file.relative_to(PACKAGE)}: {what}" for file in FILES for what in check(file)]


class TestImports:
    def test_every_part_has_its_place_in_the_table(self):
        parts = {part(module) for module in MODULES}
        assert parts == FLOOR.keys() == NEVER.keys()

    def test_they_point_down(self):
        def check(file):
            importer = part(module_name(file))
            for module, _ in imports(file):
                imported = part(module)
                other = module.startswith("lmcli.") and imported != importer
                above = other and FLOOR[imported] >= FLOOR[importer]
                if above and (importer, imported) not in ALSO:
                    yield f"imports {module}"

        assert offenders(check) == []

    def test_each_library_has_its_place(self):
        def check(file):
            importer = part(module_name(file))
            for module, late in imports(file):
                library = module.split(".")[0]
                if library in {*NEVER[importer], "transformers", "pytest", "hypothesis"}:
                    yield f"imports {module}"
                in_function = importer == "storage" and late
                if importer in GROUND and library == "safetensors" and not in_function:
                    yield "imports safetensors, which imports torch"

        assert offenders(check) == []

    def test_a_command_knows_no_other_command(self):
        def check(file):
            if part(module_name(file)) == "commands":
                names = {name for name, _ in imports(file) if name.startswith("lmcli.commands")}
                yield from names - {
                    "lmcli.commands",
                    *(f"lmcli.commands.{name}" for name in SHARED),
                }

        assert offenders(check) == []

    def test_a_command_imports_what_is_heavy_in_its_function(self):
        def check(file):
            if part(module_name(file)) == "commands":
                for module, late in imports(file):
                    library = module.split(".")[0]
                    light = library in (*sys.stdlib_module_names, "click")
                    if library == "lmcli":
                        light = part(module) in (*GROUND, "commands", "__init__")
                        light = light or module == "lmcli.terminal.progress"
                    if not (late or light):
                        yield f"imports {module} at its top"

        assert offenders(check) == []

    def test_there_is_no_import_cycle(self):
        graph = {
            name: {target for target, _ in imports(file) if target in MODULES} - {name, "lmcli"}
            for name, file in MODULES.items()
        }
        while graph:
            leaves = {name for name, targets in graph.items() if not targets & graph.keys()}
            assert leaves, f"a cycle among {sorted(graph)}"
            graph = {name: targets for name, targets in graph.items() if name not in leaves}


def loaded_after(program, folder=None, **options):
    """(heavy libraries that a fresh Python has loaded after a program, what it printed)."""
    names = f"(name for name in {HEAVY + COMPILER} if name in sys.modules)"
    script = f"import sys\n{program}\nprint('loaded:', *{names})"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=folder or ROOT,
        env={**os.environ, "COLUMNS": "100"},
        **options,
    )
    assert done.returncode == 0, done.stderr
    output, _, names = done.stdout.rpartition("loaded:")
    return names.split(), output


def run_command(*arguments):
    return f"from lmcli.commands import run\nassert run({list(arguments)!r}) == 0"


class TestLazyImports:
    def test_help_loads_nothing_heavy(self):
        commands = [["--version"], ["--help"], *([name, "--help"] for name in COMMANDS)]
        names, output = loaded_after("\n".join(run_command(*command) for command in commands))
        assert names == [] and output.count("Usage: lm") == len(commands) - 1

    def test_tokenize_loads_no_torch(self, tmp_path):
        from lmcli.config import TokenizerConfig
        from lmcli.text.tokenizer import learn

        learn(["one two"], TokenizerConfig(vocab_size=300)).save(tmp_path)
        names, output = loaded_after(run_command("tokenize", "-m", str(tmp_path)), input="a\nb\n")
        assert len(output.splitlines()) == 2  # it did its work
        assert "tokenizers" in names and not {"torch", "transformers", "safetensors", "rich"} & set(
            names
        )

    def test_learning_a_tokenizer_loads_no_torch(self, tmp_path):
        (tmp_path / "a.txt").write_text("one two one two\n")
        names, _ = loaded_after(
            run_command("tokenize", "--train", "-o", str(tmp_path / "tok"), str(tmp_path / "a.txt"))
        )
        assert (tmp_path / "tok" / "tokenizer.json").is_file() and "torch" not in names

    def test_no_command_loads_torchs_compiler(self, tmp_path):
        text, rows = tmp_path / "a.txt", tmp_path / "a.jsonl"
        text.write_text("one two\nthree\n" * 40)
        rows.write_text("".join(f'{{"text": "{n}", "label": "l{n % 2}"}}\n' for n in range(8)))
        decoder, labels = str(tmp_path / "decoder"), str(tmp_path / "labels")
        small = ("--set", "tokenizer.vocab_size=261", "--set", "model.num_hidden_layers=1")
        small = (*small, "--steps", "1", "--threads", "1")
        commands = (
            ("train", str(text), "--preset", "tiny", "-o", decoder, *small),
            ("train", str(rows), "--preset", "classify", "-o", labels, *small),
            ("generate", "-m", decoder, "-n", "2", "Once"),
            ("score", "-m", decoder, str(text)),
            ("perplexity", "-m", decoder, str(text)),
            ("classify", "-m", labels, str(text)),
            ("info", decoder),
        )
        names, output = loaded_after("\n".join(run_command(*each) for each in commands))
        assert "torch" in names and not {*COMPILER} & {*names}
        assert {"one two", "three"} < {line.split("\t")[-1] for line in output.splitlines()}

    def test_importing_the_package_loads_no_torch(self):
        assert loaded_after("import lmcli\nassert 'load' not in vars(lmcli)")[0] == []
        assert "torch" not in loaded_after("import lmcli\nlmcli.load")[0]

    def test_rooms_that_need_no_torch_do_not_load_it(self):
        light = [
            name
            for name in MODULES
            if part(name) in (*GROUND, "text", "data", "catalog", "display", "commands")
        ]
        program = "import importlib\n" + "\n".join(
            f"importlib.import_module({name!r})" for name in light
        )
        assert "torch" not in loaded_after(program)[0]


def functions(file):
    tree = tree_of(file)
    return [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def public(body, inside=""):
    """(name, node) of public classes and functions, without overrides of a library's methods."""
    kinds = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in body:
        if isinstance(node, kinds) and not node.name.startswith("_") and node.name != "forward":
            yield f"{inside}{node.name}", node
            if isinstance(node, ast.ClassDef):
                bases = [ast.unparse(base) for base in node.bases]
                library = any(
                    name.startswith(("click.", "nn.", "gzip.", "torch.")) for name in bases
                )
                yield from public([] if library else node.body, f"{node.name}.")


class TestSizes:
    def test_no_file_has_more_than_500_lines_and_no_function_more_than_60(self):
        def check(file):
            lines = len(file.read_text(encoding="utf-8").splitlines())
            if lines > 500:
                yield f"{lines} lines"
            for function in functions(file):
                size = function.end_lineno - function.lineno + 1
                if size > 60:
                    yield f"{function.name} has {size} lines"

        assert offenders(check) == []

    def test_a_folder_has_at_most_14_files(self):
        sizes = Counter(file.parent for file in FILES if file.name != "__init__.py")
        assert [f"{folder.name}: {size}" for folder, size in sizes.items() if size > 14] == []

    def test_nine_functions_of_ten_have_fewer_than_40_lines(self):
        sizes = sorted(
            function.end_lineno - function.lineno + 1
            for file in FILES
            for function in functions(file)
        )
        assert sizes[len(sizes) * 9 // 10] < 40

    def test_no_folder_in_a_folder(self):
        folders = [
            path for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"
        ]
        inner = [path for folder in folders for path in folder.iterdir() if path.is_dir()]
        images = PACKAGE / "guides" / "images"
        assert folders and [path for path in inner if path.name != "__pycache__"] in ([], [images])

    def test_no_code_in_an_init_but_the_group_and_the_package(self):
        inits = [file for file in FILES if file.name == "__init__.py" and file.stat().st_size]
        assert {module_name(file) for file in inits} == {"lmcli", "lmcli.commands"}

    def test_what_is_public_says_what_it_does(self):
        def check(file):
            tree = tree_of(file)
            yield from (name for name, node in public(tree.body) if not ast.get_docstring(node))
            if file.name not in ("__init__.py", "__main__.py") and not ast.get_docstring(tree):
                yield "the file itself"

        assert offenders(check) == []


def assigned_constants(tree):
    """Names of the module's classes and upper-case constants."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield node.name
        elif isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            yield from (name for name in names if name.isupper())


class TestRules:
    def test_a_class_or_constant_name_stands_once(self):
        files = defaultdict(list)
        for file in FILES:
            for name in set(assigned_constants(tree_of(file))):
                files[name].append(str(file.relative_to(PACKAGE)))
        assert {name: where for name, where in files.items() if len(where) > 1} == {}

    def test_no_other_file_tests_the_name_of_an_objective(self):
        names = "|".join(OBJECTIVES)
        test = re.compile(
            r"objective(\.name)?\s*(==|!=|\bin\b|\bnot in\b)|"
            rf"\.name\s*(==|in)\s*\(?[\"']({names})\b"
        )

        def check(file):
            if part(module_name(file)) != "config":
                lines = file.read_text(encoding="utf-8").splitlines()
                yield from (line.strip() for line in lines if test.search(line))

        assert offenders(check) == []

    def test_no_other_file_tests_the_name_of_a_family(self):
        names = "|".join(map(re.escape, FAMILIES))
        test = re.compile(rf"(model_type|family\.name)\s*(==|!=|in)\s*\(?[\"']({names})[\"']")

        def check(file):
            lines = file.read_text(encoding="utf-8").splitlines()
            yield from (line.strip() for line in lines if test.search(line))

        assert offenders(check) == []

    def test_configurations_are_frozen(self):
        kinds = (Recipe, ModelConfig, TrainConfig, TokenizerConfig, GenerateConfig, DocumentFormat)
        mutable = [
            kind.__name__ for kind in (*kinds, Source) if not kind.__dataclass_params__.frozen
        ]
        assert mutable == []

    def test_the_readable_model_does_not_mention_its_fast_path(self):
        machinery = re.compile(r"\b(fused|kernels?|packed|packs|recompute\w*|compiled)\b")
        failures, total = [], 0
        for name in ("layers", "attention", "transformer", "heads"):
            lines = (PACKAGE / "model" / f"{name}.py").read_text(encoding="utf-8").splitlines()
            failures += [f"{name}: {line.strip()}" for line in lines if machinery.search(line)]
            total += len(lines)
        assert failures == [] and total < 1100

    def test_a_run_is_short(self):
        def size(file, name):
            tree = ast.parse((PACKAGE / "runs" / file).read_text(encoding="utf-8"))
            (node,) = (node for node in tree.body if getattr(node, "name", "") == name)
            return node.end_lineno - node.lineno + 1

        assert size("run.py", "TrainingRun") < 180 and size("start.py", "start") < 60

    def test_no_field_of_a_run_is_set_from_outside(self):
        def check(file):
            if part(module_name(file)) in ("runs", "training", "commands", "planning"):
                tree = tree_of(file)
                for node in ast.walk(tree):
                    targets = node.targets if isinstance(node, ast.Assign) else []
                    for target in targets:
                        text = ast.unparse(target)
                        if re.match(r"(run|trainer|train_step|source|recipe|config)\.\w", text):
                            yield f"{node.lineno} sets {text}"

        assert offenders(check) == []


def narrows(test):
    """True if an assertion only tells mypy a type: `is not None`, isinstance, or a value is set."""
    if isinstance(test, ast.BoolOp):
        return all(map(narrows, test.values))
    if isinstance(test, ast.Compare):
        return isinstance(test.ops[0], ast.IsNot) and ast.unparse(test.comparators[0]) == "None"
    if isinstance(test, ast.Call):
        return ast.unparse(test.func) == "isinstance"
    return isinstance(test, ast.Name | ast.Attribute)


def test_no_assert_validates_a_value():
    """With PYTHONOPTIMIZE=1 there are none; what input can cause is an error of its own."""

    def check(file):
        for node in ast.walk(tree_of(file)):
            if isinstance(node, ast.Assert) and not narrows(node.test):
                yield f"assert {ast.unparse(node.test)}"

    assert offenders(check) == []
