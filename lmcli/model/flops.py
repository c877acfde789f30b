"""What a model costs, from its configuration alone: parameters, FLOPs, matrix products of a step.

A FLOP is one addition or multiplication: a product (m, k) · (k, n) has 2·m·k·n. No PyTorch here.
"""

from dataclasses import dataclass
from typing import NamedTuple

from lmcli.config import ModelConfig


class ParameterCounts(NamedTuple):
    """Numbers of parameters.

    `total` counts shared ones once; `matrices` are in matrix products (with the head's, tied or
    not); `embedding` in tables of tokens, positions, token types and relative distances.
    """

    total: int
    matrices: int
    embedding: int


class ForwardPass(NamedTuple):
    """Sizes of a forward pass.

    `rows`, positions per row of `encoder` and `decoder`, and `predicted` positions of all rows.
    """

    rows: int
    encoder: int
    decoder: int
    predicted: int

    @property
    def tokens(self) -> int:
        """Positions read, source and target."""
        return self.rows * (self.encoder + self.decoder)

    def length(self, stack: str) -> int:
        """Positions per row of the "encoder" or "decoder"."""
        return self.encoder if stack == "encoder" else self.decoder


@dataclass(frozen=True)
class MatrixProduct:
    """`count` equal matrix products, each of `batch` pairs (m, k) · (k, n).

    `kind` is a result of the forward pass, "linear", "scores" or "mixture", or a gradient: "linear
    input", "linear weight", "query", "key", "weights", "value".
    """

    kind: str
    count: int
    batch: int
    m: int
    k: int
    n: int

    @property
    def flops(self) -> int:
        """FLOPs of all of them."""
        return 2 * self.count * self.batch * self.m * self.k * self.n

    @property
    def transposed(self) -> str:
        """Which factor is stored as its transpose: "left", "right" or "" for none."""
        if self.kind in ("linear", "scores", "weights"):
            return "right"
        return "left" if self.kind in ("linear weight", "key", "value") else ""


@dataclass(frozen=True)
class LinearLayers:
    """`count` equal linear layers; `reads` is "encoder", "decoder" or "head".

    The head's layers read only the positions that it predicts.
    """

    reads: str
    count: int
    inputs: int
    outputs: int
    biased: bool = False

    @property
    def matrices(self) -> int:
        """Weights of all of them, without biases."""
        return self.count * self.inputs * self.outputs

    @property
    def biases(self) -> int:
        """Numbers in their biases."""
        return self.count * self.outputs * self.biased

    def positions(self, sizes: ForwardPass) -> int:
        """Positions that each one is applied to."""
        return sizes.predicted if self.reads == "head" else sizes.rows * sizes.length(self.reads)


@dataclass(frozen=True)
class AttentionLayers:
    """`count` equal attention layers from positions of stack `queries` to positions of `keys`."""

    queries: str
    keys: str
    count: int
    heads: int
    head_dim: int


class StackSizes(NamedTuple):
    """Sizes of the "encoder" or the "decoder"; `inner` is the size inside the MLP."""

    name: str
    layers: int
    heads: int
    head_dim: int
    inner: int


def parameters(config: ModelConfig) -> ParameterCounts:
    """The ParameterCounts of a complete configuration (`ModelConfig.complete`)."""
    layers, embedding = linears(config), _embedding_parameters(config)
    matrices = sum(linear.matrices for linear in layers)
    tied = config.tie_word_embeddings and config.head == "lm"
    shared = config.vocab_size * config.hidden_size if tied else 0
    vectors = sum(linear.biases for linear in layers) + _norm_parameters(config)
    return ParameterCounts(matrices + embedding - shared + vectors, matrices, embedding)


def training_flops(config: ModelConfig, sizes: ForwardPass) -> int:
    """FLOPs of a forward and backward pass (Chowdhery et al. 2022, PaLM, appendix B).

    6 × parameters for each position a matrix is applied to, and for attention 12 × heads · head_dim
    × keys for each query of a layer. All keys count, although causal attention masks half of them
    and a sliding window more. Norms, activations, softmax and optimizer do not count. A decoder of
    6 layers × 384 with 6 heads, MLP of 4 × 384, vocabulary 4,096 and context 256:
    6 · 12,189,696 + 12 · 6 · 384 · 256 = 80.2 million per token.
    """
    total = sum(6 * linear.matrices * linear.positions(sizes) for linear in linears(config))
    for layer in _attentions(config):
        pairs = sizes.rows * sizes.length(layer.queries) * sizes.length(layer.keys)
        total += 12 * layer.count * layer.heads * layer.head_dim * pairs
    return total


def training_flops_per_token(config: ModelConfig, context: int) -> float:
    """`training_flops` of `whole_rows` of `context` tokens, per token (source and target)."""
    sizes = whole_rows(config, 1, context)
    return training_flops(config, sizes) / sizes.tokens


def whole_rows(config: ModelConfig, rows: int, context: int) -> ForwardPass:
    """The ForwardPass of rows of `context` tokens per stack.

    The head predicts all positions of the last stack, or one per row if it reads a whole text.
    """
    predicted = rows if config.head in ("sequence", "none") else rows * context
    encoder = context if config.shape != "decoder" else 0
    decoder = context if config.shape != "encoder" else 0
    return ForwardPass(rows, encoder, decoder, predicted)


