"""`lm generate` output: texts as they are, on one line each, or as JSON Lines."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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

    def format(self, prompt: str, result: Generated, row: Mapping[str, Any] | None = None) -> str:
        """The output for one text, after its prompt with `echo`; in JSON the rest of its row."""
        if self.as_json:
            fields = {name: getattr(result, name) for name in JSON_FIELDS}
            return json_line({**(row or {}), "prompt": prompt, **fields})
        text = (prompt if self.echo else "") + result.text
        return (text if self.raw or self.end == "\0" else escaped(text)) + self.end
