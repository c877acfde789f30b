"""How much memory training takes, in bytes, from the configuration alone.

Counts tensor by tensor what `model` keeps for the backward pass, with the functions of `kernels` (a
decoder on the CPU) or with PyTorch alone. No PyTorch here; `tests/model/test_memory.py` compares
with what autograd really keeps.
"""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

from lmcli.config import ModelConfig, TrainConfig
from lmcli.model import flops

SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
MASTER = 4  # weights, their gradients and moments are float32
# how the functions of `kernels` divide their work; they import these numbers
QUERIES_AT_ONCE = (
    128  # rows of scores in a product: few above the diagonal, and products stay large
)
KEPT_WEIGHTS = 512  # longest row whose attention weights are kept for the backward pass
LOGIT_ROWS_AT_ONCE = 1024  # rows of logits in a chunk, for the kernels: they stay in the cache
LOGITS_AT_ONCE = {"cpu": 1 << 23, "mps": 1 << 23, "cuda": 1 << 28}  # logits in a chunk elsewhere
FEWEST_ROWS = 128  # but at least this many rows, so that the product stays efficient
USABLE = 0.8  # share of a device for weights, gradients and moments; the rest is for a micro-batch
ORTHOGONAL = 4  # copies of the largest group of equal matrices that Muon works with
# products of many shapes in bfloat16 (`kernels.products`): the code of 256, and holes between
# tensors as a share of the activations, as measured with preset translate
PRODUCT_CODE, HOLES = 90_000_000, 0.5


class Memory(NamedTuple):
    """What a training step holds, in bytes.

    `optimizer` are the moments. `activations` are what a micro-batch keeps for its backward pass,
    and what it works with at the peak. `update` is what the optimizer works with, after that.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    update: int = 0

    @property
    def total(self) -> int:
        """The most that is held at any time."""
        return self.weights + self.gradients + self.optimizer + max(self.activations, self.update)


def logit_rows(device_type: str, words: int) -> int:
    """How many rows of logits over `words` tokens PyTorch computes at a time."""
    return max(FEWEST_ROWS, LOGITS_AT_ONCE[device_type] // words)


def training_memory(
    config: ModelConfig,
    train: TrainConfig,
    micro_batch_tokens: int,
    dtype: str = "bfloat16",
    checkpointing: bool = False,
    fused: bool = True,
    device: str = "cpu",
) -> Memory:
    """The Memory of training a complete configuration, with activations in `dtype`.

    `checkpointing` keeps only the input of each block. `fused` says that the compiled kernels can
    be used. With LoRA, only its matrices have gradients and moments; they are taken to be in all
    blocks, and at embedding and head where named.
    """
    total, inner = flops.parameters(config).total, inner_matrices(config)
    trained, by_muon, adapters = total, 0, 0
    if train.lora_rank:
        tables = sum(target in train.lora_targets for target in ("embedding", "head"))
        targets = [*inner, (tables, config.vocab_size, config.hidden_size)]
        sizes = sum(count * (rows + columns) for count, rows, columns in targets)
        trained = adapters = train.lora_rank * sizes
    groups: dict[tuple[int, int], int] = {}
    if train.optimizer == "muon" and not train.lora_rank:
        for count, rows, columns in inner:
            groups[rows, columns] = groups.get((rows, columns), 0) + count * rows * columns
        by_muon = sum(groups.values())
    moments = 2 * (trained - by_muon) + by_muon + (trained if train.averaging else 0)
    batch = MicroBatch(config, train, micro_batch_tokens, SIZES[dtype], checkpointing, fused)
    return Memory(
        MASTER * (total + adapters),
        MASTER * trained,
        MASTER * moments,
        batch.kept() + batch.worked_with(device),
        ORTHOGONAL * SIZES[dtype] * max(groups.values(), default=0),
    )


def many_shapes(needed: Memory) -> int:
    """Bytes that a CPU needs besides if batches in bfloat16 have many shapes."""
    return PRODUCT_CODE + int(HOLES * needed.activations)


def fits_on_one(needed: Memory, capacity: float) -> bool:
    """True if a device of `capacity` bytes can hold weights, gradients and moments unsharded."""
    return needed.weights + needed.gradients + needed.optimizer <= USABLE * capacity


def sharded_memory(config: ModelConfig, needed: Memory, count: int) -> Memory:
    """The Memory of each of `count` devices that shard what one would need alone.

    Each holds an equal share of everything, and in full only what is outside the blocks and the
    largest block, weights and gradients alike.
    """

    def total(**layers: int) -> int:
        changed = dataclasses.replace(config, **layers)  # type: ignore[arg-type]  # fields are int
        return flops.parameters(changed).total

    def share(size: int) -> int:
        return -(-size // count)

    depths = {name: getattr(config, name) for name in ("num_hidden_layers", "num_encoder_layers")}
    largest = max(total() - total(**{name: depth - 1}) for name, depth in depths.items())
    full = MASTER * (total(num_hidden_layers=0, num_encoder_layers=0) + largest)
    return Memory(
        share(needed.weights) + full,
        share(needed.gradients) + min(full, needed.gradients),
        share(needed.optimizer),
        needed.activations,
        share(needed.update),
    )


def inner_matrices(config: ModelConfig) -> list[tuple[int, int, int]]:
    """(count, rows, columns) of the blocks' matrices, which Muon updates."""
    return [
        (linear.count, linear.outputs, linear.inputs)
        for linear in flops.linears(config)
        if linear.reads != "head"
    ]


