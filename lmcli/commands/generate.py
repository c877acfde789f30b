"""lm generate: continues, translates or completes prompts, from arguments or lines of input."""

import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lmcli.commands import options
from lmcli.errors import ClosedPipe, UsageError

if TYPE_CHECKING:
    from lmcli.api import Model
    from lmcli.data.output_file import OutputFile
    from lmcli.generation.decoding import Generated
    from lmcli.generation.prompts import Prompt, Prompts
    from lmcli.output.generate import GenerationFormat

SAMPLING = (
    *("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "typical_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "no_repeat_ngram_size"),
    *("logit_bias", "ban", "min_new_tokens", "regex", "choices", "json_schema"),
    *("num_beams", "length_penalty", "early_stopping"),
)
SAMPLES_AT_ONCE = 64  # samples of a prompt that are drawn at the same time, from one prefill
ALTERNATIVES = 5  # of each step, with --why


def _limited(name: str, low: float, high: float, help: str) -> options.Option:
    return click.option(name, type=click.FloatRange(low, high), metavar="X", help=help)


def _count(name: str, help: str, at_least: int = 0, **attributes: Any) -> options.Option:
    return options.number(name, at_least=at_least, metavar="N", help=help, **attributes)


draws = options.section(
    "Sampling",
    _limited("--temperature", 0, 100, "0: always the likeliest token.  [default: 0.8]"),
    _limited("--top-p", 0, 1, "Draw from the likeliest share.  [default: 0.95]"),
    options.rare(
        _count("--top-k", "Sample from the N likeliest tokens; 0: from all."),
        _limited("--min-p", 0, 1, "Sample from those this likely, relative to the likeliest."),
        _limited(
            "--typical-p", 0, 1, "Sample from those of typical surprisal, with this probability."
        ),
        _count("--best-of", "Draw N texts; write those of the highest mean logprob.", 1),
    ),
    _count("--num-samples", "Texts for each prompt.", 1, default=1),
    _count("--seed", "For the same texts again.  [default: random]"),
)
rules = options.section(
    "Rules on tokens",
    options.rare(
        _limited("--repetition-penalty", 0.01, 100, "Above 1: avoid tokens seen before."),
        _limited("--presence-penalty", -100, 100, "Taken from the logit of each generated token."),
        _limited("--frequency-penalty", -100, 100, "The same, times how often it was generated."),
        _count("--no-repeat-ngram-size", "Never repeat an n-gram of this length."),
        options.repeated(
            "--logit-bias", metavar="TOKEN=X", help="Add X to the logit of a text or id."
        ),
        options.repeated("--ban", metavar="TEXT", help="Never write TEXT; may be repeated."),
        _count("--min-new-tokens", "New tokens before a text may end."),
    ),
)
form = options.section(
    "Form of the text (needs the extra structure)",
    options.rare(
        click.option("--regex", metavar="REGEX", help="The whole text matches this expression."),
        click.option("--choices", metavar="A,B", help="The text is one of these; or a JSON list."),
    ),
    click.option(
        "--json-schema", metavar="FILE|JSON", help="The text is JSON, in one line, of this schema."
    ),
)
beam_search = options.section(
    "Beam search",
    options.rare(
        click.option(
            "--length-penalty",
            type=float,
            metavar="X",
            help="Beams are ranked by logprob / length^X.  [default: 1]",
        ),
        options.choice(
            "--early-stopping",
            values=["false", "true", "never"],
            help="End when there are as many texts as beams (true), when a longer text is unlikely "
            "to win (false), when none can (never).  [default: false]",
        ),
    ),
)


