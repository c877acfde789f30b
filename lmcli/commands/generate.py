"""lm generate: continues, translates or completes prompts, from arguments or lines of input."""

import json
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lmcli.commands import options
from lmcli.errors import ClosedPipe, UsageError

if TYPE_CHECKING:
    from lmcli.api import Model
    from lmcli.data.output_file import OutputFile
    from lmcli.output.generate import GenerationFormat

SAMPLING = (
    *("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "typical_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "no_repeat_ngram_size"),
    *("logit_bias", "ban", "min_new_tokens", "regex", "choices", "json_schema"),
    *("num_beams", "length_penalty", "early_stopping"),
)
SAMPLES_AT_ONCE = 64  # samples of a prompt that are drawn at the same time, from one prefill


def _limited(name: str, low: float, high: float, help: str) -> options.Option:
    return click.option(name, type=click.FloatRange(low, high), metavar="X", help=help)


def _count(name: str, help: str, at_least: int = 0, **attributes: Any) -> options.Option:
    return options.number(name, at_least=at_least, metavar="N", help=help, **attributes)


draws = options.section(
    "Sampling",
    _limited("--temperature", 0, 100, "0 is greedy decoding.  [default: 0.8]"),
    _count("--top-k", "Sample from the N likeliest tokens; 0: from all."),
    _limited("--top-p", 0, 1, "Sample from the likeliest with this probability.  [default: 0.95]"),
    _limited("--min-p", 0, 1, "Sample from those this likely, relative to the likeliest."),
    _limited("--typical-p", 0, 1, "Sample from those of typical surprisal, with this probability."),
    _count("--num-samples", "Texts for each prompt, which is read once.", 1, default=1),
    _count("--best-of", "Draw N texts; write those of the highest mean logprob.", 1),
    _count("--seed", "Random seed, for the same text again.  [default: random; see -v, --json]"),
)
rules = options.section(
    "Rules on tokens",
    _limited("--repetition-penalty", 0.01, 100, "Above 1: avoid tokens seen before."),
    _limited("--presence-penalty", -100, 100, "Taken from the logit of each generated token."),
    _limited("--frequency-penalty", -100, 100, "The same, times how often it was generated."),
    _count("--no-repeat-ngram-size", "Never repeat an n-gram of this length."),
    options.repeated("--logit-bias", metavar="TOKEN=X", help="Add X to the logit of a text or id."),
    options.repeated("--ban", metavar="TEXT", help="Never write TEXT; may be repeated."),
    _count("--min-new-tokens", "New tokens before a text may end."),
)
form = options.section(
    "Form of the text (the extra structure)",
    click.option("--regex", metavar="REGEX", help="The whole text matches this expression."),
    click.option(
        "--choices", metavar="A,B", help="The text is one of these; or a JSON list of texts."
    ),
    click.option(
        "--json-schema", metavar="FILE|JSON", help="The text is JSON, in one line, of this schema."
    ),
)
beam_search = options.section(
    "Beam search",
    click.option(
        "--length-penalty",
        type=float,
        metavar="X",
        help="Beams are ranked by logprob / length^X.  [default: 1]",
    ),
    options.choice(
        "--early-stopping",
        values=["false", "true", "never"],
        help="End when there are as many texts as beams (true), when a longer text is unlikely to "
        "win (false), when none can (never).  [default: false]",
    ),
)


