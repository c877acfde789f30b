"""How much memory training takes, worked out from the configuration alone; so that it is known before anything runs.

All sizes are bytes. Pure arithmetic, no PyTorch; what is counted is what `transformer` with the functions of `fused` (a
decoder on the CPU) or with plain PyTorch keeps for the backward pass, tensor by tensor. `tests/model/test_memory.py`
holds it against what autograd really saves.
"""

import dataclasses
from typing import NamedTuple

from lmcli.config import ModelConfig, TrainConfig
from lmcli.model import cost

SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
MASTER = 4  # weights, their gradients and moments are float32
# as in `fused` and `head_loss`, which may not be imported here since they lead to torch; a test compares them
QUERIES_AT_ONCE = 128
KEPT_WEIGHTS = 512
LOGIT_ROWS_AT_ONCE = 1024
LOGITS_AT_ONCE = {"cpu": 1 << 23, "mps": 1 << 23, "cuda": 1 << 28}
FEWEST_ROWS = 128
HELD = 0.8  # of a device's memory that weights, gradients and moments may take, so that some micro-batch fits beside them
ORTHOGONAL = 4  # numbers that Muon works with for each one of the largest group of equal matrices, see `optimizers.Muon`


class Memory(NamedTuple):
    """What a training step holds, in bytes: weights and gradients, the optimizer's moments, `activations` (all that is
    kept for the backward pass of one micro-batch, and what is being worked on when that is most), and `update`, what the
    optimizer works with, when activations are gone."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    update: int = 0

    @property
    def total(self) -> int:
        """The most that is held at any time."""
        return self.weights + self.gradients + self.optimizer + max(self.activations, self.update)


def training_memory(config: ModelConfig, train: TrainConfig, micro_batch_tokens: int, dtype: str = "bfloat16",
                    recompute: bool = False, fused: bool = True, device: str = "cpu") -> Memory:
    """The Memory of training a complete configuration with micro-batches of so many tokens, activations in `dtype`.

    `recompute` keeps only the input of each block and makes the rest of it again in the backward pass. `fused` says
    whether the compiled kernels are there; they serve decoders with rotary positions, without biases. With LoRA only its
    matrices, taken to be at all of the blocks', and at embedding and head where these are named, have gradients and moments.
    """
    total, inner = cost.parameters(config).total, inner_matrices(config)
    trained, by_muon = total, 0
    if train.lora_rank:
        tables = sum(target in train.lora_targets for target in ("embedding", "head"))
        adapted = [*inner, (tables, config.vocab_size, config.hidden_size)]
        trained = sum(count * train.lora_rank * (rows + columns) for count, rows, columns in adapted)
    elif train.optimizer == "muon":
        by_muon = sum(count * rows * columns for count, rows, columns in inner)
    groups: dict[tuple[int, int], int] = {}
    for count, rows, columns in inner if by_muon else ():
        groups[rows, columns] = groups.get((rows, columns), 0) + count * rows * columns
    weights = MASTER * (total + (trained if train.lora_rank else 0))
    beside = 2 * (trained - by_muon) + by_muon + (trained if train.averaging else 0)
    return Memory(weights, MASTER * trained, MASTER * beside,
                  kept_for_backward(config, train, micro_batch_tokens, dtype, recompute, fused)
                  + _worked_with(config, train, micro_batch_tokens, SIZES[dtype], recompute, fused, device),
                  ORTHOGONAL * SIZES[dtype] * max(groups.values(), default=0))


def held_by_one(needed: Memory, room: float) -> bool:
    """Whether one device with `room` bytes can hold weights, gradients and moments; else they are to be shared out."""
    return needed.weights + needed.gradients + needed.optimizer <= HELD * room


def shared_out(config: ModelConfig, needed: Memory, count: int) -> Memory:
    """The Memory of each of `count` devices that share out what one would need alone: an equal part of everything, and whole
    only what is outside of the blocks and the largest block, weights and gradients alike."""
    def less(**layers: int) -> int:
        return cost.parameters(dataclasses.replace(config, **layers)).total

    def part(size: int) -> int:
        return -(-size // count)

    largest = max(less() - less(**{name: getattr(config, name) - 1}) for name in ("num_hidden_layers", "num_encoder_layers"))
    whole = MASTER * (less(num_hidden_layers=0, num_encoder_layers=0) + largest)
    return Memory(part(needed.weights) + whole, part(needed.gradients) + min(whole, needed.gradients),
                  part(needed.optimizer), needed.activations, part(needed.update))


def serves(config: ModelConfig) -> bool:
    """Whether the functions of `fused` serve the blocks of this configuration."""
    return (config.shape == "decoder" and config.positions == "rotary" and config.norm == "rms" and config.gated_mlp
            and config.hidden_act == "silu" and config.attention_bias == "none" and not config.mlp_bias
            and not config.sliding_window and config.rotary_fraction == 1.0)


def inner_matrices(config: ModelConfig) -> list[tuple[int, int, int]]:
    """(how many, rows, columns) of the blocks' matrices, which Muon updates."""
    return [(part.count, part.outputs, part.inputs) for part in cost.linears(config) if part.reads != "head"]