@options.command(
    """
  lm generate -m runs/s "Once upon a time"
  lm generate -m runs/s --temperature 0 -n 50 --stop "." "The"
  lm generate -m runs/s < prompts.txt > continuations.txt
  lm generate -m chat-model --chat "What is a llama?"
  lm generate -m marian-en-de --num-beams 4 < english.txt > german.txt
  lm generate -m runs/s --num-samples 3 --seed 1 --json "Once"
  lm generate -m runs/s --why -n 20 "Once upon"
  lm generate -m chat-model --json --format jsonl < messages.jsonl
  echo 'Paris is the [MASK] of France.' | lm generate -m bert --num-samples 5
""",
    guide="generating",
)
@click.argument("prompts", nargs=-1, metavar="[PROMPT]...")
@options.model
@options.generation_limits
@draws
@rules
@form
@beam_search
@click.option(
    "--chat/--no-chat", default=None, help="Each prompt is a user's message to the model."
)
@click.option("--system", metavar="TEXT", help="System message of the chat; implies --chat.")
@options.rare(
    options.flag("-i", "--interactive", help="Talk at the terminal.  [default: without PROMPT]")
)
@options.rare(
    options.choice(
        "--on-long",
        values=["error", "slide", "truncate"],
        help="Prompt longer than the context: stop, read its newest half, or cut it to leave room "
        "for -n tokens.  [default: error]",
    )
)
@options.section(
    "Output",
    options.flag("--why", help="Show each token with its best alternatives."),
    options.rare(
        options.flag("--echo", help="Write the prompt before its continuation."),
        _count("--logprobs", "With --json or --why: the N best alternatives of each token.", 1),
        options.flag("--raw", help="From standard input: write text as it is, line ends included."),
        options.flag(
            "-0",
            "zero",
            help="From standard input: separate prompts and results by NUL, unescaped.",
        ),
    ),
)
@options.section(
    "Data", options.rare(options.flag("--whole", help="Read all of standard input as one prompt."))
)
@options.rare(options.row_format)
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
    from lmcli.generation.prompts import slid_note
    from lmcli.terminal.wrapping import WordWrap, columns_of

    model = options.load_model(args.model, args, generating=True)
    sampling = _sampling(args)
    logprobs = args.logprobs or (ALTERNATIVES if args.why else None)
    noted = {"logprobs": logprobs, "on_long": args.on_long}
    decoder = model.decoder(args.stop, args.bos, **sampling, **noted)
    if not args.pool.is_leader:
        return args.pool.serve(batch_generation.remote_task(decoder))
    seed = batch_generation.new_seed() if args.seed is None else args.seed
    if args.verbose:
        click.echo(f"lm: seed {seed}", err=True)
    note = (lambda _: None) if args.quiet else display.note
    if interactive:
        return _talk(model, seed, sampling, note, args)
    if model.checkpoint.ignored:
        note(model.checkpoint.ignored)
    prompts = _prompts(model, decoder, note, args)
    batches = prompts.batches(args.prompts, args.whole, args.zero)
    can_stream = batch_generation.can_stream(decoder) and not (args.as_json or args.why)
    wrap = None if args.as_json or args.zero else WordWrap(partial(columns_of, sys.stdout)).push
    texts = _Texts(model, _style(model, args), OutputFile(styled=args.why, draw=wrap))
    with texts.out:
        if _from_arguments(args) and not args.best_of and can_stream:
            _stream(texts, decoder, batches, seed, args)
        else:
            _write(texts, decoder, batches, seed, args)
    prompts.report_skipped()
    if texts.cut and vars(decoder).get("structure"):
        cut = "1 text was" if texts.cut == 1 else f"{texts.cut} texts were"
        note(f"{cut} cut before having the form; -n gives more tokens")
    if texts.slid:
        note(slid_note(texts.slid, model.context))
    if args.verbose:
        display.note(texts.speed(decoder.first_token_at))


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
        "--on-long": args.on_long,
        "--why": args.why,
        "--logprobs": args.logprobs,
    }
    given = [name for name, value in in_a_loop.items() if value]
    unread = ["PROMPT"] if args.prompts and "-" not in args.prompts else []
    unread += [name for name in ("-0", "--whole") if name in given]
    excluded: dict[str, list[str]] = {
        "-i": given if args.interactive else [],
        "--system": ["--no-chat"] if args.system is not None and args.chat is False else [],
        "--why": [name for name in ("--json", "-0") if args.why and name in given],
        **{name: unread for name in ("--format", "--field") if name in given},
    }
    if args.logprobs and not (args.as_json or args.why):
        raise UsageError("--logprobs needs --json or --why", hint="add one of them")
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


def _talk(
    model: "Model",
    seed: int,
    sampling: dict[str, Any],
    note: Callable[[str], None],
    args: options.Arguments,
) -> None:
    """The loop at a terminal: a conversation if the model has a chat template."""
    from lmcli.generation import conversation

    has_template = bool(model.tokenizer.settings.get("chat_template"))
    chat = model.chat(args.system) if args.chat or (args.chat is None and has_template) else None
    what = "a conversation" if chat else "each line is continued"
    note(f"{model.name}: {what}; /help shows commands, Ctrl-D ends")
    session = conversation.Session(model, chat, sampling, args.stop, args.bos, seed, note)
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
        hint = 'give a file with a JSON schema, or the schema itself: {"type": …}'
        raise UsageError(f"{value}: {reason}", "--json-schema", hint) from error


def _from_arguments(args: options.Arguments) -> bool:
    """True if prompts are arguments alone, so that each has its result as it is."""
    return bool(args.prompts) and "-" not in args.prompts


def _prompts(
    model: "Model", decoder: Any, note: Callable[[str], None], args: options.Arguments
) -> "Prompts":
    from lmcli.generation.prompts import Prompts

    return Prompts(
        partial(model.prompt, bos=args.bos),
        decoder.fit,
        args.on_error,
        note,
        partial(model.chat, args.system),
        bool(args.chat),
        args.format_,
        args.fields,
    )


