"""`lm generate` output: texts as they are, on one line each, or as JSON Lines."""

from dataclasses import dataclass

from lmcli.data.output_file import escaped, json_line
from lmcli.generation.decoding import Generated

JSON_FIELDS = ("text", "finish_reason", "tokens", "token_logprobs", "seed")


@dataclass(frozen=True)
class GenerationFormat:
    """How a generated text is written; `raw` without escapes, `end` after each text."""

    as_json: bool = False
    echo: bool = False
    raw: bool = False
    end: str = "\n"

    def format(self, prompt: str, result: Generated) -> str:
        """The output for one text, after its prompt with `echo`."""
        if self.as_json:
            return json_line({"prompt": prompt} | {n: getattr(result, n) for n in JSON_FIELDS})
        text = (prompt if self.echo else "") + result.text
        return (text if self.raw or self.end == "\0" else escaped(text)) + self.end
