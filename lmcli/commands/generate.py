"""lm generate: continues, translates or completes prompts given as arguments, or one a line from standard input."""

import json
import sys

import click

from lmcli.commands import options
from lmcli.errors import ClosedPipe, UsageError


@click.command(epilog="""\b
Examples:
  lm generate -m runs/s "Once upon a time"
  lm generate -m runs/s --temperature 0 -n 50 --stop "." "The"
  lm generate -m runs/s --num-samples 3 --seed 1 --json "Once"
  lm generate -m runs/s < prompts.txt > continuations.txt
  lm generate -m marian-en-de --num-beams 4 < english.txt > german.txt
  echo 'Paris is the [MASK] of France.' | lm generate -m bert --num-samples 5""")
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
@click.option("--early-stopping", type=click.Choice(["false", "true", "never"]),
              help="A search ends with that many texts (true), when no longer one will likely beat them (false), when none "
                   "can (never).  [default: false]")
@click.option("--no-repeat-ngram-size", type=click.IntRange(min=0), help="Never write so many tokens in a row twice.")
@click.option("--min-new-tokens", type=click.IntRange(min=0), help="Tokens before a text may end.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be given several times.")
@click.option("--num-samples", type=click.IntRange(min=1), default=1, show_default=True,
              help="Continuations of each prompt.")
@click.option("--seed", type=click.IntRange(min=0),
              help="Draw the same again.  [default: a random one, named by -v and --json]")
@click.option("--echo", is_flag=True, help="Write the prompt before its continuation.")
@click.option("--whole", is_flag=True, help="Take all of standard input as one prompt.")
@click.option("--raw", is_flag=True, help="From standard input: write text as it is, line ends and all.")
@click.option("-0", "zero", is_flag=True, help="From standard input: separate prompts and results by NUL, write them raw.")
@click.option("--on-error", type=click.Choice(["stop", "blank", "skip"]), default="stop", show_default=True,
              help="A bad line: stop, write an empty result, or leave it out.")
@options.beginning
@options.json_output
@options.hardware
@options.batch_tokens
@options.quiet
@options.verbose
@options.several
def generate(prompts, model, stop, num_samples, seed, echo, whole, raw, zero, on_error, bos, as_json, device, dtype,
             threads, batch_tokens, quiet, verbose, crew, **sampling):
    """Continues prompts; with an encoder-decoder (T5, BART, Marian) writes what it makes of them, with an encoder (BERT)
    fills their masks. Each PROMPT argument is one, written raw and as it comes; without arguments each line of standard
    input is one, and each gives one line (backslash, newline, CR and tab escaped).

    Only what is new is written. Defaults come from the folder's generation_config.json, a beam search included; a
    --temperature above 0 draws instead. Without any, a decoder draws and the others take the likeliest.
    """
    if crew.leads and not prompts and sys.stdin.isatty():
        raise click.UsageError("no prompt: give one, or pipe prompts in", click.get_current_context())
    if "" in stop:
        raise UsageError("an empty text would stop at once", where="--stop")
    if any("\udc80" <= character <= "\udcff" for text in (*prompts, *stop) for character in text):
        raise UsageError("invalid UTF-8 in an argument")  # Python's stand-ins for bytes that are no text
    from lmcli import display
    from lmcli.inference import writing
    from lmcli.inference.decoding import Generated
    from lmcli.inference.prompts import Prompts
    from lmcli.text.records import Output

    loaded = options.load_model(model, device, dtype, threads, verbose, generating=True)
    decoder = loaded.decoder(stop, bos, **sampling)
    if not crew.leads:
        return crew.follow(writing.errand(decoder))
    first = writing.new_seed() if seed is None else seed
    if verbose:
        click.echo(f"lm: seed {first}", err=True)
    piped = not prompts or "-" in prompts
    style = _Style(as_json, echo, raw or bool(prompts and not piped) or whole, "\0" if zero else "\n")
    streamed = prompts and not piped and not as_json and writing.streams(decoder)
    source = Prompts(loaded, bos, on_error, (lambda _: None) if quiet else display.note)
    batches = source.batches(prompts, whole, zero)
    with Output() as out:
        if streamed:
            every = (prompt for batch in batches for prompt in batch for _ in range(num_samples))
            for number, (text, ids) in enumerate(every):
                _stream(out, decoder, ids, first + number, text if echo else "")
        for batch, results in writing.decode_parts(decoder, _seeded(batches, first, num_samples), num_samples,
                                                   batch_tokens or 0, crew):
            found = iter(results)
            for text, ids in batch:
                for result in next(found) if ids else [Generated("", None, [], [], None)] * num_samples:
                    out.write(style.written(text, result))
            out.flush()
    source.tell_what_is_missing()


def _seeded(batches, first, num_samples):
    """(batch, ids of its prompts that have some, the seed of the first) of each batch."""
    for batch in batches:
        yield batch, [ids for _, ids in batch if ids], first
        first += len(batch) * num_samples


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
