"""Small random checkpoints of every family and head from transformers, compared with our model.

`CASES` are each family and head of `lmcli.checkpoints.families`, with further variants of options.
The sizes are odd on purpose: 41 words, heads that do not divide the width, unequal stacks.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from torch import Tensor

from lmcli.checkpoints.families import FAMILIES
from lmcli.checkpoints.folder import Checkpoint
from lmcli.model.attention import EncoderOutput
from lmcli.model.transformer import Stack, Transformer

WORDS = {"vocab_size": 41, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
PLAIN = {
    **WORDS,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 22,
    "max_position_embeddings": 40,
}
GROUPED = {**PLAIN, "num_key_value_heads": 2, "head_dim": 10}
GROUPED_BY_WIDTH = {**PLAIN, "num_key_value_heads": 2}
TWO_STACKS = {
    **WORDS,
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 22,
    "decoder_ffn_dim": 20,
    "max_position_embeddings": 40,
    "decoder_start_token_id": 0,
}
T5 = {
    "vocab_size": 41,
    "d_model": 24,
    "d_kv": 5,
    "d_ff": 22,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 10,
    "decoder_start_token_id": 0,
}


def _rope(kind: str, **values: float) -> dict[str, Any]:
    return {**GROUPED, "rope_parameters": {"rope_type": kind, "rope_theta": 50.0, **values}}


# the first variant of a family is used for all heads, the others for its first head
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "grouped": GROUPED,
        "biases": {
            **GROUPED,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
        "one key head": {**GROUPED, "num_key_value_heads": 1, "rms_norm_eps": 0.1},
        "linear": _rope("linear", factor=3.0),
        "yarn": _rope("yarn", factor=3.0, original_max_position_embeddings=16),
        "llama3": _rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=16,
        ),
    },
    "mistral": {
        "window": {**GROUPED, "sliding_window": 5},
        "no window": {**GROUPED, "sliding_window": None},
        "wide window": {**GROUPED, "sliding_window": 100},
    },
    "qwen2": {
        "grouped": GROUPED_BY_WIDTH,
        "tied": {**GROUPED_BY_WIDTH, "tie_word_embeddings": True},
        "window": {
            **GROUPED_BY_WIDTH,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 1,
        },
        "layers": {
            **GROUPED_BY_WIDTH,
            "use_sliding_window": True,
            "sliding_window": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    },
    "qwen3": {
        "grouped": GROUPED,
        "tied": {**GROUPED, "tie_word_embeddings": True, "attention_bias": True},
        "window": {
            **GROUPED,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 2,
        },
    },
    "gemma3_text": {
        "window": {
            **GROUPED,
            "num_hidden_layers": 7,
            "sliding_window": 5,
            "query_pre_attn_scalar": 10,
        },
        "scaled": {
            **GROUPED,
            "sliding_window": 5,
            "query_pre_attn_scalar": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 50.0, "factor": 3.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
            },
        },
    },
    "gpt2": {
        "plain": {
            **WORDS,
            "n_embd": 24,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 40,
            "n_inner": 22,
        },
        "untied": {
            **WORDS,
            "n_embd": 24,
            "n_layer": 1,
            "n_head": 3,
            "n_positions": 40,
            "activation_function": "relu",
            "tie_word_embeddings": False,
        },
    },
    "gpt_neox": {
        "part": {**PLAIN, "rotary_pct": 0.34},
        "sequential": {
            **PLAIN,
            "use_parallel_residual": False,
            "attention_bias": False,
            "rotary_pct": 1.0,
        },
        "tied": {**PLAIN, "rotary_pct": 0.7, "rotary_emb_base": 50, "tie_word_embeddings": True},
    },
    "modernbert": {
        "window": {
            **PLAIN,
            "num_hidden_layers": 4,
            "local_attention": 6,
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
        "full": {
            **PLAIN,
            "layer_types": ["full_attention"] * 3,
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
        "window first": {
            **PLAIN,
            "num_hidden_layers": 2,
            "local_attention": 4,
            "cls_token_id": 1,
            "sep_token_id": 2,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    },
    "bert": {
        "plain": {**PLAIN, "type_vocab_size": 3},
        "untied": {**PLAIN, "tie_word_embeddings": False, "hidden_act": "relu"},
        "one layer": {
            **PLAIN,
            "num_hidden_layers": 1,
            "layer_norm_eps": 0.1,
            "hidden_act": "gelu_new",
        },
    },
    "roberta": {
        "plain": {**PLAIN, "pad_token_id": 1, "bos_token_id": 0, "type_vocab_size": 1},
        "padding 3": {**PLAIN, "pad_token_id": 3, "type_vocab_size": 1},
        "padding 0": {
            **PLAIN,
            "pad_token_id": 0,
            "type_vocab_size": 2,
            "tie_word_embeddings": False,
        },
    },
    "distilbert": {
        "plain": {
            **WORDS,
            "dim": 24,
            "n_layers": 3,
            "n_heads": 4,
            "hidden_dim": 22,
            "max_position_embeddings": 40,
        },
        "sinusoids": {
            **WORDS,
            "dim": 24,
            "n_layers": 2,
            "n_heads": 2,
            "hidden_dim": 22,
            "max_position_embeddings": 40,
            "sinusoidal_pos_embds": True,
            "activation": "relu",
        },
    },
    "t5": {
        "1.0": T5,
        "1.1": {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        "gated": {**T5, "feed_forward_proj": "gated-silu", "num_decoder_layers": None},
    },
    "bart": {
        "plain": TWO_STACKS,
        "scaled": {**TWO_STACKS, "scale_embedding": True, "activation_function": "relu"},
        "deep encoder": {
            **TWO_STACKS,
            "encoder_layers": 4,
            "decoder_layers": 1,
            "encoder_attention_heads": 3,
        },
    },
    "marian": {
        "swish": {**TWO_STACKS, "scale_embedding": True, "activation_function": "swish"},
        "plain": {**TWO_STACKS, "activation_function": "relu"},
    },
}
LABELS = {
    "sequence": {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}},
    "token": {
        "id2label": {0: "O", 1: "B-name", 2: "I-name"},
        "label2id": {"O": 0, "B-name": 1, "I-name": 2},
    },
}


@dataclass(frozen=True)
class Case:
    """A family, one of its heads, and the name of a variant of its options."""

    family: str
    head: str
    variant: str

    def __str__(self) -> str:
        return f"{self.family}-{self.head}-{self.variant}"

    @property
    def shape(self) -> str:
        return FAMILIES[self.family].shape

    @property
    def paddings(self) -> tuple[str, ...]:
        """The sides on which a batch may be padded."""
        return ("none", "right", "left") if self.shape == "decoder" else ("none", "right")

    def options(self) -> dict[str, Any]:
        return {**OPTIONS[self.family][self.variant], **LABELS.get(self.head, {})}

    def model(self) -> transformers.PreTrainedModel:
        """A model of transformers with random weights."""
        kind = getattr(transformers, FAMILIES[self.family].heads[self.head])
        return fill(kind(kind.config_class(**self.options())))


CASES = [
    Case(family, head, variant)
    for family, row in FAMILIES.items()
    for number, head in enumerate(row.heads)
    for variant in (OPTIONS[family] if number == 0 else [next(iter(OPTIONS[family]))])
]


def fill(model: torch.nn.Module, seed: int = 0) -> Any:
    """A new model with all weights random, so that each one matters.

    Biases are near 0, norms near 1, or near 0 where a norm multiplies by 1 + weight.
    """
    generator = torch.Generator().manual_seed(seed)
    named = {
        **dict(model.named_parameters()),
        **{
            name: tensor
            for name, tensor in model.named_buffers()
            if name.endswith("final_logits_bias")
        },
    }
    with torch.no_grad():
        for name, weight in sorted(named.items()):
            noise = 0.3 * torch.randn(weight.shape, generator=generator)
            if weight.requires_grad or "bias" in name:  # not sinusoids
                weight.copy_(weight + noise if weight.ndim == 1 else noise)
    return model.eval()


def write(folder: Path, theirs: transformers.PreTrainedModel, **options: Any) -> Path:
    """Saves a model of transformers and a tokenizer of 37 words, which names no family."""
    theirs.save_pretrained(folder, **options)
    words = tokenizers.models.BPE({f"word{i}": i for i in range(37)}, [], unk_token="word3")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder


def difference(ours: Tensor, theirs: Tensor) -> float:
    """‖ours − theirs‖ / ‖theirs‖."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()


