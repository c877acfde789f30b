"""lm generate: continues prompts given as arguments, or one a line from standard input."""

import json
import sys

import click

from lmcli.commands import options
from lmcli.errors import ClosedPipe, UsageError, UserError

PROMPTS_AT_ONCE = 256


@click.command(epilog="""\b
Examples:
  lm generate -m runs/s "Once upon a time"
  lm generate -m runs/s --temperature 0 -n 50 --stop "." "The"
  lm generate -m runs/s --num-samples 3 --seed 1 --json "Once"
  lm generate -m runs/s < prompts.txt > continuations.txt""")
@click.argument("prompts", nargs=-1, metavar="[PROMPT]...")
@options.model
@click.option("-n", "--max-new-tokens", type=click.IntRange(min=1),
              help="Tokens at most.  [default: the folder's, else 256]")
@click.option("--temperature", type=click.FloatRange(0, 100), help="0 takes the likeliest token.  [default: 0.8]")
@click.option("--top-k", type=click.IntRange(min=0), help="Draw from the k likeliest; 0 from all.")
@click.option("--top-p", type=click.FloatRange(0, 1),
              help="Draw from the likeliest with this much probability.  [default: 0.95]")
@click.option("--min-p", type=click.FloatRange(0, 1), help="Draw from tokens this likely relative to the likeliest.")
@click.option("--repetition-penalty", type=click.FloatRange(0.01, 100), help="Above 1: avoid tokens seen before.")
@click.option("--num-beams", type=click.IntRange(1, 1024), help="Search for the likeliest text with so many beams.")
@click.option("--length-penalty", type=float, help="Beams are ranked by logprob / length^this.  [default: 1]")
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be given several times.")
@click.option("--num-samples", type=click.IntRange(min=1), default=1, show_default=True,
              help="Continuations of each prompt.")
@click.option("--seed", type=click.IntRange(min=0),
              help="Draw the same again.  [default: a random one, named by -v and --json]")
@click.option("--echo", is_flag=True, help="Write the prompt before its continuation.")
@click.option("--whole", is_flag=True, help="Take all of standard input as one prompt.")
@click.option("--raw", is_flag=True, help="From standard input: write text as it is, line ends and all.")
@click.option("-0", "zero", is_flag=True, help="From standard input: separate prompts and results by NUL, write them raw.")
@options.beginning
@options.json_output
@options.hardware
@options.batch_tokens
@options.quiet
@options.verbose
def generate(prompts, model, stop, num_samples, seed, echo, whole, raw, zero, bos, as_json, device, dtype, threads,
             batch_tokens, quiet, verbose, **sampling):
    """Continues prompts. Each PROMPT argument is one, written raw and as it comes; without arguments each line of
    standard input is one, and each gives one line (backslash, newline, CR and tab escaped).

    Only the continuation is written. Sampling defaults come from the folder's generation_config.json.
    """
    if not prompts and sys.stdin.isatty():
        raise click.UsageError("no prompt: give one, or pipe prompts in", click.get_current_context())
    if "" in stop:
        raise UsageError("an empty text would stop at once", where="--stop")
    if any("\udc80" <= character <= "\udcff" for text in (*prompts, *stop) for character in text):
        raise UsageError("invalid UTF-8 in an argument")  # Python's stand-ins for bytes that are no text
    from lmcli import api
    from lmcli.text.records import Output

    loaded = options.load_model(model, device, dtype, threads, verbose, generating=True)
    decoder = loaded.decoder(stop, bos, **sampling)
    first = api.new_seed() if seed is None else seed
    if verbose:
        click.echo(f"lm: seed {first}", err=True)
    piped = not prompts or "-" in prompts
    style = _Style(as_json, echo, raw or bool(prompts and not piped) or whole, "\0" if zero else "\n")
    with Output() as out:
        if prompts and len(prompts) == num_samples == 1 and not piped and not as_json and decoder.config.num_beams == 1:
            ids = loaded.prompt(prompts[0], bos)
            _warn_long([ids], loaded.context, quiet)
            return _stream(out, decoder, ids, first, prompts[0] if echo else "")
        for batch in _batches(prompts, whole, zero):
            ids = [loaded.prompt(text, bos) for text in batch]
            _warn_long(ids, loaded.context, quiet)
            results = api.decode_all(decoder, ids, num_samples, first, batch_tokens or 0)
            first += len(batch) * num_samples
            for prompt, found in zip(batch, results):
                for result in found:
                    out.write(style.written(prompt, result))
            out.flush()


def _stream(out, decoder, ids, seed, begin):
    out.write(begin)
    try:
        for piece in decoder.stream([ids], [seed]):
            if piece.text:
                out.write(piece.text)
                out.flush()
    finally:
        try:  # Ctrl-C too leaves the shell's prompt on a line of its own
            out.write("\n")
            out.flush()
        except ClosedPipe:
            pass


class _Style:
    """How a result is written."""

    def __init__(self, as_json: bool, echo: bool, raw: bool, end: str):
        self.as_json, self.echo, self.end = as_json, echo, end
        self.raw = raw or end == "\0"

    def written(self, prompt: str, result) -> str:
        if self.as_json:
            return json.dumps({"prompt": prompt, "text": result.text, "finish_reason": result.finish_reason,
                               "tokens": result.tokens, "token_logprobs": result.token_logprobs,
                               "seed": result.seed}, ensure_ascii=False) + "\n"
        from lmcli.text.records import escaped

        text = (prompt if self.echo else "") + result.text
        return (text if self.raw else escaped(text)) + self.end


def _batches(prompts, whole, zero):
    """Lists of prompts: the arguments, with "-" standing for what standard input holds."""
    from lmcli.text.records import Reader, open_bytes

    waiting = []
    for argument in prompts or ("-",):
        if argument != "-":
            waiting.append(argument)
        elif whole or zero:
            with open_bytes("-") as handle:
                data = b"".join(iter(lambda: handle.read(1 << 16), b""))
            try:
                text = data.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"invalid UTF-8 (byte {error.start + 1})", where="standard input") from error
            waiting += [text] if whole else text.removesuffix("\0").split("\0") if text else []
        else:
            for batch in Reader("text").batches(["-"]):
                waiting += [record.text for record in batch]
                while waiting:
                    yield waiting[:PROMPTS_AT_ONCE]
                    waiting = waiting[PROMPTS_AT_ONCE:]
    if waiting:
        yield waiting


def _warn_long(prompts, context, quiet):
    long = sum(len(ids) > context for ids in prompts)
    if long and not quiet:
        which = "1 prompt is" if long == 1 else f"{long} prompts are"
        click.echo(f"lm: {which} longer than the context of {context} tokens; only the end is read", err=True)
