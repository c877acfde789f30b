"""lm help: the guides, and the help of each command."""

import difflib
import shutil
import sys
from pathlib import Path

import click

from lmcli.commands import COMMANDS, lm, options
from lmcli.errors import UsageError

GUIDES = Path(__file__).resolve().parent.parent / "guides"


@options.command("""
  lm help                  lists the guides
  lm help numbers          what each number means
  lm help train            the same as lm train --help
  lm help numbers > numbers.md
""")
@click.argument("topic", required=False, metavar="[TOPIC|COMMAND]")
def help(args: options.Arguments) -> None:
    """Shows a guide, or the help of a command; without TOPIC lists the guides.

    On a terminal a guide is formatted, with a pager if it is longer than the screen; elsewhere it
    is plain Markdown.
    """
    guides = {file.stem: file for file in sorted(GUIDES.glob("*.md"))}
    if not args.topic:
        click.echo(_list(guides))
    elif args.topic in guides:
        _show(guides[args.topic].read_text(encoding="utf-8"))
    elif args.topic in COMMANDS:
        context = click.get_current_context()
        command = lm.get_command(context, args.topic)
        assert command is not None  # every key of COMMANDS is a command
        parent = context.parent
        click.echo(click.Context(command, parent=parent, info_name=args.topic).get_help())
    else:
        near = difflib.get_close_matches(args.topic, [*guides, *COMMANDS], n=3, cutoff=0.5)
        raise UsageError(
            f"no guide or command is named {args.topic!r}"
            + (f"; did you mean {' or '.join(map(repr, near))}?" if near else ""),
            hint="run lm help for the list of guides, lm --help for the commands",
        )


def _list(guides: dict[str, Path]) -> str:
    """The topics with their titles, and how to show one."""
    width = max(map(len, guides), default=0)
    lines = []
    for topic, file in guides.items():
        with file.open(encoding="utf-8") as opened:
            lines.append(f"  {topic:<{width}}  {opened.readline().lstrip('#').strip()}")
    usage = "Show one with lm help TOPIC; lm help COMMAND shows the options of a command."
    return "\n".join(["Guides:", *lines, "", usage])


def _show(text: str) -> None:
    """Prints Markdown: rendered on a terminal, with a pager if it is long; as it is elsewhere."""
    if not sys.stdout.isatty():
        click.echo(text, nl=False)
        return
    from lmcli.display import markdown

    rendered = markdown(text)
    if rendered.count("\n") < shutil.get_terminal_size().lines:
        click.echo(rendered, nl=False)
    else:
        click.echo_via_pager(rendered)
