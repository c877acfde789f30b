"""What a shell offers for a word: presets, models, runs, keys of `--set`, columns, topics."""

import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

Offer = tuple[str, str, str]  # a word, its meaning, and how click's scripts take it
GUIDES_FOLDER = Path(__file__).resolve().parent.parent / "guides"
MODEL_MARKS = ("config.json", "adapter_config.json")  # a folder with one of these is a model
RUN_MARKS = ("state",)
FIRST_BYTES = 1 << 18  # of a file, in which its columns are looked for


def candidates(
    names: Collection[str], metavar: str, word: str, typed: Sequence[str]
) -> list[Offer]:
    """What may stand for `word`, the value of the option or argument with one of these names.

    `typed` are the command's words before it. FILE and DIR are left to the shell.
    """
    for name in names:
        if name in COMPLETERS:
            return [offer for offer in COMPLETERS[name](word, typed) if offer[0].startswith(word)]
    if re.search(r"FILE|DATA", metavar):
        return [(word, "", "file")]
    return [(word, "", "dir")] if "DIR" in metavar else []


def _presets(word: str, typed: Sequence[str]) -> Iterator[Offer]:
    from lmcli.recipes import find_preset, preset_names

    for name in preset_names():
        with find_preset(name).open(encoding="utf-8") as file:
            yield name, file.readline().strip("# \n"), "plain"
    yield from _paths(word, (), (".yaml", ".yml"))


def _models(word: str, typed: Sequence[str]) -> Iterator[Offer]:
    from lmcli.checkpoints import hub

    yield from _paths(word, MODEL_MARKS, (".gguf",))
    if "/" not in word:
        yield from _paths("runs/", MODEL_MARKS)
    yield from ((name, "", "plain") for name in hub.cached_names())


def _runs(word: str, typed: Sequence[str]) -> Iterator[Offer]:
    yield from _paths(word, RUN_MARKS)
    if "/" not in word:
        yield from _paths("runs/", RUN_MARKS)


def _paths(word: str, marks: Collection[str], suffixes: tuple[str, ...] = ()) -> Iterator[Offer]:
    """Folders that hold a file of `marks`, other folders to go into, files with such suffixes."""
    parent = word.rpartition("/")[0] + "/" if "/" in word else ""
    start = word[len(parent) :]
    with os.scandir(os.path.expanduser(parent) or ".") as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            name = parent + entry.name
            hidden = entry.name.startswith(".") and not start.startswith(".")
            if hidden or not entry.name.startswith(start):
                continue
            if not entry.is_dir():
                if suffixes and entry.name.endswith(suffixes):
                    yield name, "", "plain"
            elif any(os.path.exists(os.path.join(entry.path, mark)) for mark in marks):
                yield name, "", "plain"
            else:
                yield f"{name}/", "", "plain"


def _settings(word: str, typed: Sequence[str]) -> Iterator[Offer]:
    """Sections, then keys of one, then the values of a key that has choices."""
    from lmcli.catalog.keys import key_rows
    from lmcli.config import SECTIONS

    key, equals, _ = word.partition("=")
    if "." not in word:
        yield from ((f"{section}.", "", "plain") for section in SECTIONS)
        return
    for row in key_rows():
        if not equals:
            yield f"{row['key']}=", row["meaning"], "plain"
        elif row["key"] == key and row["type"] in ("a word", "true or false"):
            yield from ((f"{key}={value}", "", "plain") for value in row["range"].split(", "))


def _column_list(word: str, typed: Sequence[str]) -> Iterator[Offer]:
    """Columns of the file on the line, after commas and ROLE=."""
    before = word[: max(word.rfind(","), word.rfind("=")) + 1]
    taken = re.split("[,=]", before)
    for offer, _, kind in _columns("", typed):
        if offer not in taken:
            yield before + offer, "", kind


def _columns(word: str, typed: Sequence[str]) -> Iterator[Offer]:
    """Columns of the first file on the line that has rows."""
    # COMP_WORDS has what follows the word, too
    for file in [*typed, *os.environ.get("COMP_WORDS", "").split()]:
        if Path(file).is_file() and (names := column_names(file)):
            yield from ((name, "", "plain") for name in names)
            return


def column_names(file: str) -> list[str]:
    """The columns of a table, or the fields of the first row of JSON Lines; none of a text."""
    from lmcli.data import rows
    from lmcli.data.files import open_bytes

    format = rows.file_format(file, "auto")
    if format == "text" or file.endswith(".parquet"):  # to import its reader takes too long
        return []
    with open_bytes(file) as handle:
        chunk = handle.read(FIRST_BYTES) or b""
    first = chunk.removeprefix(b"\xef\xbb\xbf").lstrip().partition(b"\n")[0].decode().rstrip("\r")
    if format in rows.TABLES:
        return rows.split_cells(first, format)
    return list(rows.parse_json_row(first))


def _topics(word: str, typed: Sequence[str]) -> Iterator[Offer]:
    if typed == ["preset"]:
        yield from _presets(word, typed)
    elif typed == ["keys"]:
        yield from _key_names(word)
    elif not typed:
        names = [*(file.stem for file in sorted(GUIDES_FOLDER.glob("*.md"))), "preset", "keys"]
        yield from ((name, "", "plain") for name in names)


def _key_names(word: str) -> Iterator[Offer]:
    from lmcli.catalog.keys import key_rows
    from lmcli.config import SECTIONS

    yield from ((section, "", "plain") for section in SECTIONS)
    yield from ((row["key"], row["meaning"], "plain") for row in key_rows())


Completer = Callable[[str, Sequence[str]], Iterator[Offer]]
COMPLETERS: dict[str, Completer] = {
    "--preset": _presets,
    **dict.fromkeys(("--model", "--from", "name"), _models),
    "--resume": _runs,
    "names": lambda word, typed: _paths(word, MODEL_MARKS, ("",)),
    "--set": _settings,
    **dict.fromkeys(("--fields", "--keep"), _column_list),
    **dict.fromkeys(
        ("--field", "--by", "--choices-field", "--prefix-field", "--reference-field"), _columns
    ),
    "--prediction-field": _columns,
    "words": _topics,
}
