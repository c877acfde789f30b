"""lm info: what a model, run, tokenizer, weights file or text is."""

import json
import shutil
import sys
import textwrap

import click

from lmcli.commands import options
from lmcli.errors import UsageError, UserError


@click.command(epilog="""\b
Examples:
  lm info runs/notes
  lm info bert-base-uncased
  lm info -m runs/notes notes.txt
  lm info runs/notes/tokenizer.json --json | jq .tokenizer.special
  lm info runs/* | awk -F'\\t' '$1 == "path" || $1 == "parameters.total"'""")
@click.argument("names", nargs=-1, metavar="MODEL|RUN|FILE...")
@click.option("-m", "--model", metavar="DIR", help="Count the tokens of a text with this model's tokenizer.")
@click.option("--field", "fields", multiple=True, metavar="NAME", help="Field of a JSON or TSV row that holds its text.")
@options.json_output
def info(names, model, fields, as_json):
    """Tells what a model folder, run folder, tokenizer.json, .safetensors file, text or folder of texts is.

    A table on a terminal, lines of key and value (tab-separated) in a pipe. Sizes are in bytes. Of weights only the
    headers are read, so this is quick however large a model is. Damage is named, and all else still told (exit code 1).
    """
    if not names:
        raise UsageError("what about? give a model folder, a tokenizer.json or a text file", hint="lm info --help")
    from lmcli.analysis import summary
    from lmcli.text.records import Output

    tokenizer = _tokenizer(model)
    damage = []
    with Output() as out:
        for number, name in enumerate(names):
            try:
                found = _described(name, tokenizer, fields, summary)
            except UserError as error:
                damage.append(error)
                continue
            facts = found.facts
            if found.config:
                from lmcli.api import abilities

                facts["commands"] = [f"lm {command}" for command in abilities(found.config)[1]]
            if found.damage:
                facts["damage"] = [f"{error.where}: {error.what}" for error in found.damage]
            damage += found.damage
            if as_json:
                out.write(json.dumps(facts, ensure_ascii=False) + "\n")
            else:
                out.write("\n" * bool(number) + (_table(facts) if sys.stdout.isatty() else _lines(facts)))
            out.flush()
    for error in damage[:-1]:
        click.echo(f"lm: error: {error}", err=True)
    if damage:
        raise UserError(damage[-1].what, damage[-1].where, damage[-1].hint)


def _tokenizer(model):
    if not model:
        return None
    from lmcli.checkpoints import hub
    from lmcli.text import tokenizer as tokenizers

    return tokenizers.load(hub.find(model, weights=False))


def _described(name, tokenizer, fields, summary):
    """The Summary of an argument: a path, a name in the hub's local cache, or - for standard input."""
    import os

    from lmcli.checkpoints import hub
    from lmcli.text.documents import pin_stdin

    if name == "-":
        found = summary.describe(pin_stdin(), tokenizer, fields)
        found.facts["path"] = "-"
        return found
    if not os.path.lexists(name) and hub.is_name(name):
        snapshot = hub.cached(name)
        if snapshot is None:
            raise UserError("no such file or folder, and no such model in Hugging Face's cache "
                            f"({hub.cache_folder()})", where=name)
        name = str(snapshot)
    return summary.describe(name, tokenizer, fields)


def _flat(facts):
    """(key, value) pairs: the keys of an inner object behind its own and a dot."""
    for key, value in facts.items():
        if isinstance(value, dict):
            yield from ((f"{key}.{inner}", found) for inner, found in value.items())
        else:
            yield key, value


def _lines(facts):
    from lmcli.text.records import escaped

    return "".join(f"{key}\t{escaped(_plain(value))}\n" for key, value in _flat(facts))


def _plain(value):
    if isinstance(value, dict):
        return ", ".join(f"{key}={_plain(found)}" for key, found in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    if value is None or isinstance(value, bool):
        return {None: "NA", True: "true", False: "false"}[value]
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _table(facts):
    """Two columns for a reader: sizes with their unit, shares of the parameters, long lists cut."""
    from lmcli.text.records import escaped

    pairs = [(key, escaped(_shown(key, value, facts))) for key, value in _flat(facts)]
    width = max(len(key) for key, _ in pairs) + 2
    room = max(20, shutil.get_terminal_size().columns - width)
    lines = []
    for key, text in pairs:
        first, *rest = textwrap.wrap(text, room, break_on_hyphens=False) or ["–"]
        lines += [f"{key:<{width}}{first}", *(" " * width + line for line in rest)]
    return "\n".join(lines) + "\n"


def _shown(key, value, facts):
    group, _, inner = key.partition(".")
    if isinstance(value, dict) and len(value) > 12:
        value = {**dict(list(value.items())[:12]), "…": f"{len(value) - 12} more"}
    if isinstance(value, list) and len(value) > 12:
        value = [*value[:12], f"… {len(value) - 12} more"]
    if isinstance(value, dict):
        return ", ".join(f"{name}={_shown('', found, facts)}" for name, found in value.items())
    if isinstance(value, bool) or not isinstance(value, int):
        return _plain(value)
    if "bytes" in key.replace(".", "_").split("_") or group == "memory":
        return _size(value)
    share = f" ({value / facts['parameters']['total']:.1%})" if group == "parameters" and inner != "total" else ""
    return f"{value:,}{share}"


def _size(count):
    """9,999 bytes, 12.3 kB, 4.5 MB …, in powers of 1,000."""
    if count < 10_000:
        return f"{count:,} bytes"
    unit, size = next((unit, size) for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if count >= size)
    return f"{count / size:.1f} {unit}"
