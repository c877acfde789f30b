"""`generation_config.json` → GenerateConfig, and which of its keys lm does not follow.

Every key of transformers' GenerationConfig is in one class: a field of GenerateConfig, one of
`IDS_AND_MODES`, one that changes no text (`WITHOUT_EFFECT`), one that lm lacks (`NOT_SUPPORTED`).
"""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from lmcli.checkpoints.config_json import is_no_id
from lmcli.config import GenerateConfig, check
from lmcli.errors import UsageError, UserError

# keys with the same meaning here; `do_sample: false` is temperature 0
GENERATE_KEYS = tuple(field.name for field in fields(GenerateConfig))
LARGEST_INT = (1 << 62) - 1  # a larger number of tokens does not fit into a tensor
IDS_AND_MODES = set(
    "do_sample bos_token_id eos_token_id pad_token_id decoder_start_token_id".split()
)
# how transformers computes, what it returns, and drafts that a model checks: the text is the same;
# where a number is none (remove_invalid_values) lm ends with an error
WITHOUT_EFFECT = set(
    """
    _from_model_config _commit_hash transformers_version
    use_cache cache_implementation cache_config max_cache_len low_memory prefill_chunk_size
    compile_config disable_compile continuous_batching_config remove_invalid_values
    output_attentions output_hidden_states output_logits output_scores return_dict_in_generate
    use_mtp is_assistant num_assistant_tokens num_assistant_tokens_schedule
    assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight
    assistant_lookbehind target_lookbehind prompt_lookup_num_tokens max_matching_ngram_size
    speculation_type
    """.split()
)
# keys that change the text → the values with which they do not, beside null
NOT_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "constraints": (),
    "diversity_penalty": (0,),
    "dola_layers": (),
    "force_words_ids": (),
    "guidance_scale": (1,),
    "max_time": (),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "token_healing": (False,),
    "watermarking_config": (),
}


def read_generate_config(
    generation: dict[str, Any] | None, document: dict[str, Any], shape: str, folder: Path
) -> GenerateConfig:
    """The generation defaults of a folder, from generation_config.json or else from config.json.

    Where neither has `do_sample`, a decoder gets our defaults, and an encoder–decoder is greedy.
    """
    where = folder / ("config.json" if generation is None else "generation_config.json")
    source = document if generation is None else generation
    settings = {key: value for key, value in source.items() if value is not None}
    sampled = settings.get("do_sample", None if shape == "decoder" else False)
    config = GenerateConfig()
    if sampled is not None:  # then missing keys have the defaults of transformers
        config = replace(config, temperature=1.0, top_p=1.0, top_k=50 if sampled else 0)
    values = {
        key: file_value(GenerateConfig, key, _plain_value(key, settings[key]), where)
        for key in GENERATE_KEYS
        if key in settings
    }
    if "max_new_tokens" in values:
        values["max_length"] = 0
    config = replace(config, **values)
    return replace(config, temperature=0.0) if sampled is False else config


def ignored_keys(generation: dict[str, Any] | None, document: dict[str, Any]) -> str:
    """One line that names the keys that may change the text and that lm ignores; "" for none."""
    source = document if generation is None else generation
    lacking = [
        key
        for key, neutral in NOT_SUPPORTED.items()
        if source.get(key) is not None and source[key] not in neutral
    ]
    known = {*GENERATE_KEYS, *IDS_AND_MODES, *WITHOUT_EFFECT, *NOT_SUPPORTED}
    unknown = sorted((generation or {}).keys() - known)
    sentences = [
        f"{', '.join(keys)} {verb} not {why} and {verb} ignored"
        for keys, why in ((lacking, "supported"), (unknown, "known"))
        for verb in ("is" if len(keys) == 1 else "are",)
        if keys
    ]
    file = "config.json" if generation is None else "generation_config.json"
    return f"{file}: {'; '.join(sentences)}" if sentences else ""


def file_value(section: type, key: str, value: Any, file: Path) -> Any:
    """`check` for a value of a file: a bad file is failed work, not a wrong command line."""
    try:
        checked = check(section, key, value, str(file))
    except UsageError as error:
        raise UserError(error.what, where=error.where, hint=error.hint) from None
    if isinstance(checked, int) and checked > LARGEST_INT:
        raise UserError(f"{key}: {checked} is outside 0 to {LARGEST_INT}", where=str(file))
    return checked


def _plain_value(key: str, value: Any) -> Any:
    """A value of generation_config.json in the type that GenerateConfig has for it."""
    if key.endswith("token_id") and (value == [] or is_no_id(value)):
        return None
    if key == "sequence_bias" and value == {}:
        return []
    if key == "early_stopping" and isinstance(value, bool):
        return str(value).lower()
    if key == "stop_strings" and isinstance(value, str):
        return [value]
    if key == "forced_eos_token_id" and isinstance(value, list) and len(value) == 1:
        return _plain_value(key, value[0])
    return value
