"""Every knob: one dataclass per subject, with the names of a Hugging Face `config.json`.

Each field has a default, a meaning with its unit, and a range. `check` validates a value.
"""

import dataclasses
import re
from dataclasses import dataclass, field, fields
from typing import Any, get_args, get_origin

from lmcli.errors import UsageError, did_you_mean

LORA_TARGETS = ("all", "query", "key", "value", "output", "gate", "up", "down", "embedding", "head")


def knob(
    default: Any,
    meaning: str,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """A dataclass field with its meaning, its inclusive range and, for a word, the choices."""
    metadata = {"meaning": meaning, "low": low, "high": high, "choices": choices}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TokenizerConfig:
    """How a byte-level BPE is learned."""

    vocab_size: int = knob(4096, "ids, the 256 bytes and <|endoftext|> included", 257, 1_000_000)
    pattern: str = knob("gpt2", "how text is split before merging", choices=("gpt2", "qwen2"))


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of one Transformer. Checkpoint families differ in these options only.

    0 (or "") marks a value that `complete` derives from others, or a feature that is off.
    """

    model_type: str = knob("", "checkpoint family; empty: the first that has these options")
    shape: str = knob("decoder", "stacks", choices=("decoder", "encoder", "encoder-decoder"))
    head: str = knob(
        "lm",
        "output: next words, a label of the text or of each token, or an answer span",
        choices=("lm", "sequence", "token", "span", "none"),
    )
    labels: tuple[str, ...] = knob((), "names of the labels, for heads sequence and token")
    multi_label: bool = knob(False, "a text may have several labels, each with its own probability")
    vocab_size: int = knob(0, "rows of the embedding; 0: the tokenizer's size", 0)
    max_position_embeddings: int = knob(0, "context in tokens; 0: train.context", 0, 1 << 24)
    # width and depth; the encoder of an encoder-decoder may differ in depth, heads and MLP
    hidden_size: int = knob(256, "width of the residual stream", 1, 1 << 17)
    num_hidden_layers: int = knob(4, "blocks of the decoder, or of the only stack", 1, 1024)
    num_encoder_layers: int = knob(0, "blocks of the encoder; 0: num_hidden_layers", 0, 1024)
    # attention
    num_attention_heads: int = knob(4, "query heads", 1, 1024)
    encoder_attention_heads: int = knob(0, "encoder heads; 0: num_attention_heads", 0, 1024)
    num_key_value_heads: int = knob(0, "key and value heads; 0: num_attention_heads", 0, 1024)
    head_dim: int = knob(0, "width of a head; 0: hidden_size / num_attention_heads", 0, 4096)
    query_key_norm: bool = knob(True, "RMSNorm on queries and keys of each head (as Qwen3 has)")
    attention_bias: str = knob("none", "projections with a bias", choices=("none", "qkv", "all"))
    scale_attention: bool = knob(True, "divide attention scores by sqrt(head_dim)")
    query_pre_attn_scalar: int = knob(0, "square of what divides attention scores; 0: head_dim", 0)
    sliding_window: int = knob(
        0, "tokens visible in sliding-window layers (encoder: to each side); 0: no window", 0
    )
    layer_types: tuple[str, ...] = knob(
        (),
        "full_attention or sliding_attention for each layer; empty: all slide if a window is set",
    )
    # positions
    positions: str = knob(
        "rotary", "position encoding", choices=("rotary", "learned", "sinusoidal", "relative")
    )
    position_offset: int = knob(0, "unused rows before the first learned position", 0, 1024)
    rope_theta: float = knob(10_000.0, "base of the rotary frequencies", 1.0)
    local_rope_theta: float = knob(0.0, "base in sliding-window layers; 0: rope_theta", 0.0)
    rotary_fraction: float = knob(1.0, "share of each head that is rotated", 0.0, 1.0)
    rope_type: str = knob(
        "default",
        "how rotary positions are scaled beyond the training context",
        choices=("default", "linear", "llama3", "yarn"),
    )
    rope_factor: float = knob(1.0, "factor by which the context is extended", 1.0, 1e6)
    rope_original_context: int = knob(
        0, "training context in tokens (llama3, yarn); 0: max_position_embeddings", 0
    )
    rope_low_freq_factor: float = knob(
        1.0, "rotations in the training context up to which a frequency is scaled (llama3)", 0.0
    )
    rope_high_freq_factor: float = knob(
        4.0, "rotations in the training context from which a frequency is kept (llama3)", 0.0
    )
    relative_attention_num_buckets: int = knob(32, "buckets of relative positions", 4, 1 << 16)
    relative_attention_max_distance: int = knob(
        128, "distance from which all share one bucket", 2, 1 << 24
    )
    # norms
    norm: str = knob("rms", "RMSNorm or LayerNorm", choices=("rms", "layer"))
    norm_bias: bool = knob(True, "LayerNorm has a bias")
    norm_eps: float = knob(1e-6, "added to the mean square", 0.0, 1.0)
    post_norm: bool = knob(False, "norm(x + f(x)) instead of x + f(norm(x))")
    sandwich_norm: bool = knob(False, "norms after attention and MLP too, x + norm(f(norm(x)))")
    parallel_block: bool = knob(False, "attention and MLP have the same input")
    first_attention_norm: bool = knob(True, "the first block has a norm before its attention")
    embedding_norm: bool = knob(False, "norm on the sum of embeddings")
    # MLP
    intermediate_size: int = knob(
        0, "width of the MLP; 0: 4 hidden_size, gated 8/3 of it in steps of 32", 0, 1 << 20
    )
    encoder_intermediate_size: int = knob(0, "same, encoder; 0: intermediate_size", 0, 1 << 20)
    hidden_act: str = knob(
        "silu",
        "activation",
        choices=("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "relu", "tanh"),
    )
    gated_mlp: bool = knob(True, "the MLP is gated (GLU)")
    mlp_bias: bool = knob(False, "the MLP's projections have a bias")
    # embeddings and head
    tie_word_embeddings: bool = knob(True, "the head uses the embedding matrix")
    scale_embedding: bool = knob(False, "multiply embeddings by sqrt(hidden_size)")
    scale_logits: bool = knob(False, "divide the head's input by sqrt(hidden_size)")
    type_vocab_size: int = knob(0, "token types; 0: none", 0, 1024)
    mean_pooling: bool = knob(
        False, "classify a text from the mean of its tokens, not the first one (head sequence)"
    )
    head_dense: bool = knob(False, "the head has a dense layer before its output")
    head_dense_bias: bool = knob(True, "that layer has a bias")
    head_norm: bool = knob(False, "norm after that layer")
    head_act: str = knob("", "activation of that layer; empty: hidden_act")
    head_bias: bool = knob(False, "the output over the vocabulary has a bias")
    # special ids
    bos_token_id: int | None = knob(None, "starts a context if the tokenizer names no id", 0)
    eos_token_id: int | None = knob(None, "ends a text if the tokenizer names no id", 0)
    pad_token_id: int | None = knob(None, "padding id", 0)
    decoder_start_token_id: int | None = knob(None, "first decoder id (encoder-decoder)", 0)

    @property
    def rotary_size(self) -> int:
        """Number of rotated dimensions of each head."""
        return int(self.head_dim * self.rotary_fraction)

    @property
    def encoder_head_dim(self) -> int:
        """Width of the encoder's heads: their share of hidden_size, or head_dim if that is free."""
        shared = self.head_dim * self.num_attention_heads == self.hidden_size
        return self.hidden_size // self.encoder_attention_heads if shared else self.head_dim

    def resolved_layer_types(self, count: int) -> tuple[str, ...]:
        """full_attention or sliding_attention, for each of `count` layers."""
        default = "sliding_attention" if self.sliding_window else "full_attention"
        return self.layer_types or (default,) * count

    def complete(self) -> "ModelConfig":
        """A copy with every 0 that means "derive it" replaced; UsageError when sizes cannot fit."""
        if not self.head_dim and self.hidden_size % self.num_attention_heads:
            raise UsageError(
                f"num_attention_heads {self.num_attention_heads} does not divide hidden_size "
                f"{self.hidden_size}",
                where="model",
                hint="choose a divisor of hidden_size, or set head_dim",
            )
        gated = -(-self.hidden_size * 8 // 3 // 32) * 32
        mlp = self.intermediate_size or (gated if self.gated_mlp else 4 * self.hidden_size)
        two_stacks = self.shape == "encoder-decoder"  # otherwise there is one set of sizes
        config = dataclasses.replace(
            self,
            intermediate_size=mlp,
            encoder_intermediate_size=(two_stacks and self.encoder_intermediate_size) or mlp,
            num_encoder_layers=(two_stacks and self.num_encoder_layers) or self.num_hidden_layers,
            encoder_attention_heads=(two_stacks and self.encoder_attention_heads)
            or self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads or self.num_attention_heads,
            head_dim=self.head_dim or self.hidden_size // self.num_attention_heads,
            head_act=self.head_act or self.hidden_act,
        )
        config._check()
        return config

    def _check(self) -> None:
        key_value = self.num_key_value_heads
        for name in ("num_attention_heads", "encoder_attention_heads"):
            heads = getattr(self, name)
            if heads * key_value % self.num_attention_heads or self.num_attention_heads % key_value:
                raise UsageError(
                    f"num_key_value_heads {key_value} does not divide {name} {heads}",
                    where="model",
                    hint="choose a divisor, or 0",
                )
        if self.positions == "rotary" and self.rotary_size % 2:
            whole = self.rotary_fraction == 1.0
            size = f"head_dim {self.head_dim}" if whole else f"rotary size {self.rotary_size}"
            raise UsageError(
                f"{size} is odd",
                where="model",
                hint="choose an even head_dim: rotary positions rotate pairs of dimensions",
            )
        if self.layer_types and len(self.layer_types) != self.num_hidden_layers:
            raise UsageError(
                f"layer_types names {len(self.layer_types)} layers, num_hidden_layers is "
                f"{self.num_hidden_layers}",
                where="model",
                hint="name one type for each layer",
            )


@dataclass(frozen=True)
class TrainConfig:
    """One training run. It ends at the first budget reached: time, tokens, steps or epochs."""

    # budgets
    time: float = knob(
        0.0, "seconds from start to saved model, also 90s, 10m, 1h30m; 0: no time limit", 0.0
    )
    tokens: int = knob(0, "training tokens; 0: no limit", 0)
    steps: int = knob(0, "optimizer steps; 0: no limit", 0)
    epochs: float = knob(0.0, "passes over the training set; 0: no limit", 0.0)
    # batches
    context: int = knob(256, "tokens of a row", 8, 1 << 24)
    batch_tokens: int = knob(8192, "tokens of an optimizer step", 8)
    micro_batch_tokens: int = knob(
        0, "tokens of a forward pass, halved when memory runs out; 0: 16,384 (with CUDA 65,536)", 0
    )
    recompute: str = knob(
        "auto",
        "activation checkpointing: less memory, slower; auto: only if one row would not fit",
        choices=("auto", "on", "off"),
    )
    # what is learned
    objective: str = knob(
        "auto",
        "training objective; auto: by the model's shape and the fields of the data",
        choices=("auto", "causal", "completion", "masked", "seq2seq", "classification", "span"),
    )
    document_masks: bool = knob(
        False, "tokens of a packed row attend to their own document only (causal)"
    )
    new_head: bool = knob(False, "fine-tune with a new head, for the labels of the data")
    mask_share: float = knob(0.15, "share of tokens to predict (masked)", 0.001, 1.0)
    doc_stride: int = knob(
        128, "tokens between windows over a long context, half a window at most (span)", 1
    )
    label_smoothing: float = knob(0.0, "probability spread over all words (seq2seq)", 0.0, 0.9)
    # optimizer and schedule
    optimizer: str = knob(
        "muon", "optimizer of the blocks' matrices; all else uses AdamW", choices=("muon", "adamw")
    )
    learning_rate: float = knob(1e-2, "peak rate of AdamW", 0.0, 1e9)
    matrix_learning_rate: float = knob(2e-2, "peak rate of Muon", 0.0, 1e9)
    layer_decay: float = knob(
        1.0,
        "each block's rates are this times those of the next one; the head's are full",
        0.01,
        1.0,
    )
    warmup: float = knob(0.02, "share of the budget in which the rate rises from 0", 0.0, 1.0)
    schedule: str = knob(
        "linear", "decay of the rate after warm-up", choices=("linear", "cosine", "constant")
    )
    averaging: float = knob(
        0.0, "final share of the budget over which weights are averaged; 0: no averaging", 0.0, 1.0
    )
    weight_decay: float = knob(0.1, "decoupled weight decay of matrices", 0.0, 10.0)
    gradient_clip: float = knob(1.0, "largest gradient norm; 0: no clipping", 0.0)
    dropout: float = knob(
        0.0, "dropout of sublayer outputs, and of an encoder's embeddings", 0.0, 0.95
    )
    # fine-tuning: which weights are trained
    lora_rank: int = knob(0, "rank of LoRA's matrices; 0: train all weights", 0, 1 << 16)
    lora_alpha: float = knob(
        0.0, "LoRA's output is scaled by lora_alpha / lora_rank; 0: twice the rank", 0.0, 1e9
    )
    lora_dropout: float = knob(0.0, "dropout of LoRA's input", 0.0, 0.95)
    lora_init: str = knob(
        "random",
        "initial LoRA A: random as in PEFT, or directions of the first step's gradient",
        choices=("random", "gradient"),
    )
    lora_targets: tuple[str, ...] = knob(
        ("all",), "layers that get LoRA; all: every matrix of the blocks", choices=LORA_TARGETS
    )
    frozen_layers: int = knob(
        0, "frozen blocks from the bottom (of the encoder if there is one), with embedding", 0, 1024
    )
    compile: str = knob(
        "auto",
        "torch.compile for the blocks; auto: on a GPU, in runs that repay the minute it takes",
        choices=("auto", "on", "off"),
    )
    precision: str = knob(
        "auto",
        "dtype of the forward pass; weights stay float32",
        choices=("auto", "float32", "bfloat16"),
    )
    # evaluation, saving, samples
    validation_bytes: int = knob(
        0,
        "bytes of the validation set that are evaluated; 0: 250,000, in a short run by steps, "
        "tokens or epochs as many as a tenth of its time affords",
        0,
    )
    eval_every: int = knob(
        0,
        "steps between evaluations; 0: an eighth of the budget, more if they took a tenth of it",
        0,
    )
    save_every: int = knob(
        0, "steps between resumable states, 10 minutes at most; 0: an eighth of the budget", 0
    )
    sample_every: int = knob(0, "steps between sample texts; 0: an eighth of the budget", 0)
    metric: str = knob(
        "loss",
        "what makes a model the best: lowest loss, or highest accuracy of targets (span: F1)",
        choices=("loss", "accuracy"),
    )
    patience: int = knob(
        0, "evaluations in a row without improvement that end the run; 0: never", 0
    )
    seed: int = knob(0, "seed of weights, data order, dropout and samples", 0, (1 << 63) - 1)


@dataclass(frozen=True)
class GenerateConfig:
    """How text is generated. Names and meaning are those of `generation_config.json`."""

    max_new_tokens: int = knob(256, "new tokens at most", 1)
    temperature: float = knob(0.8, "divides the logits; 0: greedy", 0.0, 100.0)
    top_k: int = knob(0, "keep the k most likely tokens; 0: keep all", 0)
    top_p: float = knob(
        0.95, "keep the most likely tokens with this total probability; 1: keep all", 0.0, 1.0
    )
    min_p: float = knob(
        0.0, "keep tokens at least this likely, relative to the most likely one", 0.0, 1.0
    )
    typical_p: float = knob(1.0, "keep tokens of typical surprisal with this probability", 0.0, 1.0)
    epsilon_cutoff: float = knob(0.0, "keep tokens at least this likely; 0: keep all", 0.0, 1.0)
    eta_cutoff: float = knob(0.0, "as epsilon_cutoff, lower if the entropy is high", 0.0, 1.0)
    top_h: float = knob(0.0, "keep tokens with this share of the entropy; 0: keep all", 0.0, 1.0)
    repetition_penalty: float = knob(
        1.0, "divides positive and multiplies negative logits of tokens seen", 0.01, 100.0
    )
    encoder_repetition_penalty: float = knob(1.0, "above 1: prefer tokens of the prompt", 0.01, 100)
    presence_penalty: float = knob(0.0, "subtracted from logits of generated tokens", -100, 100)
    frequency_penalty: float = knob(0.0, "the same for each time a token occurs", -100, 100)
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = knob((), "logits + value after ids")
    logit_bias: tuple[str, ...] = knob((), "TOKEN=VALUE, added to the logit of a token or id")
    ban: tuple[str, ...] = knob((), "texts that are never generated")
    regex: str = knob("", "a regular expression that the whole text matches")
    choices: tuple[str, ...] = knob((), "texts of which one is generated")
    json_schema: str = knob("", "a JSON schema (as text) of the JSON to generate")
    num_beams: int = knob(1, "beams of a beam search; 1: no beam search", 1, 1024)
    length_penalty: float = knob(
        1.0, "a beam's log-probability is divided by length to this power", -10.0, 10.0
    )
    early_stopping: str = knob(
        "false",
        "end a search at num_beams finished texts (true), when a longer one is unlikely to win "
        "(false), when none can (never)",
        choices=("false", "true", "never"),
    )
    max_length: int = knob(
        0, "tokens at most, prompt or start token included; 0: max_new_tokens decides", 0
    )
    min_new_tokens: int = knob(0, "new tokens before a text may end", 0)
    min_length: int = knob(
        0, "tokens before a text may end, prompt included; min_new_tokens has priority", 0
    )
    no_repeat_ngram_size: int = knob(0, "length of n-grams that never repeat; 0: all may", 0)
    encoder_no_repeat_ngram_size: int = knob(0, "the same for n-grams of the prompt", 0)
    exponential_decay_length_penalty: tuple[int, float] | None = knob(
        None, "[n, factor]: after n new tokens the end becomes likelier by factor, each step"
    )
    renormalize_logits: bool = knob(False, "beams: scores are log-probabilities after the rules")
    forced_bos_token_id: int | None = knob(None, "first id of every text", 0)
    forced_eos_token_id: int | None = knob(None, "last id of a text of full length", 0)
    suppress_tokens: tuple[int, ...] = knob((), "ids that are never generated")
    begin_suppress_tokens: tuple[int, ...] = knob((), "ids that are never generated first")
    bad_words_ids: tuple[tuple[int, ...], ...] = knob((), "sequences of ids never generated")
    stop_strings: tuple[str, ...] = knob(
        (), "a text ends with the token that completes one of these, which stay in it"
    )
    logprobs: int = knob(0, "likeliest tokens to note at each step", 0)
    on_long: str = knob(
        "error", "prompt beyond the context", choices=("error", "slide", "truncate")
    )


@dataclass(frozen=True)
class Recipe:
    """A whole run: what a preset sets and what `recipe.yaml` stores."""

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)

    def value(self, key: str) -> Any:
        """The value of "section.key"."""
        section, _, name = key.partition(".")
        return getattr(getattr(self, section), name)


SECTIONS: dict[str, Any] = {each.name: each.type for each in fields(Recipe)}


def check(section: type, key: str, value: Any, where: str) -> Any:
    """`value` converted to the type of field `key` of the dataclass `section`.

    Numbers may be text ("1e-5", which YAML reads as a string), durations "90s", "10m", "1h30m".
    Raises UsageError that names `where`, the key and the range.
    """
    spec = next(f for f in fields(section) if f.name == key)
    for words in (("off", "on"), ("false", "true")):  # which YAML reads as booleans
        if isinstance(value, bool) and words[1] in spec.metadata["choices"]:
            value = words[value]
    is_duration = key == "time" and isinstance(value, str)
    try:
        value = duration(value) if is_duration else _convert(spec.type, value)
    except (ValueError, OverflowError):  # infinity is not a whole number
        raise UsageError(
            f"{key}: {value!r} is not {type_name(spec.type)}",
            where=where,
            hint=f"{key}: {spec.metadata['meaning']}",
        ) from None
    _check_range(spec, value, where)
    return value


def _convert(kind: Any, value: Any) -> Any:
    if get_origin(kind) is tuple:
        types = get_args(kind)
        if isinstance(value, str) and types[0] is str:  # --set train.lora_targets=query,value
            value = [word.strip() for word in value.split(",")]
        if not isinstance(value, (list, tuple)) or (... not in types and len(value) != len(types)):
            raise ValueError
        types = types[:1] * len(value) if ... in types else types
        return tuple(map(_convert, types, value))
    if type(None) in get_args(kind):
        return None if value is None else _convert(get_args(kind)[0], value)
    if kind is bool:
        if isinstance(value, bool) or value in ("true", "false"):
            return value in (True, "true")
        raise ValueError
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError
    if kind is int:
        text = str(value).replace("_", "")
        if (number := float(text)) != int(number):
            raise ValueError
        return int(text) if text.lstrip("+-").isdigit() else int(number)  # a float has fewer digits
    if kind is str and not isinstance(value, str):
        raise ValueError
    return kind(value)


def type_name(kind: Any) -> str:
    """What values of a field's type are, in words."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}
    if get_origin(kind) is tuple:
        return {str: "a list of words", int: "a list of ids"}.get(get_args(kind)[0], "such a list")
    return type_name(get_args(kind)[0]) if get_args(kind) else names[kind]


def _check_range(spec: dataclasses.Field[Any], value: Any, where: str) -> None:
    low, high, choices = (spec.metadata[name] for name in ("low", "high", "choices"))
    for item in value if isinstance(value, tuple) else (value,):
        if choices and item not in choices:
            raise UsageError(
                f"{spec.name}: {item!r} is not one of {', '.join(choices)}"
                + did_you_mean(str(item), choices),
                where=where,
            )
    if value is None or isinstance(value, (str, bool, tuple)):
        return
    outside = (low is not None and not value >= low) or (high is not None and not value <= high)
    if outside or value != value or value in (float("inf"), float("-inf")):
        allowed = f"{low} to {high}" if high is not None else f"{low} or more"
        raise UsageError(
            f"{spec.name}: {value} is outside {allowed}",
            where=where,
            hint=f"{spec.name}: {spec.metadata['meaning']}",
        )


def duration(text: str) -> float:
    """Seconds of "90", "90s", "10m" or "1h30m" (5400); ValueError for anything else."""
    text = text.strip()
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    parts = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?", text)
    if not text or not parts:
        raise ValueError(f"{text!r} is not a duration")
    return sum(float(part or 0) * unit for part, unit in zip(parts.groups(), (3600, 60, 1)))
