"""lm info: facts about a model, run, tokenizer, weights file or text."""

import os
import shutil
import sys
from typing import TYPE_CHECKING

import click

from lmcli.commands import options
from lmcli.errors import UsageError, UserError

if TYPE_CHECKING:
    from lmcli.output.info import Summary
    from lmcli.text.tokenizer import Tokenizer


@options.command(
    """
  lm info                     the runs and models here and in the Hub's cache
  lm info runs/notes
  lm info bert-base-uncased
  lm info -m runs/notes notes.txt
  lm info runs/notes/tokenizer.json --json | jq .tokenizer.special
  lm info runs/* | awk -F'\\t' '$1 == "path" || $1 == "parameters.total"'
""",
    guide="training",
)
@click.argument("names", nargs=-1, metavar="[MODEL|RUN|FILE]...")
@options.section(
    "Model",
    click.option(
        "-m",
        "--model",
        metavar="DIR",
        help="Count the tokens of a text with this model's tokenizer.",
    ),
)
@options.section(
    "Data",
    options.repeated(
        "--field", "fields", metavar="NAME", help="Field of a JSON or TSV row that holds its text."
    ),
)
@options.json_output
@options.flag("-v", "--verbose", help="On a terminal, all facts: without it, what fits.")
def info(args: options.Arguments) -> None:
    """Describes a model, run, tokenizer or text; without a name lists the runs and models here.

    A tokenizer.json, a .safetensors file and a folder of texts may be named, too. A table on a
    terminal, the main facts first; in a pipe lines of key and value, or the list as TSV. Sizes are
    in bytes. Only the headers of weights are read, so large models are quick. Damage is reported
    with all facts that can still be read (exit code 1).
    """
    if not args.names:
        return _list_models(args)
    from lmcli.data.output_file import OutputFile, json_line
    from lmcli.output.facts import as_lines, as_table

    tokenizer = _tokenizer(args.model)
    damage: list[UserError] = []
    with OutputFile() as out:
        for number, name in enumerate(args.names):
            try:
                summary = _describe(name, tokenizer, args.fields)
            except UserError as error:
                damage.append(error)
                continue
            damage += summary.damage
            if args.as_json:
                out.write(json_line(summary.facts))
            else:
                text = as_lines(summary.facts)
                if sys.stdout.isatty():
                    size = shutil.get_terminal_size()
                    most = None if args.verbose else size.lines - 1  # the prompt needs one
                    text = as_table(summary.facts, size.columns, most)
                out.write("\n" * bool(number) + text)
            out.flush()
    if len(damage) > 1:
        from lmcli.display import note

        for problem in damage[:-1]:
            note(f"error: {problem}")
    if damage:
        raise UserError(damage[-1].what, damage[-1].where, damage[-1].hint)


def _list_models(args: options.Arguments) -> None:
    """Prints the runs and models here, and the models in the Hub's cache."""
    if args.model or args.fields:
        raise UsageError(
            "nothing to describe: give a model folder, a tokenizer.json or a text file",
            hint="see lm info --help",
        )
    from lmcli import display
    from lmcli.catalog import overview
    from lmcli.text.characters import visible

    here = overview.local_rows()
    cached, others = overview.cached_rows()
    rows = here + cached
    if not rows and not sys.stdout.isatty():
        display.note("no runs or models here; lm train TEXT makes one")
    if not sys.stdout.isatty() or args.as_json:
        if not args.as_json:
            rows = [{**row, "name": visible(row["name"], keep="")} for row in rows]
        display.print_rows(rows, overview.OVERVIEW_COLUMNS, args.as_json)
        return
    options.show(overview.readable(here, cached, others))


def _tokenizer(model: str | None) -> "Tokenizer | None":
    if not model:
        return None
    from lmcli.checkpoints import hub
    from lmcli.text import tokenizer as tokenizers

    return tokenizers.load(hub.find(model, weights=False))


def _describe(name: str, tokenizer: "Tokenizer | None", fields: tuple[str, ...]) -> "Summary":
    """The facts about a path, a name in the Hub's local cache, or - for standard input."""
    from lmcli.checkpoints import hub
    from lmcli.data.files import pin
    from lmcli.output import info as output

    if name != "-" and not os.path.lexists(name) and hub.is_hub_name(name):
        snapshot = hub.cached_snapshot(name) or hub.find_run(name)
        if snapshot is None:
            raise UserError(
                "no such file or folder, and no such model in the Hugging Face cache "
                f"({hub.cache_folder()})",
                where=name,
                hint="check the name, or download the model first",
            )
        summary = output.describe(str(snapshot), tokenizer, fields)
    else:
        path = pin(name)
        summary = output.describe(path, tokenizer, fields)
        if path != name:
            summary.facts["path"] = name
    if summary.config:
        from lmcli.catalog.abilities import abilities

        summary.facts["commands"] = [f"lm {command}" for command in abilities(summary.config)[1]]
    if summary.damage:
        summary.facts["damage"] = [f"{error.where}: {error.what}" for error in summary.damage]
    return summary
