"""Every knob, one dataclass per subject. Names are those of a Hugging Face `config.json` where it has one.

Each field carries its default, what it means with its unit, and its range; `check` holds a value against them.
"""

import dataclasses
import re
from dataclasses import dataclass, field, fields
from typing import Any, get_args

from lmcli.errors import UsageError

Number = int | float


def knob(default: Any, meaning: str, low: Number | None = None, high: Number | None = None,
         choices: tuple[str, ...] = ()) -> Any:
    """A dataclass field with its meaning, its inclusive range and, for a word, the words allowed."""
    return field(default=default, metadata={"meaning": meaning, "low": low, "high": high, "choices": choices})


@dataclass(frozen=True)
class TokenizerConfig:
    """How a byte-level BPE is learnt."""

    vocab_size: int = knob(4096, "ids, the 256 bytes and <|endoftext|> included", 257, 1_000_000)
    pattern: str = knob("gpt2", "how text is split into words before merging", choices=("gpt2", "qwen2"))


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of one Transformer (decoder-only so far)."""

    vocab_size: int = knob(0, "rows of the embedding; 0 takes the tokenizer's size", 0)
    max_position_embeddings: int = knob(0, "context in tokens; 0 takes train.context", 0, 1 << 24)
    # width and depth
    hidden_size: int = knob(256, "width of the residual stream", 1, 1 << 17)
    num_hidden_layers: int = knob(4, "blocks", 1, 1024)
    intermediate_size: int = knob(0, "width inside the gated MLP; 0 means 8/3 of hidden_size, in steps of 32", 0, 1 << 20)
    # attention
    num_attention_heads: int = knob(4, "query heads", 1, 1024)
    num_key_value_heads: int = knob(0, "key and value heads; 0 means as many as query heads", 0, 1024)
    head_dim: int = knob(0, "width of a head; 0 means hidden_size / num_attention_heads", 0, 4096)
    query_key_norm: bool = knob(True, "RMSNorm on the queries and keys of each head (saved as Qwen3; without: Llama)")
    # positions
    rope_theta: float = knob(10_000.0, "base of the rotary frequencies", 1.0)
    # norms and embeddings
    rms_norm_eps: float = knob(1e-6, "added to the mean square", 0.0, 1.0)
    tie_word_embeddings: bool = knob(True, "the head uses the embedding matrix")
    # beginning and end
    bos_token_id: int | None = knob(None, "id that starts a context, if the tokenizer names none", 0)
    eos_token_id: int | None = knob(None, "id that ends a text, if the tokenizer names none", 0)

    def complete(self) -> "ModelConfig":
        """The same configuration with every 0 that means "derive it" replaced. Raises UsageError when sizes cannot fit."""
        if not self.head_dim and self.hidden_size % self.num_attention_heads:
            raise UsageError(
                f"num_attention_heads {self.num_attention_heads} does not divide hidden_size {self.hidden_size}",
                where="model", hint="choose a divisor of hidden_size, or set head_dim")
        done = dataclasses.replace(
            self,
            intermediate_size=self.intermediate_size or -(-self.hidden_size * 8 // 3 // 32) * 32,
            num_key_value_heads=self.num_key_value_heads or self.num_attention_heads,
            head_dim=self.head_dim or self.hidden_size // self.num_attention_heads,
        )
        if done.num_attention_heads % done.num_key_value_heads:
            raise UsageError(
                f"num_key_value_heads {done.num_key_value_heads} does not divide "
                f"num_attention_heads {done.num_attention_heads}", where="model", hint="choose a divisor, or 0")
        if done.head_dim % 2:
            raise UsageError(f"head_dim {done.head_dim} is odd", where="model",
                             hint="rotary positions turn pairs of numbers: choose an even head_dim")
        return done


@dataclass(frozen=True)
class TrainConfig:
    """One training run. The first budget reached of time, tokens, steps and epochs ends it."""

    # budgets; 0 means none
    time: float = knob(0.0, "seconds from the start of the command to the saved model; also 90s, 10m, 1h30m", 0.0)
    tokens: int = knob(0, "training tokens", 0)
    steps: int = knob(0, "optimizer steps", 0)
    epochs: float = knob(0.0, "passes over the training part", 0.0)
    # batches
    context: int = knob(256, "tokens in a row", 8, 1 << 24)
    batch_tokens: int = knob(8192, "tokens of an optimizer step", 8)
    micro_batch_tokens: int = knob(0, "tokens of one forward pass; 0 takes batch_tokens up to 16,384", 0)
    # optimizer and schedule
    optimizer: str = knob("muon", "update rule of the blocks' matrices; all else has AdamW", choices=("muon", "adamw"))
    learning_rate: float = knob(1e-2, "AdamW's, at the top of the schedule", 0.0, 1e9)
    matrix_learning_rate: float = knob(2e-2, "Muon's, at the top of the schedule", 0.0, 1e9)
    warmup: float = knob(0.02, "share of the budget in which the rate rises from 0", 0.0, 1.0)
    schedule: str = knob("linear", "fall of the rate after warm-up", choices=("linear", "cosine", "constant"))
    weight_decay: float = knob(0.1, "decoupled decay of matrices", 0.0, 10.0)
    gradient_clip: float = knob(1.0, "largest gradient norm; 0 leaves gradients alone", 0.0)
    dropout: float = knob(0.0, "share of sublayer outputs set to zero", 0.0, 0.95)
    precision: str = knob("auto", "of the forward pass; weights stay float32", choices=("auto", "float32", "bfloat16"))
    # what is looked at, kept and shown
    validation_bytes: int = knob(250_000, "at most so many bytes of the held-out part are measured", 1)
    eval_every: int = knob(0, "steps between evaluations; 0 means an eighth of the budget", 0)
    save_every: int = knob(0, "steps between resumable states; 0 means one with each evaluation", 0)
    sample_every: int = knob(0, "steps between sample texts; 0 means one with each evaluation", 0)
    seed: int = knob(0, "of initial weights, data order, dropout and samples", 0, (1 << 63) - 1)


@dataclass(frozen=True)
class GenerateConfig:
    """How text is drawn. Names and meaning are those of `generation_config.json`."""

    max_new_tokens: int = knob(256, "tokens at most", 1)
    temperature: float = knob(0.8, "divides the logits; 0 takes the likeliest token", 0.0, 100.0)
    top_k: int = knob(0, "keep the k likeliest tokens; 0 keeps all", 0)
    top_p: float = knob(0.95, "keep the likeliest tokens that hold this much probability; 1 keeps all", 0.0, 1.0)
    min_p: float = knob(0.0, "keep tokens at least this likely, relative to the likeliest", 0.0, 1.0)
    repetition_penalty: float = knob(1.0, "divides positive and multiplies negative logits of tokens seen", 0.01, 100.0)
    num_beams: int = knob(1, "beams kept in a search for the likeliest text; 1 searches none", 1, 1024)
    length_penalty: float = knob(1.0, "power of the length that divides a beam's log-probability", -10.0, 10.0)


@dataclass(frozen=True)
class Recipe:
    """A whole run: what a preset says and what `recipe.yaml` stores."""

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)


def check(section: type, key: str, value: Any, where: str) -> Any:
    """`value` as the type of field `key` of dataclass `section`, or UsageError naming `where`, the key and the range.

    Numbers may come as text ("1e-5", which YAML reads as a string), durations as "90s", "10m", "1h30m".
    """
    spec = next(f for f in fields(section) if f.name == key)
    try:
        value = _convert(spec.type, "time" if spec.name == "time" else "", value)
    except (ValueError, OverflowError):  # infinity is no whole number
        raise UsageError(f"{key}: {value!r} is not {_described(spec.type)}", where=where,
                         hint=f"{key}: {spec.metadata['meaning']}") from None
    _check_range(spec, value, where)
    return value


def _convert(kind: Any, unit: str, value: Any) -> Any:
    if type(None) in get_args(kind):
        return None if value is None else _convert(get_args(kind)[0], unit, value)
    if unit == "time" and isinstance(value, str):
        return duration(value)
    if kind is bool:
        if isinstance(value, bool) or value in ("true", "false"):
            return value in (True, "true")
        raise ValueError
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError
    if kind is int:
        number = float(str(value).replace("_", ""))
        if number != int(number):
            raise ValueError
        return int(str(value).replace("_", "")) if str(value).replace("_", "").lstrip("+-").isdigit() else int(number)
    if kind is str and not isinstance(value, str):
        raise ValueError
    return kind(value)


def _described(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}
    return names[get_args(kind)[0] if get_args(kind) else kind]


def _check_range(spec: dataclasses.Field, value: Any, where: str) -> None:
    low, high, choices = (spec.metadata[name] for name in ("low", "high", "choices"))
    if choices and value not in choices:
        raise UsageError(f"{spec.name}: {value!r} is not one of {', '.join(choices)}", where=where)
    if value is None or isinstance(value, (str, bool)):
        return
    too_low, too_high = low is not None and not value >= low, high is not None and not value <= high
    if too_low or too_high or value != value or value in (float("inf"), float("-inf")):
        allowed = f"{low} to {high}" if high is not None else f"{low} or more"
        raise UsageError(f"{spec.name}: {value} is outside {allowed}", where=where,
                         hint=f"{spec.name}: {spec.metadata['meaning']}")


def duration(text: str) -> float:
    """Seconds of "90", "90s", "10m" or "1h30m"; ValueError for anything else. duration("1h30m") == 5400."""
    text = text.strip()
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    parts = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?", text)
    if not text or not parts:
        raise ValueError(f"{text!r} is not a duration")
    return sum(float(part or 0) * unit for part, unit in zip(parts.groups(), (3600, 60, 1)))