@options.command("""
  lm generate -m runs/s "Once upon a time"
  lm generate -m runs/s --temperature 0 -n 50 --stop "." "The"
  lm generate -m runs/s --num-samples 3 --seed 1 --json "Once"
  lm generate -m runs/s < prompts.txt > continuations.txt
  lm generate -m marian-en-de --num-beams 4 < english.txt > german.txt
  lm generate -m chat-model --chat "What is a llama?"
  lm generate -m chat-model --json --format jsonl < messages.jsonl
  echo 'Paris is the [MASK] of France.' | lm generate -m bert --num-samples 5
""")
@click.argument("prompts", nargs=-1, metavar="[PROMPT]...")
@options.model
@options.generation_limits
@draws
@rules
@form
@beam_search
@click.option(
    "--chat/--no-chat",
    default=None,
    help="Each prompt is a user's message, written in the model's chat template.",
)
@click.option(
    "--system", metavar="TEXT", help="System message of every conversation; implies --chat."
)
@options.flag(
    "-i",
    "--interactive",
    help="Converse, or continue prompts, at the terminal.  [default without a PROMPT there]",
)
@options.flag("--echo", help="Write the prompt before its continuation.")
@options.flag("--whole", help="Read all of standard input as one prompt.")
@options.flag("--raw", help="From standard input: write text as it is, line ends included.")
@options.flag(
    "-0", "zero", help="From standard input: separate prompts and results by NUL, unescaped."
)
@options.row_format
@options.on_error
@options.bos
@options.json_output
@options.hardware
@options.quantize
@options.batch_tokens
@options.quiet
@options.verbose
@options.multiprocess
def generate(args: options.Arguments) -> None:
    """Continues prompts; an encoder-decoder rewrites them (T5, Marian), an encoder fills masks.

    Each PROMPT argument is one prompt, and its result is written as it is. Without arguments each
    line of standard input is one, and each gives one line (backslash, newline, CR and tab escaped);
    with --format each row is one. At a terminal, without a prompt, it is a conversation.

    Only new text is written. Defaults come from the folder's generation_config.json, beam search
    included; a --temperature above 0 samples instead. If nothing is set, a decoder samples, and
    other models decode greedily.
    """
    interactive = _check(args)
    from lmcli import display
    from lmcli.data.output_file import OutputFile
    from lmcli.generation import batch_generation
    from lmcli.generation.prompts import Prompts
    from lmcli.output.generate import GenerationFormat

    model = options.load_model(args.model, args, generating=True)
    sampling = _sampling(args)
    decoder = model.decoder(args.stop, args.bos, **sampling)
    if not args.pool.is_leader:
        return args.pool.serve(batch_generation.remote_task(decoder))
    seed = batch_generation.new_seed() if args.seed is None else args.seed
    if args.verbose:
        click.echo(f"lm: seed {seed}", err=True)
    if interactive:
        return _talk(model, seed, sampling, args)
    from_arguments = args.prompts and "-" not in args.prompts
    raw = args.raw or bool(from_arguments) or args.whole
    style = GenerationFormat(args.as_json, args.echo, raw, "\0" if args.zero else "\n")
    note = (lambda _: None) if args.quiet else display.note
    if model.checkpoint.ignored:
        note(model.checkpoint.ignored)
    encode = partial(model.prompt, bos=args.bos)
    prompts = Prompts(
        encode,
        model.config,
        args.on_error,
        note,
        partial(model.chat, args.system),
        bool(args.chat),
        args.format_,
        args.fields,
    )
    batches = prompts.batches(args.prompts, args.whole, args.zero)
    can_stream = batch_generation.can_stream(decoder)
    with OutputFile() as out:
        if from_arguments and not args.as_json and not args.best_of and can_stream:
            cut = _stream(out, model, decoder, batches, seed, args)
        else:
            cut = _write(out, model, decoder, batches, seed, style, args)
    if cut and vars(decoder).get("structure"):
        texts = "1 text was" if cut == 1 else f"{cut} texts were"
        note(f"{texts} cut before having the form; -n gives more tokens")
    prompts.report_skipped()


def _check(args: options.Arguments) -> bool:
    """True for a loop at the terminal. Raises UsageError for what does not go together."""
    if "" in args.stop:
        raise UsageError("must not be empty", where="--stop", hint="leave it out")
    if args.system is not None and args.chat is None:
        args.chat = True
    in_a_loop: dict[str, Any] = {  # what has no place there
        "PROMPT": args.prompts,
        "--json": args.as_json,
        "--num-samples": args.num_samples > 1,
        "--best-of": args.best_of,
        "--echo": args.echo,
        "--raw": args.raw,
        "-0": args.zero,
        "--whole": args.whole,
        "--format": args.format_ != "auto",
        "--field": args.fields,
        "--nproc": args.nproc > 1,
    }
    given = [name for name, value in in_a_loop.items() if value]
    unread = ["PROMPT"] if args.prompts and "-" not in args.prompts else []
    unread += [name for name in ("-0", "--whole") if name in given]
    excluded: dict[str, list[str]] = {
        "-i": given if args.interactive else [],
        "--system": ["--no-chat"] if args.system is not None and args.chat is False else [],
        **{name: unread for name in ("--format", "--field") if name in given},
    }
    for first, others in excluded.items():
        for second in others:
            raise UsageError(
                f"{first} and {second} exclude each other", hint="leave one of them out"
            )
    at_terminal = args.pool.is_leader and not args.prompts and sys.stdin.isatty()
    if at_terminal and given:
        raise click.UsageError(
            "no prompt: give one, or pipe prompts in", click.get_current_context()
        )
    return args.interactive or at_terminal


