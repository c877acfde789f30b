"""What a model costs, worked out from its configuration alone: parameters, FLOPs, and the matrix products of a step.

A FLOP is one addition or multiplication: a product (m, k) · (k, n) has 2·m·k·n. Pure arithmetic, no PyTorch.
"""

from typing import NamedTuple

from lmcli.config import ModelConfig


class Parameters(NamedTuple):
    """How many there are: in all, shared ones counted once; in matrices that multiply (the head's included once, tied or
    not); in tables of embeddings (tokens, positions, token types, relative distances)."""

    total: int
    matrices: int
    embedding: int


class Passes(NamedTuple):
    """What one forward pass reads: `rows`, each of so many positions of the encoder and of the decoder, and how many
    positions, of all rows together, the head turns into logits."""

    rows: int
    encoder: int
    decoder: int
    predicted: int

    @property
    def tokens(self) -> int:
        """Positions read, source and target both counted."""
        return self.rows * (self.encoder + self.decoder)


class Product(NamedTuple):
    """`count` equal matrix products, each of `batch` pairs (m, k) · (k, n).

    `kind` names what is made: "linear", "scores" or "mixture" of the forward pass, or a gradient: "linear input",
    "linear weight", "query", "key", "weights", "value".
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
        """Which factor lies in memory as its transpose: "left", "right" or "" for none."""
        return {"linear": "right", "scores": "right", "weights": "right",
                "linear weight": "left", "key": "left", "value": "left"}.get(self.kind, "")


class Linear(NamedTuple):
    """`count` linear layers, applied to the positions that `reads` names."""

    reads: str
    count: int
    inputs: int
    outputs: int
    biased: bool = False

    @property
    def matrices(self) -> int:
        """Weights of all of them, biases aside."""
        return self.count * self.inputs * self.outputs

    @property
    def biases(self) -> int:
        """Their biases' numbers."""
        return self.count * self.outputs * self.biased


class _Attention(NamedTuple):
    """Attention of `count` layers from the positions that `queries` names to those that `keys` names."""

    queries: str
    keys: str
    count: int
    heads: int
    width: int


def parameters(config: ModelConfig) -> Parameters:
    """The parameters of a complete configuration (`ModelConfig.complete`)."""
    layers = linears(config)
    matrices, embedding = sum(linear.matrices for linear in layers), _tables(config)
    tied = config.vocab_size * config.hidden_size if config.tie_word_embeddings and config.head == "lm" else 0
    biases = sum(linear.biases for linear in layers)
    return Parameters(matrices + embedding - tied + biases + _norms(config), matrices, embedding)


def training_flops(config: ModelConfig, passes: Passes) -> int:
    """FLOPs of one forward and backward pass by the usual convention (Chowdhery et al. 2022, PaLM, appendix B).

    6 × parameters for each position a matrix is applied to, and for attention 12 × heads · head_dim × keys for each query
    of a layer: all keys, not half of them although half are masked in causal attention, nor fewer with a sliding
    window. Norms, activations, softmax and the optimizer are not counted. A decoder of 6 layers × 384 with 6 heads, MLP
    of 4 × 384, vocabulary 4,096 and context 256: 6 · 12,189,696 + 12 · 6 · 384 · 256 = 80.2 million a token.
    """
    linear = sum(6 * part.matrices * _positions(part.reads, passes) for part in linears(config))
    return linear + sum(12 * part.count * part.heads * part.width * passes.rows * _length(part.queries, passes)
                        * _length(part.keys, passes) for part in _attentions(config))


def training_flops_per_token(config: ModelConfig, context: int) -> float:
    """`training_flops` a token, of rows of `context` tokens (of an encoder–decoder: as many source and target tokens, both
    counted) with every position of the last stack predicted, or one a row where the head reads a whole text."""
    passes = whole_rows(config, 1, context)
    return training_flops(config, passes) / passes.tokens


def whole_rows(config: ModelConfig, rows: int, context: int) -> Passes:
    """The Passes of `rows` rows of `context` tokens in each stack, all predicted, or one a row with a pooled head."""
    return Passes(rows, context if config.shape != "decoder" else 0, context if config.shape != "encoder" else 0,
                  rows if config.head in ("sequence", "none") else rows * context)


