"""A checkpoint family is a row of data: the keys of its `config.json`, the names of its tensors.

The rows stand in `families.py` and `encoder_families.py`; `lm help families` shows how to add one.
`config_json.py`, `weights.py` and `folder.py` read and write every family by its row alone.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lmcli.config import ModelConfig

# options that a family fixes; those that its row does not mention have ModelConfig's default
FIXED_OPTIONS = """
    query_key_norm attention_bias scale_attention query_pre_attn_scalar positions position_offset
    rotary_fraction norm norm_bias post_norm sandwich_norm parallel_block first_attention_norm
    embedding_norm hidden_act gated_mlp mlp_bias scale_embedding scale_logits type_vocab_size
    head_dense head_dense_bias head_norm head_bias sliding_window multi_label
""".split()
DEFAULT_OPTIONS = {name: getattr(ModelConfig, name) for name in FIXED_OPTIONS}
DEFAULT_OPTIONS["query_key_norm"] = False  # few families have it; our own models do

# a key of config.json → each value it may have and the options that value stands for, default first
Choices = Mapping[str, Sequence[tuple[Any, Mapping[str, Any]]]]


class TensorMap(NamedTuple):
    """A module (or one tensor) of a file and our modules that it holds; `{}` is the layer number.

    `layout` is "plain", "flat" (reshaped), "columns" (stored transposed), "less_one" (weight − 1 is
    stored), "rows" (several modules concatenated) or "heads" (the same within each head). With
    `when`, the entry applies only if that option has that value.
    """

    file_name: str
    modules: tuple[str, ...]
    layout: str = "plain"
    when: tuple[str, bool] | None = None


def tensors(table: str, prefix: str = "") -> tuple[TensorMap, ...]:
    """The TensorMaps of a table: in each line a file's module, ours, and a layout or a condition.

    >>> tensors("attn.qkv attention.[query,key] rows")[0].modules
    ('attention.query', 'attention.key')
    >>> tensors("wi mlp.up unless=gated_mlp", prefix="t5.")[0]
    TensorMap(file_name='t5.wi', modules=('mlp.up',), layout='plain', when=('gated_mlp', False))
    """
    return tuple(_tensor_map(prefix, *line.split()) for line in table.strip().splitlines())


def _tensor_map(prefix: str, file_name: str, module: str, *rest: str) -> TensorMap:
    start, _, names = module.removesuffix("]").partition("[")
    layout, when = "plain", None
    for word in rest:
        condition, is_condition, option = word.partition("=")
        if is_condition:
            when = (option, condition == "if")
        else:
            layout = word
    modules = tuple(f"{start}{name}" for name in names.split(","))
    return TensorMap(f"{prefix}{file_name}", modules, layout, when)


class LayerPattern(NamedTuple):
    """Which layers have full attention where config.json has no `layer_types`.

    `key` names a number, at least `low`, from which `is_full(layer, number)` follows. `number(layer
    types, window)` is what lm writes under the key; nothing where it is None.
    """

    key: str
    low: int
    is_full: Callable[[int, int], bool]
    number: Callable[[Sequence[str], int], int | None]


class WindowRule(NamedTuple):
    """How config.json states the width of the sliding window (`key`) and the layers that have one.

    The width counts the tokens on one or both `sides`; `one_side_key` may state one side alone, and
    then counts. `switch` is a key that must be true for a window. A model without a window is
    written with `off`. Without a `pattern` every layer has the window. `written` are the keys that
    lm writes.
    """

    key: str
    written: tuple[str, ...]
    sides: int = 1
    off: int | None = None
    pattern: LayerPattern | None = None
    switch: str | None = None
    one_side_key: str | None = None


@dataclass(frozen=True)
class GgufArchitecture:
    """How llama.cpp has a family: its `name`, and the values of options that it can compute.

    An empty tuple allows any value; an option that is left out has its default alone. With `paired`
    it rotates neighboring dimensions, so the rows of queries and keys are stored in another order.
    With `joined` queries, keys and values are one matrix. `frequencies`: it reads factors of rotary
    frequencies. `own_head`: it never takes the embedding as the head. `square`: its heads divide
    the hidden size. `parallel_key`: a key tells if its blocks are parallel. `full_every`:
    of so many layers the last has full attention, the others the window; 0: it has no window.
    """

    name: str
    options: Mapping[str, tuple[Any, ...]]
    paired: bool = False
    joined: bool = False
    frequencies: bool = False
    own_head: bool = False
    square: bool = False
    parallel_key: bool = False
    full_every: int = 0


@dataclass(frozen=True)
class Family:
    """One family: its `model_type`, its shape, its heads with their architectures, and these rules.

    config.json:
      keys             our option → its key
      options          options that the family fixes; `head_options` those that depend on the head
      defaults         values of keys that config.json may leave out
      fixed            keys with one supported value: always written, others are an error
      choices          keys whose value stands for some of our options
      fallbacks        a key that may be missing → the key whose value it takes then
      aliases          another name of a key → the key; of two values that of the other name counts
      derived          our option → the option whose value is written where it is 0
      repeated         a key that says again what one of our options is; it must not contradict
      architectures    further architectures whose files hold all that one of the heads needs → head
      window           how the sliding window is stated; None for families without one
      rope_keys        keys of the rotary base of full and of sliding layers, where there are two
      scales_full_only `rope_scaling` is that of full layers; the sliding ones have none
      rope_base_key    an older key of the rotary base, which goes before `rope_theta`
      padding_first    learned positions start behind the padding id and are counted with those rows

    Tensors:
      prefix           begins all names but those of a head; a bare model's file leaves it out
      tensors          names of the stacks' tensors; `head_tensors` those of each head
      embedding_copies modules that repeat the embedding in some files
      duplicates       a tensor that is stored a second time → the one lm reads
      optional         tensors that are zero when a file lacks them
      other_heads      modules of heads that lm does not have
      peft_names       a module's name in files → its name in transformers and PEFT, if different
      ignored          pattern of tensors that some files carry and no forward pass needs
      gguf             its architecture in llama.cpp, if it has one
    """

    model_type: str
    shape: str
    heads: Mapping[str, str]  # the first is taken when a file names no architecture
    keys: Mapping[str, str]
    tensors: tuple[TensorMap, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    head_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    choices: Choices = field(default_factory=dict)
    fallbacks: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    derived: Mapping[str, str] = field(default_factory=dict)
    repeated: Mapping[str, str] = field(default_factory=dict)
    architectures: Mapping[str, str] = field(default_factory=dict)
    window: WindowRule | None = None
    rope_keys: tuple[str, str] | None = None
    scales_full_only: bool = False
    rope_base_key: str = "rope_theta"
    padding_first: bool = False
    prefix: str = ""
    head_tensors: Mapping[str, tuple[TensorMap, ...]] = field(default_factory=dict)
    embedding_copies: tuple[str, ...] = ()
    duplicates: Mapping[str, str] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    other_heads: tuple[str, ...] = ()
    peft_names: Mapping[str, str] = field(default_factory=dict)
    ignored: str = r"rotary_emb\.inv_freq$"
    gguf: GgufArchitecture | None = None

    def options_for(self, head: str) -> dict[str, Any]:
        """Every option that the family fixes for a head."""
        return {**DEFAULT_OPTIONS, **self.options, **self.head_options.get(head, {})}

    def file_module(self, module: str) -> str:
        """The name in files of a module of ours: "embedding", or a decoder's "head.output"."""
        entries = (*self.tensors, *self.head_tensors.get("lm", ()))
        return next(entry.file_name for entry in entries if entry.modules == (module,))


def same(*names: str) -> dict[str, str]:
    """Options whose keys in config.json have the same name."""
    return {name: name for name in names}


def values(table: str) -> dict[str, Any]:
    """The keys and values of a table with KEY=VALUE; a value is JSON, or else a word.

    >>> values("vocab_size=100 hidden_act=gelu tie_word_embeddings=true")
    {'vocab_size': 100, 'hidden_act': 'gelu', 'tie_word_embeddings': True}
    """
    pairs = (word.split("=") for word in table.split())
    return {key: _value(text) for key, text in pairs}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def choice(option: str, off: Any = False, on: Any = True, default: bool = False) -> Sequence:
    """The choices of a true-or-false key: the values of `option` that false and true stand for."""
    choices = [(False, {option: off}), (True, {option: on})]
    return choices[::-1] if default else choices


# keys that most families share
IDS = same("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")
SHAPE_KEYS = same(
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "hidden_act",
)
# options of families with a bias in every matrix of the blocks
ALL_BIASES = {"attention_bias": "all", "mlp_bias": True}
LM_HEAD = {"lm": tensors("lm_head head.output")}
