"""Options of generation: fields of GenerateConfig over the defaults of a model folder."""

import json
import math
from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

from lmcli.config import GenerateConfig, check
from lmcli.errors import UsageError, UserError
from lmcli.generation.structure import TEXT_FORMS
from lmcli.text.stream_decoder import token_bytes
from lmcli.text.tokenizer import Tokenizer


def generation_config(defaults: GenerateConfig, options: dict[str, Any]) -> GenerateConfig:
    """The defaults with `options`, fields of GenerateConfig; None leaves a default.

    A temperature above 0 samples: it sets num_beams to 1 unless that is an option. A text of a form
    does not end at `stop_strings` of the defaults. Raises TypeError for an unknown option,
    UsageError for a value out of range.
    """
    known = sorted(f.name for f in fields(GenerateConfig))
    for name in sorted(options):
        if name not in known:
            raise TypeError(f"unknown option {name!r}; known: stop, bos, {', '.join(known)}")
    chosen = {name: value for name, value in options.items() if value is not None}
    if isinstance(chosen.get("json_schema"), (dict, bool)):
        chosen["json_schema"] = json.dumps(chosen["json_schema"])
    if isinstance(chosen.get("early_stopping"), bool):
        chosen["early_stopping"] = str(chosen["early_stopping"]).lower()
    chosen = {
        name: check(GenerateConfig, name, value, "generate") for name, value in chosen.items()
    }
    for name in ("ban", *TEXT_FORMS):
        if (value := chosen.get(name)) == "" or (isinstance(value, tuple) and "" in value):
            where = "--" + name.replace("_", "-")
            raise UsageError("must not be empty", where=where, hint="leave it out")
    # a limit on new tokens replaces the folder's limit on all tokens
    implied: dict[str, Any] = {"max_length": 0} if "max_new_tokens" in chosen else {}
    implied |= {"min_length": 0} if "min_new_tokens" in chosen else {}
    implied |= {"num_beams": 1} if chosen.get("temperature") else {}
    implied |= {"stop_strings": ()} if any(map(chosen.get, TEXT_FORMS)) else {}
    return replace(defaults, **{**implied, **chosen})


def check_stop_strings(stop: str | Iterable[str]) -> tuple[str, ...]:
    """The stop strings as a tuple; raises UsageError for an empty one."""
    stop_strings = (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in stop_strings:
        raise UsageError("must not be empty", where="--stop", hint="leave it out")
    return stop_strings


def check_texts_of_config(config: GenerateConfig) -> None:
    """Raises UserError for stop strings of the folder in a beam search, or for an empty text."""
    for name in ("stop_strings", "ban"):
        if "" in getattr(config, name):
            raise UserError(f"{name} must not be empty", where="generate")
    if config.stop_strings and config.num_beams > 1:
        raise UserError(
            f"stop_strings with num_beams {config.num_beams} is not supported",
            where="generate",
            hint="use --num-beams 1, or remove stop_strings from generation_config.json",
        )


def with_logit_bias(
    config: GenerateConfig, tokenizer: Tokenizer, vocab_size: int
) -> GenerateConfig:
    """The settings with `logit_bias` as part of `sequence_bias`.

    TOKEN is an id if it is a whole number, else the text of a token with its space, or its spelling
    in the vocabulary. Raises UsageError if there is none, and for a VALUE that is not from −1000 to
    1000.
    """
    if not config.logit_bias:
        return config
    texts, biases = token_bytes(tokenizer), []
    for item in config.logit_bias:
        token, _, value = item.rpartition("=")
        number = _number(value)
        if not token or not abs(number) <= 1000:
            message = f"{item!r} is not TOKEN=VALUE with a value from -1000 to 1000"
            raise UsageError(message, where="--logit-bias")
        ids = [index for index, text in enumerate(texts) if text == token.encode()]
        if token.isdecimal():
            ids = [int(token)]
        elif not ids and (index := tokenizer.id(token)) is not None:
            ids = [index]
        if not ids or ids[0] >= vocab_size:
            pieces = tokenizer.pieces(tokenizer.encode(token))
            is_id = f"is not an id of this model, which has 0 to {vocab_size - 1}"
            several = f"is not one token of this model, but {len(pieces)}: {' '.join(pieces)}"
            raise UsageError(
                f"{token} {is_id}" if ids else f"{token!r} {several}",
                where="--logit-bias",
                hint="give the text of one token, with its space if it has one, or an id",
            )
        biases += [((index,), number) for index in ids]
    return replace(config, sequence_bias=(*config.sequence_bias, *biases))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def check_forced_ids(config: GenerateConfig, vocab_size: int) -> None:
    """Raises UserError if a forced token is outside the model's vocabulary."""
    for key in ("forced_bos_token_id", "forced_eos_token_id"):
        if (value := getattr(config, key) or 0) >= vocab_size:
            raise UserError(
                f"{key} {value} is not an id of this model",
                where="generate",
                hint=f"use an id from 0 to {vocab_size - 1}",
            )
