"""Every knob, one dataclass per subject. Names are those of a Hugging Face `config.json` where it has one.

Each field carries its default, what it means with its unit, and its range; `check` holds a value against them.
"""

import dataclasses
import difflib
import re
from dataclasses import dataclass, field, fields
from typing import Any, get_args, get_origin

from lmcli.errors import UsageError

Number = int | float
LORA_TARGETS = ("all", "query", "key", "value", "output", "gate", "up", "down", "embedding", "head")


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
    """The architecture of one Transformer. What tells checkpoint families apart is an option here like any other."""

    model_type: str = knob("", "checkpoint family it is saved as; empty takes the first that has these options")
    shape: str = knob("decoder", "which stacks there are", choices=("decoder", "encoder", "encoder-decoder"))
    head: str = knob("lm", "what the hidden states are turned into: words, a label of the text, of each token, an answer's "
                     "span", choices=("lm", "sequence", "token", "span", "none"))
    labels: tuple[str, ...] = knob((), "names of the labels, for the heads sequence and token")
    multi_label: bool = knob(False, "a text may have several labels, each with a probability of its own")
    vocab_size: int = knob(0, "rows of the embedding; 0 takes the tokenizer's size", 0)
    max_position_embeddings: int = knob(0, "context in tokens; 0 takes train.context", 0, 1 << 24)
    # width and depth; an encoder beside a decoder may differ in depth, heads and MLP, 0 means as the decoder
    hidden_size: int = knob(256, "width of the residual stream", 1, 1 << 17)
    num_hidden_layers: int = knob(4, "blocks of the only stack, or of the decoder", 1, 1024)
    num_encoder_layers: int = knob(0, "blocks of the encoder; 0 means as many as num_hidden_layers", 0, 1024)
    # attention
    num_attention_heads: int = knob(4, "query heads", 1, 1024)
    encoder_attention_heads: int = knob(0, "heads of the encoder; 0 means num_attention_heads", 0, 1024)
    num_key_value_heads: int = knob(0, "key and value heads; 0 means as many as query heads", 0, 1024)
    head_dim: int = knob(0, "width of a head; 0 means hidden_size / num_attention_heads", 0, 4096)
    query_key_norm: bool = knob(True, "RMSNorm on the queries and keys of each head (saved as Qwen3; without: Llama)")
    attention_bias: str = knob("none", "which projections have a bias", choices=("none", "qkv", "all"))
    scale_attention: bool = knob(True, "divide scores by the root of head_dim")
    sliding_window: int = knob(0, "tokens seen by layers with a sliding window (encoder: to each side); 0 is all", 0)
    layer_types: tuple[str, ...] = knob((), "full_attention or sliding_attention of each layer; empty: all slide, if any")
    # positions
    positions: str = knob("rotary", "how a position is told", choices=("rotary", "learned", "sinusoidal", "relative"))
    position_offset: int = knob(0, "rows of learned positions before the first", 0, 1024)
    rope_theta: float = knob(10_000.0, "base of the rotary frequencies", 1.0)
    local_rope_theta: float = knob(0.0, "the base in layers with a sliding window; 0 means rope_theta", 0.0)
    rotary_fraction: float = knob(1.0, "share of each head that rotary positions turn", 0.0, 1.0)
    rope_type: str = knob("default", "how rotary positions reach further than training did",
                          choices=("default", "linear", "llama3", "yarn"))
    rope_factor: float = knob(1.0, "how many times further", 1.0, 1e6)
    rope_original_context: int = knob(0, "context of training (llama3, yarn); 0 means max_position_embeddings", 0)
    rope_low_freq_factor: float = knob(1.0, "turns within it up to which a frequency is divided (llama3)", 0.0)
    rope_high_freq_factor: float = knob(4.0, "turns within it from which a frequency is kept (llama3)", 0.0)
    relative_attention_num_buckets: int = knob(32, "distances that relative positions tell apart", 4, 1 << 16)
    relative_attention_max_distance: int = knob(128, "distance from which all are one", 2, 1 << 24)
    # norms
    norm: str = knob("rms", "kind of norm", choices=("rms", "layer"))
    norm_bias: bool = knob(True, "LayerNorm has a bias")
    norm_eps: float = knob(1e-6, "added to the mean square", 0.0, 1.0)
    post_norm: bool = knob(False, "norm(x + f(x)) instead of x + f(norm(x))")
    parallel_block: bool = knob(False, "attention and MLP read the same x")
    first_attention_norm: bool = knob(True, "the first block has a norm before its attention")
    embedding_norm: bool = knob(False, "a norm on the sum of embeddings")
    # MLP
    intermediate_size: int = knob(0, "width inside the MLP; 0: 4 times hidden_size, or gated 8/3 in steps of 32", 0, 1 << 20)
    encoder_intermediate_size: int = knob(0, "the encoder's; 0 means intermediate_size", 0, 1 << 20)
    hidden_act: str = knob("silu", "activation", choices=(
        "silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "relu", "tanh"))
    gated_mlp: bool = knob(True, "a second product of the input, multiplied in")
    mlp_bias: bool = knob(False, "the MLP's products have a bias")
    # embeddings and head
    tie_word_embeddings: bool = knob(True, "the head uses the embedding matrix")
    scale_embedding: bool = knob(False, "multiply embeddings by the root of hidden_size")
    scale_logits: bool = knob(False, "divide what the head reads by the root of hidden_size")
    type_vocab_size: int = knob(0, "token types; 0 has none", 0, 1024)
    mean_pooling: bool = knob(False, "a text's label is told from the mean of its tokens, not the first (head sequence)")
    head_dense: bool = knob(False, "one more dense layer before the output")
    head_dense_bias: bool = knob(True, "that layer has a bias")
    head_norm: bool = knob(False, "a norm after that layer")
    head_act: str = knob("", "activation of that layer; empty means hidden_act")
    head_bias: bool = knob(False, "the output over the vocabulary has a bias")
    # special ids
    bos_token_id: int | None = knob(None, "id that starts a context, if the tokenizer names none", 0)
    eos_token_id: int | None = knob(None, "id that ends a text, if the tokenizer names none", 0)
    pad_token_id: int | None = knob(None, "id that fills rows up", 0)
    decoder_start_token_id: int | None = knob(None, "id that a decoder starts from when it reads an encoder", 0)

    @property
    def rotary_size(self) -> int:
        """How many numbers of each head rotary positions turn."""
        return int(self.head_dim * self.rotary_fraction)

    @property
    def encoder_head_dim(self) -> int:
        """Width of the encoder's heads: head_dim, or where heads share out the hidden size, its share."""
        shared = self.head_dim * self.num_attention_heads == self.hidden_size
        return self.hidden_size // self.encoder_attention_heads if shared else self.head_dim

    def kinds_of_layers(self, count: int) -> tuple[str, ...]:
        """full_attention or sliding_attention, for each of `count` layers."""
        return self.layer_types or ("sliding_attention" if self.sliding_window else "full_attention",) * count

    def complete(self) -> "ModelConfig":
        """The same configuration with every 0 that means "derive it" replaced. Raises UsageError when sizes cannot fit."""
        if not self.head_dim and self.hidden_size % self.num_attention_heads:
            raise UsageError(
                f"num_attention_heads {self.num_attention_heads} does not divide hidden_size {self.hidden_size}",
                where="model", hint="choose a divisor of hidden_size, or set head_dim")
        wide = -(-self.hidden_size * 8 // 3 // 32) * 32 if self.gated_mlp else 4 * self.hidden_size
        two = self.shape == "encoder-decoder"  # an only stack has one set of sizes
        done = dataclasses.replace(
            self,
            intermediate_size=self.intermediate_size or wide,
            encoder_intermediate_size=(two and self.encoder_intermediate_size) or self.intermediate_size or wide,
            num_encoder_layers=(two and self.num_encoder_layers) or self.num_hidden_layers,
            encoder_attention_heads=(two and self.encoder_attention_heads) or self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads or self.num_attention_heads,
            head_dim=self.head_dim or self.hidden_size // self.num_attention_heads,
            head_act=self.head_act or self.hidden_act,
        )
        done._check()
        return done

    def _check(self) -> None:
        for heads in ("num_attention_heads", "encoder_attention_heads"):
            if getattr(self, heads) * self.num_key_value_heads % self.num_attention_heads \
                    or self.num_attention_heads % self.num_key_value_heads:
                raise UsageError(
                    f"num_key_value_heads {self.num_key_value_heads} does not divide {heads} {getattr(self, heads)}",
                    where="model", hint="choose a divisor, or 0")
        if self.positions == "rotary" and self.rotary_size % 2:
            odd = f"head_dim {self.head_dim}" if self.rotary_fraction == 1.0 else f"rotary part {self.rotary_size} of a head"
            raise UsageError(f"{odd} is odd", where="model",
                             hint="rotary positions turn pairs of numbers: choose an even head_dim")
        if self.layer_types and len(self.layer_types) != self.num_hidden_layers:
            raise UsageError(f"layer_types names {len(self.layer_types)} layers, num_hidden_layers is "
                             f"{self.num_hidden_layers}", where="model")


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
    micro_batch_tokens: int = knob(0, "tokens of one forward pass at most, halved where memory runs out; 0 takes 16,384, "
                                   "with CUDA 65,536", 0)
    recompute: str = knob("auto", "whether the backward pass calculates activations again: slower, in less memory; auto "
                          "does so where not even one row fits otherwise", choices=("auto", "on", "off"))
    # what is learnt
    objective: str = knob("auto", "what is predicted; auto goes by the model's shape and the data's fields",
                          choices=("auto", "causal", "completion", "masked", "seq2seq", "classification", "span"))
    document_masks: bool = knob(False, "tokens of a packed row see only those of their own document (causal)")
    new_head: bool = knob(False, "a model that is trained further gets a new head, for the labels of the data")
    mask_share: float = knob(0.15, "share of tokens to be guessed (masked)", 0.001, 1.0)
    doc_stride: int = knob(128, "tokens from one window over a long context to the next, half a window at most (span)", 1)
    label_smoothing: float = knob(0.0, "probability spread over all words (seq2seq)", 0.0, 0.9)
    # optimizer and schedule
    optimizer: str = knob("muon", "update rule of the blocks' matrices; all else has AdamW", choices=("muon", "adamw"))
    learning_rate: float = knob(1e-2, "AdamW's, at the top of the schedule", 0.0, 1e9)
    matrix_learning_rate: float = knob(2e-2, "Muon's, at the top of the schedule", 0.0, 1e9)
    layer_decay: float = knob(1.0, "a block's rates are this times those of what it hands on to; the head's are full",
                              0.01, 1.0)
    warmup: float = knob(0.02, "share of the budget in which the rate rises from 0", 0.0, 1.0)
    schedule: str = knob("linear", "fall of the rate after warm-up", choices=("linear", "cosine", "constant"))
    averaging: float = knob(0.0, "share of the budget, its last, over whose steps weights are averaged: their mean is what "
                            "is measured and kept", 0.0, 1.0)
    weight_decay: float = knob(0.1, "decoupled decay of matrices", 0.0, 10.0)
    gradient_clip: float = knob(1.0, "largest gradient norm; 0 leaves gradients alone", 0.0)
    dropout: float = knob(0.0, "share of sublayer outputs, beside an encoder of embeddings too, set to zero", 0.0, 0.95)
    # of a model that is trained further: what of it is trained
    lora_rank: int = knob(0, "rank of the matrices that LoRA trains beside frozen ones; 0 trains all weights", 0, 1 << 16)
    lora_alpha: float = knob(0.0, "what they add is multiplied by lora_alpha / lora_rank; 0 takes twice the rank", 0.0, 1e9)
    lora_dropout: float = knob(0.0, "share of what they read set to zero", 0.0, 0.95)
    lora_init: str = knob("random", "what they read at first: directions drawn as PEFT does, or those of the first step's "
                          "gradient", choices=("random", "gradient"))
    lora_targets: tuple[str, ...] = knob(("all",), "what gets them; all: every matrix of the blocks", choices=LORA_TARGETS)
    frozen_layers: int = knob(0, "blocks from the bottom (of two stacks: the encoder's) that are not trained, nor is the "
                              "embedding then", 0, 1024)
    compile: str = knob("auto", "torch.compile for the blocks; auto: on a GPU, in runs that repay the minute it takes",
                        choices=("auto", "on", "off"))
    precision: str = knob("auto", "of the forward pass; weights stay float32", choices=("auto", "float32", "bfloat16"))
    # what is looked at, kept and shown
    validation_bytes: int = knob(250_000, "at most so many bytes of the held-out part are measured", 1)
    eval_every: int = knob(0, "steps between evaluations; 0 means an eighth of the budget, or more where they would take a "
                          "fifteenth of its time", 0)
    save_every: int = knob(0, "steps between resumable states; 0 means an eighth of the budget", 0)
    sample_every: int = knob(0, "steps between sample texts; 0 means an eighth of the budget", 0)
    metric: str = knob("loss", "what tells the best model of a run: the lowest loss, or the most targets that were the "
                       "likeliest choice (span: the highest F1)", choices=("loss", "accuracy"))
    patience: int = knob(0, "evaluations in a row without a better one that end the run; 0 never does", 0)
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
    early_stopping: str = knob("false", "a search ends with num_beams texts finished (true), when a longer one is not "
                               "likely to beat them (false), when none can (never)", choices=("false", "true", "never"))
    max_length: int = knob(0, "tokens at most, the prompt or start token counted; 0 leaves it to max_new_tokens", 0)
    min_new_tokens: int = knob(0, "tokens before a text may end", 0)
    min_length: int = knob(0, "the same, the prompt or start token counted; min_new_tokens goes first", 0)
    no_repeat_ngram_size: int = knob(0, "so many tokens in a row never come twice; 0 lets them", 0)
    forced_bos_token_id: int | None = knob(None, "id that is written first", 0)
    forced_eos_token_id: int | None = knob(None, "id that is written last when a text grows to its full length", 0)
    suppress_tokens: tuple[int, ...] = knob((), "ids never written")
    begin_suppress_tokens: tuple[int, ...] = knob((), "ids never written first")
    bad_words_ids: tuple[tuple[int, ...], ...] = knob((), "rows of ids never written one after another")


@dataclass(frozen=True)
class Recipe:
    """A whole run: what a preset says and what `recipe.yaml` stores."""

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)

    def value(self, key: str) -> Any:
        """What it has for "section.key"."""
        section, _, name = key.partition(".")
        return getattr(getattr(self, section), name)


def check(section: type, key: str, value: Any, where: str) -> Any:
    """`value` as the type of field `key` of dataclass `section`, or UsageError naming `where`, the key and the range.

    Numbers may come as text ("1e-5", which YAML reads as a string), durations as "90s", "10m", "1h30m".
    """
    spec = next(f for f in fields(section) if f.name == key)
    if isinstance(value, bool) and "on" in spec.metadata["choices"]:  # as YAML reads the words on and off
        value = "on" if value else "off"
    try:
        value = _convert(spec.type, "time" if spec.name == "time" else "", value)
    except (ValueError, OverflowError):  # infinity is no whole number
        raise UsageError(f"{key}: {value!r} is not {_described(spec.type)}", where=where,
                         hint=f"{key}: {spec.metadata['meaning']}") from None
    _check_range(spec, value, where)
    return value


def _convert(kind: Any, unit: str, value: Any) -> Any:
    if get_origin(kind) is tuple:
        if isinstance(value, str) and get_args(kind)[0] is str:  # --set train.lora_targets=query,value
            value = [word.strip() for word in value.split(",")]
        if not isinstance(value, (list, tuple)):
            raise ValueError
        return tuple(_convert(get_args(kind)[0], "", item) for item in value)
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
    if get_origin(kind) is tuple:
        return "a list of words" if get_args(kind)[0] is str else "a list of ids"
    return names[get_args(kind)[0] if get_args(kind) else kind]


def _check_range(spec: dataclasses.Field, value: Any, where: str) -> None:
    low, high, choices = (spec.metadata[name] for name in ("low", "high", "choices"))
    wrong = [item for item in (value if isinstance(value, tuple) else (value,)) if choices and item not in choices]
    if wrong:
        near = difflib.get_close_matches(str(wrong[0]), choices, n=1, cutoff=0.5)
        raise UsageError(f"{spec.name}: {wrong[0]!r} is not one of {', '.join(choices)}"
                         + (f"; did you mean {near[0]!r}?" if near else ""), where=where)
    if value is None or isinstance(value, (str, bool, tuple)):
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