def batch(case: Case, padding: str, config: Any) -> dict[str, Tensor]:
    """Inputs of a case with the names of transformers: four rows of 19 words, padded on a side."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 41, (4, 19), generator=generator)
    mask = torch.ones_like(ids)
    if padding != "none":
        for row, length in enumerate((19, 12, 5, 1)):
            mask[row] = (
                torch.arange(19) < length if padding == "right" else torch.arange(19) >= 19 - length
            )
    inputs = {"input_ids": ids.masked_fill(mask == 0, config.pad_token_id or 0)}
    if padding != "none":
        inputs["attention_mask"] = mask
    if padding == "left":  # as in `generate` of transformers
        inputs["position_ids"] = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    if getattr(config, "type_vocab_size", 0) and case.shape == "encoder" and padding == "right":
        inputs["token_type_ids"] = torch.randint(
            0, config.type_vocab_size, ids.shape, generator=generator
        )
    if case.shape == "encoder-decoder":
        inputs["decoder_input_ids"] = torch.randint(4, 41, (4, 11), generator=generator)
    return inputs


def forward(model: Transformer, inputs: dict[str, Tensor]) -> Tensor:
    """Our logits for inputs with the names of transformers."""
    return model(**{name: tensor for name, tensor in inputs.items() if name != "position_ids"})


def logits(output: Any) -> Tensor:
    """The output of transformers in our form: one tensor for both ends of a span, or the pooled."""
    if "start_logits" in output:
        return torch.stack([output.start_logits, output.end_logits], dim=-1)
    if "logits" in output:
        return output.logits
    pooled = output.get("pooler_output")
    return output.last_hidden_state[:, 0] if pooled is None else pooled


def stack_states(stack: Stack) -> tuple[list[Tensor], list[Any]]:
    """(hidden states as in transformers, which the next forward pass collects; hooks to remove).

    They are the input of the first block, the outputs of all blocks but the last, and that of the
    stack.
    """
    states: list[Tensor] = []
    hooks = [
        stack.layers[0].register_forward_pre_hook(
            lambda _block, arguments: states.append(arguments[0])
        )
    ]
    hooks += [
        block.register_forward_hook(lambda _block, _arguments, output: states.append(output))
        for block in stack.layers[:-1]
    ]
    return states, [
        *hooks,
        stack.register_forward_hook(lambda _stack, _arguments, output: states.append(output)),
    ]


@torch.inference_mode()
def differences(
    case: Case, ours: Transformer, theirs: transformers.PreTrainedModel, padding: str
) -> dict[str, float]:
    """Our relative differences from transformers where there are tokens, in forward order.

    They are those of the hidden states after the embeddings and after each layer of each stack, and
    of the "logits".
    """
    inputs = batch(case, padding, theirs.config)
    expected = theirs(**inputs, output_hidden_states=True)
    stacks = {
        name: stack_states(stack)
        for name, stack in (("encoder", ours.encoder), ("decoder", ours.decoder))
        if stack
    }
    output = forward(ours, inputs)
    for hook in [hook for _, hooks in stacks.values() for hook in hooks]:
        hook.remove()
    if case.shape == "encoder-decoder":
        states = {
            "encoder": expected.encoder_hidden_states,
            "decoder": expected.decoder_hidden_states,
        }
    else:
        states = dict.fromkeys(stacks, expected.hidden_states)
    token_mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    errors = {}
    for name, (layers, _) in stacks.items():
        mask = (
            torch.ones_like(inputs["decoder_input_ids"]).bool()
            if name == "decoder" and len(stacks) == 2
            else token_mask
        )
        for i, (a, b) in enumerate(zip(layers, states[name], strict=True)):
            errors[f"{name} layer {i}" if i else f"{name} embeddings"] = difference(
                a[mask], b[mask]
            )
    by_token = output.ndim == 3 and case.shape != "encoder-decoder"
    expected_logits = logits(expected)
    return {
        **errors,
        "logits": difference(
            output[token_mask] if by_token else output,
            expected_logits[token_mask] if by_token else expected_logits,
        ),
    }


@torch.inference_mode()
def steps(
    model: Transformer, inputs: dict[str, Tensor], sizes: list[int], cache: Any
) -> Iterator[Tensor]:
    """Our logits of a decoder with a cache, in chunks of these sizes."""
    encoder_output: EncoderOutput | None = None
    ids, mask, start = inputs["input_ids"], inputs.get("attention_mask"), 0
    if "decoder_input_ids" in inputs:
        encoder_output, ids, mask = model.encode(ids, mask), inputs["decoder_input_ids"], None
    for size in sizes:
        end = start + size
        yield model.head(
            model.hidden(
                ids[:, start:end], None if mask is None else mask[:, :end], cache, encoder_output
            )
        )
        start = end
    assert start == ids.shape[1]


@dataclass
class Pair:
    """One checkpoint, loaded from the same folder by transformers and by lm."""

    case: Case
    folder: Path
    theirs: transformers.PreTrainedModel
    checkpoint: Checkpoint

    @property
    def ours(self) -> Transformer:
        return self.checkpoint.model


def pair(case: Case, folder: Path, load: Any) -> Pair:
    """Writes the random checkpoint of a case to a folder and loads it; `load` is that of lm."""
    theirs = case.model()
    write(folder, theirs)
    return Pair(case, folder, type(theirs).from_pretrained(folder).eval(), load(folder))
