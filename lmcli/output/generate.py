"""`lm generate` output: texts as they are, on one line each, as JSON Lines, or token by token."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lmcli.data.output_file import escaped, json_line
from lmcli.generation.decoding import Generated
from lmcli.generation.prompts import Prompt
from lmcli.terminal.painted_text import paint, shade
from lmcli.terminal.wrapping import width
from lmcli.text.characters import visible
from lmcli.text.stream_decoder import StreamDecoder
from lmcli.text.tokenizer import Tokenizer

JSON_FIELDS = ("text", "finish_reason", "tokens", "token_logprobs", "seed")
TOKEN_WIDTH, SHARE_WIDTH = 10, 6  # columns of a token and of its probability
MOST_TOKEN_WIDTH = 16  # on a terminal


@dataclass(frozen=True)
class GenerationFormat:
    """How a generated text is written; `raw` without escapes, `end` after each text.

    `after_prompt` follows a prompt, which is written with `echo`, or if `shows_prompt`. Several
    `samples` of a prompt are parted by a line, if there is more than one.
    """

    as_json: bool = False
    echo: bool = False
    raw: bool = False
    end: str = "\n"
    shows_prompt: bool = False
    after_prompt: str = ""
    samples: int = 1

    def before(self, prompt: Prompt, sample: int) -> str:
        """What stands before a text: its number among the samples, from 0, and the prompt."""
        if self.as_json:
            return ""
        number = f"── {sample + 1} of {self.samples} ──\n" if self.samples > 1 else ""
        shown = prompt.text + self.after_prompt if self.shows_prompt else ""
        return number + self._plain(prompt.text if self.echo else shown)

    def format(self, prompt: Prompt, result: Generated) -> str:
        """The output for one text, after `before`; in JSON with its prompt and row."""
        if self.as_json:
            fields = {name: getattr(result, name) for name in JSON_FIELDS}
            more = {"alternatives": result.alternatives} if result.alternatives else {}
            return json_line({**(prompt.row or {}), "prompt": prompt.text, **fields, **more})
        return self._plain(result.text) + self.end

    def _plain(self, text: str) -> str:
        return text if self.raw or self.end == "\0" else escaped(text)


@dataclass(frozen=True, kw_only=True)
class WhyFormat(GenerationFormat):
    """A text, then a line for each of its tokens: its probability, and those of alternatives.

    With `colors` tokens are painted by their surprisal. Lines have `columns` at most (None: no
    limit); `fit` pads or cuts a text to so many. `continues` is False for a text after no prompt.
    """

    tokenizer: Tokenizer
    continues: bool
    colors: bool
    columns: int | None
    fit: Callable[[str, int], str]

    def format(self, prompt: Prompt, result: Generated) -> str:
        """The text and the lines of its tokens, those after a stop string included."""
        stream = StreamDecoder(self.tokenizer, (prompt.ids or []) if self.continues else [])
        rest, painted = result.text, []
        colors = [shade(-x / math.log(2)) if self.colors else 0 for x in result.token_logprobs]
        for token, color in zip(result.tokens, colors):
            piece = stream.push(token)[: len(rest)]
            rest = rest[len(piece) :]
            painted.append(paint(visible(piece), color))
        return "\n".join(["".join(painted), "", *self._lines(result, colors), "", ""])

    def _lines(self, result: Generated, colors: list[int | None]) -> Iterator[str]:
        steps = zip(result.tokens, result.token_logprobs, result.alternatives, colors)
        size, most = TOKEN_WIDTH, None
        if self.columns is not None:
            texts = [self.tokenizer.token_text(token) for token in result.tokens]
            texts += [each["text"] for alternatives in result.alternatives for each in alternatives]
            size = min(MOST_TOKEN_WIDTH, max([size, *(width(_drawn(text)) for text in texts)]))
            most = max(0, (self.columns + 2) // (size + SHARE_WIDTH + 2) - 1)
        for token, logprob, alternatives, color in steps:
            others = [each for each in alternatives if each["token"] != token][:most]
            text = self.tokenizer.token_text(token)
            cells = [paint(self.fit(_drawn(text), size), color) + _share(logprob)]
            for other in others:
                cells.append(self.fit(_drawn(other["text"]), size) + _share(other["logprob"]))
            yield "  ".join(cells)


def _drawn(text: str) -> str:
    """A token with its spaces and control characters drawn."""
    return visible(text, keep="").replace(" ", "␣")


def _share(logprob: float) -> str:
    """A probability in its columns: 98%, 3.1%, <0.1%."""
    p = math.exp(logprob)
    text = f"{p:.0%}" if p >= 0.0995 else f"{p:.1%}" if p >= 0.001 else "<0.1%"
    return text.rjust(SHARE_WIDTH)
