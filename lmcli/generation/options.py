"""Options of generation: fields of GenerateConfig over the defaults of a model folder."""

from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

from lmcli.config import GenerateConfig, check
from lmcli.errors import UsageError, UserError


def generation_config(defaults: GenerateConfig, options: dict[str, Any]) -> GenerateConfig:
    """The defaults with `options`, fields of GenerateConfig; None leaves a default.

    A temperature above 0 samples: it sets num_beams to 1 unless that is an option. Raises TypeError
    for an unknown option, UsageError for a value out of range.
    """
    known = sorted(f.name for f in fields(GenerateConfig))
    for name in sorted(options):
        if name not in known:
            raise TypeError(f"unknown option {name!r}; known: stop, bos, {', '.join(known)}")
    chosen = {name: value for name, value in options.items() if value is not None}
    if isinstance(chosen.get("early_stopping"), bool):
        chosen["early_stopping"] = str(chosen["early_stopping"]).lower()
    chosen = {
        name: check(GenerateConfig, name, value, "generate") for name, value in chosen.items()
    }
    # a limit on new tokens replaces the folder's limit on all tokens
    implied = {"max_length": 0} if "max_new_tokens" in chosen else {}
    implied |= {"min_length": 0} if "min_new_tokens" in chosen else {}
    implied |= {"num_beams": 1} if chosen.get("temperature") else {}
    return replace(defaults, **{**implied, **chosen})


def check_stop_strings(stop: str | Iterable[str]) -> tuple[str, ...]:
    """The stop strings as a tuple; raises UsageError for an empty one."""
    stop_strings = (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in stop_strings:
        raise UsageError("must not be empty", where="--stop", hint="leave it out")
    return stop_strings


def check_stop_strings_of_config(config: GenerateConfig) -> None:
    """Raises UserError for the folder's stop strings in a beam search, or an empty one."""
    if "" in config.stop_strings:
        raise UserError("stop_strings must not be empty", where="generate")
    if config.stop_strings and config.num_beams > 1:
        raise UserError(
            f"stop_strings with num_beams {config.num_beams} is not supported",
            where="generate",
            hint="use --num-beams 1, or remove stop_strings from generation_config.json",
        )


def check_forced_ids(config: GenerateConfig, vocab_size: int) -> None:
    """Raises UserError if a forced token is outside the model's vocabulary."""
    for key in ("forced_bos_token_id", "forced_eos_token_id"):
        if (value := getattr(config, key) or 0) >= vocab_size:
            raise UserError(
                f"{key} {value} is not an id of this model",
                where="generate",
                hint=f"use an id from 0 to {vocab_size - 1}",
            )