def products(config: ModelConfig, sizes: ForwardPass) -> list[MatrixProduct]:
    """All matrix products of a forward and backward pass; their FLOPs add up to `training_flops`.

    A linear layer has three: (T, in) · (in, out) forward, (T, out) · (out, in) for the gradient of
    its input and (out, T) · (T, in) for that of its weight. Attention has six, each a pair per row
    and head.
    """
    matrix_products = []
    for linear in linears(config):
        count, inputs, outputs = linear.count, linear.inputs, linear.outputs
        positions = linear.positions(sizes)
        matrix_products += [
            MatrixProduct("linear", count, 1, positions, inputs, outputs),
            MatrixProduct("linear input", count, 1, positions, outputs, inputs),
            MatrixProduct("linear weight", count, 1, outputs, positions, inputs),
        ]
    for layer in _attentions(config):
        count, pairs, size = layer.count, sizes.rows * layer.heads, layer.head_dim
        queries, keys = sizes.length(layer.queries), sizes.length(layer.keys)
        matrix_products += [
            MatrixProduct("scores", count, pairs, queries, size, keys),
            MatrixProduct("mixture", count, pairs, queries, keys, size),
            MatrixProduct("weights", count, pairs, queries, size, keys),
            MatrixProduct("value", count, pairs, keys, queries, size),
            MatrixProduct("query", count, pairs, queries, keys, size),
            MatrixProduct("key", count, pairs, keys, queries, size),
        ]
    return [product for product in matrix_products if product.flops]


def stacks(config: ModelConfig) -> list[StackSizes]:
    """The StackSizes of a model, the encoder's first."""
    encoder = StackSizes(
        "encoder",
        config.num_encoder_layers,
        config.encoder_attention_heads,
        config.encoder_head_dim,
        config.encoder_intermediate_size,
    )
    decoder = StackSizes(
        "decoder",
        config.num_hidden_layers,
        config.num_attention_heads,
        config.head_dim,
        config.intermediate_size,
    )
    return {"encoder": [encoder], "decoder": [decoder]}.get(config.shape, [encoder, decoder])


def _attentions(config: ModelConfig) -> list[AttentionLayers]:
    layers = [
        AttentionLayers(stack.name, stack.name, stack.layers, stack.heads, stack.head_dim)
        for stack in stacks(config)
    ]
    if config.shape == "encoder-decoder":
        decoder = layers[-1]
        cross = AttentionLayers(
            "decoder", "encoder", decoder.count, decoder.heads, decoder.head_dim
        )
        layers.append(cross)
    return layers


def linears(config: ModelConfig) -> list[LinearLayers]:
    """All linear layers, the head's last."""
    hidden, layers = config.hidden_size, []
    for layer in _attentions(config):
        size, biased = layer.heads * layer.head_dim, config.attention_bias != "none"
        key_size = size * config.num_key_value_heads // config.num_attention_heads
        layers += [
            LinearLayers(layer.queries, layer.count, hidden, size, biased),
            LinearLayers(layer.keys, 2 * layer.count, hidden, key_size, biased),
            LinearLayers(layer.queries, layer.count, size, hidden, config.attention_bias == "all"),
        ]
    for stack in stacks(config):
        inputs = stack.layers * (2 if config.gated_mlp else 1)
        layers += [
            LinearLayers(stack.name, inputs, hidden, stack.inner, config.mlp_bias),
            LinearLayers(stack.name, stack.layers, stack.inner, hidden, config.mlp_bias),
        ]
    if config.head_dense:
        layers.append(LinearLayers("head", 1, hidden, hidden, config.head_dense_bias))
    outputs, biased = {
        "lm": (config.vocab_size, config.head_bias),
        "span": (2, True),
        "none": (0, False),
    }.get(config.head, (len(config.labels), True))
    return [*layers, LinearLayers("head", 1, hidden, outputs, biased)]


def _embedding_parameters(config: ModelConfig) -> int:
    """Parameters of all tables."""
    sizes, rows = stacks(config), config.vocab_size
    if config.positions == "learned":
        rows += len(sizes) * (config.max_position_embeddings + config.position_offset)
    rows += len(sizes) * config.type_vocab_size
    heads = sum(stack.heads for stack in sizes) if config.positions == "relative" else 0
    return rows * config.hidden_size + heads * config.relative_attention_num_buckets


def _norm_parameters(config: ModelConfig) -> int:
    """Parameters of all norms, with those of queries and keys."""
    norms = int(config.head_norm)
    for stack in stacks(config):
        crossed = stack.name == "decoder" and config.shape == "encoder-decoder"
        norms += (2 + crossed + 2 * config.sandwich_norm) * stack.layers
        norms -= not config.first_attention_norm and stack.layers > 0
        norms += config.embedding_norm + (not config.post_norm)
    total = norms * config.hidden_size * (2 if config.norm == "layer" and config.norm_bias else 1)
    if config.query_key_norm:
        total += sum(2 * layer.count * layer.head_dim for layer in _attentions(config))
    return total
