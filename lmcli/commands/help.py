"""lm help: the guides, the presets and their keys, and the help of each command."""

import sys
from pathlib import Path

import click

from lmcli.commands import COMMANDS, lm, options
from lmcli.errors import UsageError, nearest

GUIDES = Path(__file__).resolve().parent.parent / "guides"
OTHER_TOPICS = {  # topics beside the guides, and what they show
    "preset [NAME]": "the presets, or the YAML of one with its comments",
    "keys [SECTION|KEY]": "every key of a preset: meaning, default and range",
}


@options.command("""
  lm help                  lists the topics
  lm help training         a guide, as all that lm help lists
  lm help preset small     the values of a preset
  lm help keys train       the keys of a section: meaning, default, range
  lm help train            the same as lm train --help
  lm help numbers > numbers.md
  lm help preset small > mine.yaml     the beginning of your own
""")
@click.argument("words", nargs=-1, metavar="[TOPIC|COMMAND]")
def help(args: options.Arguments) -> None:
    """Shows a guide, presets and their keys, or the help of a command.

    Without TOPIC it lists the topics. On a terminal a guide is formatted, with a pager if it is
    longer than the screen; elsewhere it is plain Markdown, and lists are tab-separated.
    """
    guides = {file.stem: file for file in sorted(GUIDES.glob("*.md"))}
    topic, *rest = args.words or ("",)
    if len(rest) > (topic in ("preset", "keys")):
        raise UsageError(f"{' '.join(args.words)!r} is no topic", hint="give one: lm help TOPIC")
    if not topic:
        click.echo(_list(guides))
    elif topic == "keys":
        _show_keys(*rest)
    elif topic == "preset":
        _show_preset(*rest)
    elif topic in guides:
        _show(guides[topic].read_text(encoding="utf-8"))
    elif topic in COMMANDS:
        context = click.get_current_context()
        command = lm.get_command(context, topic)
        assert command is not None  # every key of COMMANDS is a command
        parent = context.parent
        click.echo(click.Context(command, parent=parent, info_name=topic).get_help())
    else:
        names = [*guides, *COMMANDS, "preset", "keys"]
        near = nearest(topic, names, count=3)
        raise UsageError(
            f"no guide or command is named {topic!r}"
            + (f"; did you mean {' or '.join(map(repr, near))}?" if near else ""),
            hint="run lm help for the list of guides, lm --help for the commands",
        )


def _list(guides: dict[str, Path]) -> str:
    """The topics with their titles, and how to show one."""
    titles = {}
    for topic, file in guides.items():
        with file.open(encoding="utf-8") as opened:
            titles[topic] = opened.readline().lstrip("#").strip()
    width = max(map(len, [*titles, *OTHER_TOPICS]))
    lines = ["Guides:", *(f"  {topic:<{width}}  {title}" for topic, title in titles.items())]
    lines += [
        "Reference:",
        *(f"  {topic:<{width}}  {what}" for topic, what in OTHER_TOPICS.items()),
    ]
    usage = "Show one with lm help TOPIC; lm help COMMAND shows the options of a command."
    lines += ["", usage]
    if sys.stdout.isatty():
        from lmcli.terminal.wrapping import columns_of, wrap

        lines = [wrap(line, columns_of(sys.stdout), width + 4) for line in lines[:-1]]
        lines.append(wrap(usage, columns_of(sys.stdout), 0))
    return "\n".join(lines)


def _show_keys(selection: str = "") -> None:
    """Prints keys of presets; those of one section, or one key."""
    from lmcli.catalog.keys import KEY_COLUMNS, key_rows

    def entry(row: dict[str, str]) -> tuple[str, ...]:
        value = "" if row["default"] == "–" else f"={row['default']}"
        return f"{row['key']}{value}", row["meaning"], f"({row['range'] or row['type']})"

    options.print_entries(key_rows(selection), KEY_COLUMNS, entry)


def _show_preset(name: str = "") -> None:
    """Prints the YAML of a preset; without a name the list of presets."""
    if not name:
        return options.print_presets()
    from lmcli.catalog.presets import preset_text
    from lmcli.text.characters import shows_color

    text = preset_text(name)
    if shows_color(sys.stdout):
        text = _dimmed(text)
    if sys.stdout.isatty():
        options.show(text)
    else:
        click.echo(text, nl=False)


def _dimmed(text: str) -> str:
    """YAML with its comments dimmed for a terminal."""
    lines = (line.partition("#") for line in text.splitlines())
    return "".join(
        f"{before}{click.style(mark + comment, dim=True) if mark else ''}\n"
        for before, mark, comment in lines
    )


def _show(text: str) -> None:
    """Prints Markdown: rendered on a terminal, with a pager if it is long; as it is elsewhere."""
    if not sys.stdout.isatty():
        click.echo(text, nl=False)
        return
    from lmcli.display import markdown

    options.show(markdown(text))