def products(config: ModelConfig, passes: Passes) -> list[Product]:
    """All matrix products of one forward and backward pass: of every linear layer, the head included, and of attention.

    A linear layer has three, (T, in) · (in, out) forward, (T, out) · (out, in) for the gradient of its input and
    (out, T) · (T, in) for that of its weight; attention six, one pair for each row and head. Their FLOPs add up to
    `training_flops`.
    """
    found = []
    for linear in linears(config):
        read = _positions(linear.reads, passes)
        found += [Product("linear", linear.count, 1, read, linear.inputs, linear.outputs),
                  Product("linear input", linear.count, 1, read, linear.outputs, linear.inputs),
                  Product("linear weight", linear.count, 1, linear.outputs, read, linear.inputs)]
    for part in _attentions(config):
        pairs, width = passes.rows * part.heads, part.width
        read, seen = _length(part.queries, passes), _length(part.keys, passes)
        found += [Product("scores", part.count, pairs, read, width, seen),
                  Product("mixture", part.count, pairs, read, seen, width),
                  Product("weights", part.count, pairs, read, width, seen),
                  Product("value", part.count, pairs, seen, read, width),
                  Product("query", part.count, pairs, read, seen, width),
                  Product("key", part.count, pairs, seen, read, width)]
    return [product for product in found if product.flops]


def _length(stack: str, passes: Passes) -> int:
    return passes.encoder if stack == "encoder" else passes.decoder


def _positions(reads: str, passes: Passes) -> int:
    """Positions a linear layer is applied to. What a head does before its output, it does at the positions it predicts."""
    return passes.predicted if reads == "head" else passes.rows * _length(reads, passes)


def stacks(config: ModelConfig) -> list[tuple[str, int, int, int, int]]:
    """(name, layers, heads, width of a head, width inside the MLP) of each stack."""
    found = []
    if config.shape != "decoder":
        found.append(("encoder", config.num_encoder_layers, config.encoder_attention_heads, config.encoder_head_dim,
                      config.encoder_intermediate_size))
    if config.shape != "encoder":
        found.append(("decoder", config.num_hidden_layers, config.num_attention_heads, config.head_dim,
                      config.intermediate_size))
    return found


def _attentions(config: ModelConfig) -> list[_Attention]:
    found = [_Attention(name, name, layers, heads, width) for name, layers, heads, width, _ in stacks(config)]
    if config.shape == "encoder-decoder":
        found.append(found[-1]._replace(keys="encoder"))
    return found


def linears(config: ModelConfig) -> list[Linear]:
    """All linear layers, the head's last; its `reads` is "head"."""
    hidden, found = config.hidden_size, []
    for part in _attentions(config):
        size = part.heads * part.width
        keys = size * config.num_key_value_heads // config.num_attention_heads
        biased = config.attention_bias != "none"
        found += [Linear(part.queries, part.count, hidden, size, biased),
                  Linear(part.keys, 2 * part.count, hidden, keys, biased),
                  Linear(part.queries, part.count, size, hidden, config.attention_bias == "all")]
    for name, layers, _, _, inner in stacks(config):
        found += [Linear(name, layers * (2 if config.gated_mlp else 1), hidden, inner, config.mlp_bias),
                  Linear(name, layers, inner, hidden, config.mlp_bias)]
    if config.head_dense:
        found.append(Linear("head", 1, hidden, hidden, config.head_dense_bias))
    outputs, biased = {"lm": (config.vocab_size, config.head_bias), "span": (2, True), "none": (0, False)}.get(
        config.head, (len(config.labels), True))
    return [*found, Linear("head", 1, hidden, outputs, biased)]


def _tables(config: ModelConfig) -> int:
    parts, rows = stacks(config), config.vocab_size
    if config.positions == "learned":
        rows += len(parts) * (config.max_position_embeddings + config.position_offset)
    rows += len(parts) * config.type_vocab_size
    relative = sum(heads for _, _, heads, _, _ in parts) if config.positions == "relative" else 0
    return rows * config.hidden_size + relative * config.relative_attention_num_buckets


def _norms(config: ModelConfig) -> int:
    """Parameters of all norms, those over queries and keys included."""
    parts, count = stacks(config), int(config.head_norm)
    for name, layers, _, _, _ in parts:
        in_block = 3 if name == "decoder" and config.shape == "encoder-decoder" else 2
        count += in_block * layers - (not config.first_attention_norm and layers > 0)
        count += config.embedding_norm + (not config.post_norm)
    each = config.hidden_size * (2 if config.norm == "layer" and config.norm_bias else 1)
    heads = sum(2 * part.count * part.width for part in _attentions(config)) if config.query_key_norm else 0
    return count * each + heads