def kept_for_backward(config: ModelConfig, train: TrainConfig, tokens: int, dtype: str, recompute: bool = False,
                      fused: bool = True) -> int:
    """Bytes that the forward pass of a micro-batch of so many tokens keeps for its backward pass."""
    size, fused = SIZES[dtype], fused and serves(config)
    kept = sum(layers * (config.hidden_size if recompute else block) for layers, block, _ in _blocks(config, train, fused))
    copies = 0 if dtype == "float32" and not fused else size * sum(
        count * rows * columns for count, rows, columns in inner_matrices(config))  # of the weights, in that precision
    if recompute:  # those of one block at a time
        copies //= sum(layers for layers, _, _ in _blocks(config, train, fused))
    return int(size * tokens * (kept + config.hidden_size)) + copies + _head(config, train, tokens, size)


def _worked_with(config: ModelConfig, train: TrainConfig, tokens: int, size: int, recompute: bool, fused: bool,
                 device: str) -> int:
    """Bytes that the last block's backward pass and the head work with while all that is kept is there."""
    blocks = _blocks(config, train, fused and serves(config))
    widest = max(gradients + (block if recompute else 0) for _, block, gradients in blocks)
    if config.head != "lm":
        return int(size * tokens * (widest + config.hidden_size))
    # a piece of the logits, by torch in several forms, and what it adds to the gradient of the head's matrix
    rows = LOGIT_ROWS_AT_ONCE if fused else max(FEWEST_ROWS, LOGITS_AT_ONCE[device] // config.vocab_size)
    pieces = (size if fused else 2 * (MASTER + size)) * min(tokens, rows) + MASTER * config.hidden_size
    return int(size * tokens * (widest + config.hidden_size)) + pieces * config.vocab_size


def _blocks(config: ModelConfig, train: TrainConfig, fused: bool) -> list[tuple[int, float, float]]:
    """(layers, numbers a token that each keeps, numbers a token of the gradients at its widest place) of each stack."""
    share = 0.5 if config.shape == "encoder-decoder" else 1.0  # of the tokens, in each of two stacks
    found = []
    for stack, layers, heads, width, inner in cost.stacks(config):
        block = _fused_block(config, train.context) if fused else \
            _plain_block(config, stack, heads, width, inner, train.context)
        if train.dropout and not fused:  # the noise that each part's result is multiplied with
            block += (3 if config.shape == "encoder-decoder" and stack == "decoder" else 2) * config.hidden_size
        found.append((layers, share * block, share * (3 * inner + 3 * config.hidden_size)))
    return found


def _fused_block(config: ModelConfig, context: int) -> int:
    """Numbers a token that `fused.block` keeps: what enters both norms; the joined products; queries, keys and values;
    attention weights; mixed heads; gate and up."""
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    return (2 * config.hidden_size + 2 * (queries + 2 * keys)
            + config.num_attention_heads * kept_weights(context) + queries + 2 * config.intermediate_size)


def kept_weights(context: int) -> int:
    """Attention weights a token and head that `fused.block` keeps: of each chunk of queries, those of all keys
    up to its end; none in long rows. kept_weights(256) == (128·128 + 128·256) / 256 == 192."""
    if context > KEPT_WEIGHTS:
        return 0
    chunks = range(0, context, QUERIES_AT_ONCE)
    return sum(min(QUERIES_AT_ONCE, context - first) * min(first + QUERIES_AT_ONCE, context) for first in chunks) // context


def _plain_block(config: ModelConfig, stack: str, heads: int, width: int, inner: int, context: int) -> int:
    """The same of plain PyTorch: close, since what an operation keeps is torch's own choice."""
    hidden, queries = config.hidden_size, heads * width
    keys = queries * config.num_key_value_heads // config.num_attention_heads
    attention = 2 * hidden + 2 * (queries + keys) + 2 * queries  # norm; queries and keys turned, values; mixed heads, twice
    attention += 2 * (queries + keys) if config.query_key_norm else 0
    attention += heads * context * (2 if context <= QUERIES_AT_ONCE else 0)  # short rows are not left to torch's kernel
    if config.shape == "encoder-decoder" and stack == "decoder":
        attention += attention
    return attention + 2 * hidden + (4 if config.gated_mlp else 2) * inner


def _head(config: ModelConfig, train: TrainConfig, tokens: int, size: int) -> int:
    """Bytes that the head keeps: the gradients of hidden states and matrix, made beside the loss."""
    if config.head != "lm":
        return 0
    targets = int({"encoder": train.mask_share, "encoder-decoder": 0.5}.get(config.shape, 1.0) * tokens)
    return targets * config.hidden_size * size + config.vocab_size * config.hidden_size * MASTER