def kept_weights(context: int) -> int:
    """Attention weights per token and head that the fused block keeps.

    Each chunk of queries has weights for all keys up to its end; long rows keep none.
    kept_weights(256) == (128·128 + 128·256) / 256 == 192.
    """
    if context > KEPT_WEIGHTS:
        return 0
    ends = [min(first + QUERIES_AT_ONCE, context) for first in range(0, context, QUERIES_AT_ONCE)]
    starts = range(0, context, QUERIES_AT_ONCE)
    return sum((end - start) * end for start, end in zip(starts, ends)) // context


@dataclass(frozen=True)
class MicroBatch:
    """What a forward and backward pass of a micro-batch needs; `size` is bytes per number."""

    config: ModelConfig
    train: TrainConfig
    tokens: int
    size: int
    checkpointing: bool = False
    kernels: bool = True

    @property
    def fused(self) -> bool:
        """True if the kernels compute whole blocks of this configuration."""
        config = self.config
        return (
            self.kernels
            and config.shape == "decoder"
            and config.positions == "rotary"
            and config.norm == "rms"
            and config.gated_mlp
            and config.hidden_act == "silu"
            and config.attention_bias == "none"
            and not config.mlp_bias
            and not config.sliding_window
            and config.rotary_fraction == 1.0
        )

    def kept(self) -> int:
        """Bytes kept for the backward pass: activations, copies of weights, the head."""
        config, blocks = self.config, self.blocks()
        hidden = config.hidden_size
        numbers = hidden + sum(
            layers * (hidden if self.checkpointing else saved) for layers, saved, _ in blocks
        )
        copies = 0  # of the weights, in the precision of activations
        if self.size < MASTER or self.fused:
            copies = self.size * sum(
                count * rows * columns for count, rows, columns in inner_matrices(config)
            )
        if self.checkpointing:  # of one block at a time
            copies //= sum(layers for layers, _, _ in blocks)
        return int(self.size * self.tokens * numbers) + copies + self.head()

    def worked_with(self, device: str) -> int:
        """Bytes that the last block's backward pass and the head need on top of what is kept."""
        config, hidden = self.config, self.config.hidden_size
        widest = max(
            gradients + (saved if self.checkpointing else 0)
            for _, saved, gradients in self.blocks()
        )
        activations = int(self.size * self.tokens * (widest + hidden))
        if config.head != "lm":
            return activations
        # a chunk of logits (by torch in several forms), and its gradient of the head's matrix
        rows = LOGIT_ROWS_AT_ONCE if self.kernels else logit_rows(device, config.vocab_size)
        logit_size = self.size if self.kernels else 2 * (MASTER + self.size)
        numbers = logit_size * min(self.tokens, rows) + MASTER * hidden
        return activations + numbers * config.vocab_size

    def head(self) -> int:
        """Bytes that the head keeps: gradients of hidden states and matrix."""
        config = self.config
        if config.head != "lm":
            return 0
        shares = {"encoder": self.train.mask_share, "encoder-decoder": 0.5}
        targets = int(shares.get(config.shape, 1.0) * self.tokens)
        return config.hidden_size * (targets * self.size + config.vocab_size * MASTER)

    def blocks(self) -> list[tuple[int, float, float]]:
        """(layers, numbers per token that each keeps, and that its widest gradients have).

        One for each stack; of two stacks each reads half of the tokens.
        """
        config, blocks = self.config, []
        share = 0.5 if config.shape == "encoder-decoder" else 1.0
        for stack in flops.stacks(config):
            floats = self.fused_block() if self.fused else self.plain_block(stack)
            if self.train.dropout and not self.fused:  # what each sublayer is multiplied with
                crossed = config.shape == "encoder-decoder" and stack.name == "decoder"
                floats += (3 if crossed else 2) * config.hidden_size
            gradients = 3 * stack.inner + 3 * config.hidden_size
            blocks.append((stack.layers, share * floats, share * gradients))
        return blocks

    def fused_block(self) -> int:
        """Numbers per token that `kernels.fused_block` keeps."""
        config = self.config
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        return (
            2 * config.hidden_size  # inputs of both norms
            + 2 * (queries + 2 * keys)  # joined products; queries, keys and values
            + config.num_attention_heads * kept_weights(self.train.context)
            + queries  # mixed heads
            + 2 * config.intermediate_size  # gate and up
        )

    def plain_block(self, stack: flops.StackSizes) -> int:
        """Numbers per token that PyTorch keeps; an estimate, since operations choose themselves."""
        config, context = self.config, self.train.context
        hidden, queries = config.hidden_size, stack.heads * stack.head_dim
        keys = queries * config.num_key_value_heads // config.num_attention_heads
        # norm; rotated queries and keys, values; mixed heads, twice
        attention = 2 * hidden + 2 * (queries + keys) + 2 * queries
        if config.query_key_norm:
            attention += 2 * (queries + keys)
        if context <= QUERIES_AT_ONCE:  # short rows do not use torch's fused kernel
            attention += 2 * stack.heads * context
        if config.shape == "encoder-decoder" and stack.name == "decoder":
            attention += attention
        return attention + 2 * hidden + (4 if config.gated_mlp else 2) * stack.inner