def _style(model: "Model", args: options.Arguments) -> "GenerationFormat":
    """How texts are written: on a terminal with their prompts, and parted from other samples."""
    from shutil import get_terminal_size

    from lmcli.output.generate import GenerationFormat, WhyFormat
    from lmcli.terminal.painted_text import color_legend
    from lmcli.terminal.tables import fit
    from lmcli.text.characters import shows_color

    shape, terminal = model.config.shape, sys.stdout.isatty()
    style: dict[str, Any] = {
        "as_json": args.as_json,
        "echo": args.echo,
        "raw": args.raw or _from_arguments(args) or args.whole or args.why,
        "end": "\0" if args.zero else "\n",
        # a filled text repeats its prompt, and what a chat template writes is not for people
        "shows_prompt": terminal and shape != "encoder" and not args.chat and not args.zero,
        "after_prompt": "" if shape == "decoder" else "\n",
        "samples": args.num_samples if terminal else 1,
    }
    if not args.why:
        return GenerationFormat(**style)
    colors = shows_color(sys.stdout)
    if colors and not args.quiet and sys.stderr.isatty():
        click.echo(f"lm: {color_legend()}", err=True)
    return WhyFormat(
        **style,
        tokenizer=model.tokenizer,
        continues=shape == "decoder",
        colors=colors,
        columns=get_terminal_size().columns if terminal else None,
        fit=fit,
    )


@dataclass
class _Texts:
    """The texts that were written, and counts of them: all, cut ones, those beyond the context."""

    model: "Model"
    style: "GenerationFormat"
    out: "OutputFile"
    count: int = 0
    tokens: int = 0
    cut: int = 0
    slid: int = 0

    def __post_init__(self) -> None:
        self._start = time.perf_counter()

    def begin(self, prompt: "Prompt", sample: int) -> bool:
        """Writes what stands before a text; returns whether that is anything."""
        before = self.style.before(prompt, sample)
        self.out.write(before, dim=True)
        return bool(before)

    def check(self, prompt: "Prompt", number: int, result: "Generated") -> "Generated":
        """Counts a result of prompt `number`, from 1. Raises UserError for one with a problem."""
        from lmcli.generation.decoding import slid

        self.model.checked(result, f"prompt {number:,} ({prompt.text[:40]!r})")
        self.count += 1
        self.tokens += len(result.tokens)
        self.cut += result.finish_reason == "length"
        self.slid += slid(self.model.config, prompt.ids or [], result)
        return result

    def speed(self, first_token_at: float | None) -> str:
        """How fast they came, for people."""
        from lmcli.generation.batch_generation import speed

        first = None if first_token_at is None else first_token_at - self._start
        return speed(self.count, self.tokens, first, time.perf_counter() - self._start)


def _write(
    texts: _Texts, decoder: Any, batches: Iterable[Any], seed: int, args: options.Arguments
) -> None:
    """Writes the results of each prompt when they are ready."""
    from lmcli.generation import batch_generation
    from lmcli.generation.decoding import Generated

    count, best_of = args.num_samples, args.best_of or 0
    empty = [Generated("", None, [], [], None)] * count  # type: ignore[arg-type]  # no text at all
    each = batch_generation.generate_each(
        decoder, batches, seed, count, args.batch_tokens or 0, args.pool, best_of
    )
    for number, (prompt, results) in enumerate(each, 1):
        for sample, result in enumerate(results if prompt.ids else empty):
            if prompt.ids:
                texts.check(prompt, number, result)
            texts.begin(prompt, sample)
            texts.out.write(texts.style.format(prompt, result))
        texts.out.flush()


def _stream(
    texts: _Texts, decoder: Any, batches: Iterable[Any], seed: int, args: options.Arguments
) -> None:
    """Writes each text while it is generated, samples one by one."""
    from lmcli.generation.batch_generation import row_by_row

    out = texts.out
    for number, prompt in enumerate(prompt for batch in batches for prompt in batch):
        for start in range(0, args.num_samples, SAMPLES_AT_ONCE):
            count = min(SAMPLES_AT_ONCE, args.num_samples - start)
            first = seed + number * args.num_samples + start
            seeds = list(range(first, first + count))
            sample, in_line = start, texts.begin(prompt, start)
            out.flush()
            try:
                for chunk in row_by_row(decoder.stream([prompt.ids] * count, seeds)):
                    out.write(chunk.text)
                    in_line = True
                    if chunk.result:
                        texts.check(prompt, 1 + number, chunk.result)
                        out.write("\n")
                        sample += 1
                        in_line = sample < start + count and texts.begin(prompt, sample)
                    if chunk.text or chunk.result:
                        out.flush()
            finally:
                try:  # after Ctrl-C too the shell's prompt starts on a new line
                    out.write("\n" if in_line else "")
                    out.flush()
                except ClosedPipe:
                    pass