def _talk(model: "Model", seed: int, sampling: dict[str, Any], args: options.Arguments) -> None:
    """The loop at a terminal: a conversation if the model has a chat template."""
    from lmcli import display
    from lmcli.generation import conversation

    has_template = bool(model.tokenizer.settings.get("chat_template"))
    chat = model.chat(args.system) if args.chat or (args.chat is None and has_template) else None
    if not args.quiet:
        what = "a conversation" if chat else "each line is continued"
        display.note(f"{model.name}: {what}; /help shows commands, Ctrl-D ends")
    session = conversation.Session(model, chat, sampling, args.stop, args.bos, seed, display.note)
    conversation.talk(session, args.quiet)


def _sampling(args: options.Arguments) -> dict[str, Any]:
    """The options of SAMPLING; None for those that are not given."""
    values = {name: getattr(args, name) for name in SAMPLING}
    values |= {"choices": _choices(args.choices), "json_schema": _schema(args.json_schema)}
    return {name: None if value == () else value for name, value in values.items()}


def _choices(text: str | None) -> list[str] | None:
    """The texts of --choices: a JSON list, or parted by commas."""
    if text is None or not text.startswith("["):
        return None if text is None else text.split(",")
    try:
        return json.loads(text)
    except ValueError as error:
        raise UsageError(f"not a JSON list: {error}", where="--choices") from error


def _schema(value: str | None) -> str | None:
    """The schema of --json-schema: JSON, or the text of a file."""
    if value is None or value.lstrip()[:1] == "{":
        return value
    try:
        return Path(value).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise UsageError(f"{value}: {reason}", where="--json-schema") from error


def _write(
    out: "OutputFile",
    model: "Model",
    decoder: Any,
    batches: Iterable[Any],
    seed: int,
    style: "GenerationFormat",
    args: options.Arguments,
) -> int:
    """Writes the results of each prompt when they are ready; returns how many were cut."""
    from lmcli.generation import batch_generation
    from lmcli.generation.decoding import Generated

    count, cut, best_of = args.num_samples, 0, args.best_of or 0
    empty = [Generated("", None, [], [], None)] * count  # type: ignore[arg-type]  # no text at all
    each = batch_generation.generate_each(
        decoder, batches, seed, count, args.batch_tokens or 0, args.pool, best_of
    )
    for number, (prompt, results) in enumerate(each, 1):
        for result in results if prompt.ids else empty:
            checked = model.checked(result, _place(number, prompt.text))
            out.write(style.format(prompt.text, checked, prompt.row))
            cut += result.finish_reason == "length"
        out.flush()
    return cut


def _place(number: int, prompt: str) -> str:
    """How messages name a prompt."""
    return f"prompt {number:,} ({prompt[:40]!r})"


def _stream(
    out: "OutputFile",
    model: "Model",
    decoder: Any,
    batches: Iterable[Any],
    seed: int,
    args: options.Arguments,
) -> int:
    """Writes each text while it is generated, samples one by one; returns how many were cut."""
    from lmcli.generation.batch_generation import row_by_row

    cut = 0
    for number, (prompt, ids, _) in enumerate(prompt for batch in batches for prompt in batch):
        for start in range(0, args.num_samples, SAMPLES_AT_ONCE):
            count = min(SAMPLES_AT_ONCE, args.num_samples - start)
            first = seed + number * args.num_samples + start
            seeds = list(range(first, first + count))
            new_text = True
            try:
                for chunk in row_by_row(decoder.stream([ids] * count, seeds)):
                    out.write((prompt if args.echo and new_text else "") + chunk.text)
                    new_text = chunk.result is not None
                    if chunk.result:
                        model.checked(chunk.result, _place(1 + number, prompt))
                        out.write("\n")
                        cut += chunk.result.finish_reason == "length"
                    if chunk.text or chunk.result:
                        out.flush()
            finally:
                try:  # after Ctrl-C too the shell's prompt starts on a new line
                    out.write("" if new_text else "\n")
                    out.flush()
                except ClosedPipe:
                    pass
    return cut
