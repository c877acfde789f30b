"""The Transformer in three shapes: blocks in stacks, one stack (decoder or encoder) or two, and a head.

Everything that tells families apart is an option of ModelConfig: nothing here knows a family's name.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmcli.config import ModelConfig
from lmcli.model import fused, head_loss, kernels
from lmcli.model.attention import Attention, KeyValueCache, Memory, Packed, View, visible
from lmcli.model.dropout import dropped_sum
from lmcli.model.layers import ACTIVATIONS, MLP, Linear, RelativeBias, make_norm, rotation, sinusoids
from lmcli.model.recompute import recomputed


class Block(nn.Module):
    """Self-attention, then (in a decoder that reads an encoder) cross-attention, then the MLP. (B, T, C) → (B, T, C), or
    only those of positions `since` one on, where the view says so.

    Each f is added as x + f(norm(x)); with `post_norm` as norm(x + f(x)); in a parallel block all f's read the same x.
    """

    def __init__(self, config: ModelConfig, layer: int, encoder: bool, dropout: float):
        super().__init__()
        heads, width = (config.encoder_attention_heads, config.encoder_head_dim) if encoder else \
            (config.num_attention_heads, config.head_dim)
        first_normed = layer > 0 or config.first_attention_norm
        self.attention_norm = make_norm(config) if first_normed else nn.Identity()
        self.attention = Attention(config, layer, heads, width, causal=not encoder)
        self.cross_norm = self.cross = None
        if config.shape == "encoder-decoder" and not encoder:
            self.cross_norm = make_norm(config)
            self.cross = Attention(config, layer, heads, width, causal=False, cross=True)
        self.mlp_norm = make_norm(config)
        self.mlp = MLP(config, config.encoder_intermediate_size if encoder else config.intermediate_size)
        self.post_norm, self.parallel, self.dropout = config.post_norm, config.parallel_block, dropout
        self.low_dropout = 0.0  # share of what they read that adapters drop
        self.recompute = False
        self.compiled: Callable[[Tensor, View], Tensor] | None = None  # `_mixed` by torch.compile, used in training only
        plain = config.norm == "rms" and config.gated_mlp and config.hidden_act == "silu" and not (
            config.mlp_bias or config.attention_bias != "none" or config.post_norm or config.parallel_block)
        self.fusable = plain and first_normed and self.cross is None and not encoder and width <= kernels.WIDEST_HEAD

    def forward(self, x: Tensor, view: View) -> Tensor:
        mixed = self.compiled if self.compiled and self.training else self._mixed
        if not (self.recompute and self.training and torch.is_grad_enabled()):
            return mixed(x, view)
        states, real = view.memory or (None, None)

        def run(x: Tensor, mask: Tensor | None, states: Tensor | None) -> Tensor:
            return mixed(x, replace(view, mask=mask, memory=None if states is None else Memory(states, real)))
        return recomputed(self, run, x, view.mask, states)

    def _mixed(self, x: Tensor, view: View) -> Tensor:
        if self._fused(x, view):
            return self._forward_fused(x, *view.turn, view.firsts)
        later = x[:, view.since:]
        if self.parallel:
            mixed = self._add(later, self.attention(self.attention_norm(x), view))
            return self._add(mixed, self.mlp(self.mlp_norm(later)))
        if self.post_norm:
            x = self.attention_norm(self._add(later, self.attention(x, view)))
            if self.cross is not None:
                x = self.cross_norm(self._add(x, self.cross(x, view)))
            return self.mlp_norm(self._add(x, self.mlp(x)))
        x = self._add(later, self.attention(self.attention_norm(x), view))
        if self.cross is not None:
            x = self._add(x, self.cross(self.cross_norm(x), view))
        return self._add(x, self.mlp(self.mlp_norm(x)))

    def _fused(self, x: Tensor, view: View) -> bool:
        """Whether `fused.block` can stand in: a decoder's block over whole rows."""
        return (self.fusable and fused.active(x) and self.attention.fast and view.mask is None and view.cache is None
                and view.packed is None and not view.since and view.turn is not None and view.turn[0].shape[0] == 1
                and view.turn[0].shape[-1] == self.attention.head_dim)

    def _forward_fused(self, x: Tensor, cos: Tensor, sin: Tensor, firsts: Tensor | None) -> Tensor:
        attention, mlp, (rows, length, _) = self.attention, self.mlp, x.shape
        heads, half = attention.query.out_features // attention.head_dim, attention.head_dim // 2
        normed = (attention.query_norm, attention.key_norm) if attention.normed else ()
        shape = fused.Shape(rows, length, heads, heads // attention.groups, attention.head_dim, attention.scale,
                            self.mlp_norm.eps, normed[0].eps if normed else 0.0, self.dropout if self.training else 0.0,
                            self.low_dropout if self.training and torch.is_grad_enabled() else 0.0)
        linears = (attention.query, attention.key, attention.value, attention.output, mlp.gate, mlp.up, mlp.down)
        weights = (self.attention_norm.weight, self.mlp_norm.weight, *([norm.weight for norm in normed] or (None, None)),
                   *(part.weight for part in linears))
        return fused.block(x.flatten(0, 1), shape, cos[0, 0, :, :half], sin[0, 0, :, :half], weights, firsts,
                           tuple(part.low for part in linears)).view(x.shape)

    def _add(self, residual: Tensor, x: Tensor) -> Tensor:
        if not (self.dropout and self.training):
            return residual + x
        return dropped_sum(residual, x, self.dropout) if fused.active(x) else residual + F.dropout(x, self.dropout)


class Stack(nn.Module):
    """Blocks one after another, with what tells them positions before and, unless post-norm, a norm behind."""

    def __init__(self, config: ModelConfig, encoder: bool, dropout: float):
        super().__init__()
        self.config, self.causal = config, not encoder
        self.dropout = dropout if config.shape != "decoder" else 0.0  # of embeddings; decoders alone were measured without
        count = config.num_encoder_layers if encoder else config.num_hidden_layers
        heads = config.encoder_attention_heads if encoder else config.num_attention_heads
        learned = config.positions == "learned"
        rows = config.max_position_embeddings + config.position_offset
        self.positions = nn.Embedding(rows, config.hidden_size) if learned else None
        self.types = nn.Embedding(config.type_vocab_size, config.hidden_size) if config.type_vocab_size else None
        self.embedding_norm = make_norm(config) if config.embedding_norm else None
        self.relative = RelativeBias(config, heads, encoder) if config.positions == "relative" else None
        self.layers = nn.ModuleList(Block(config, i, encoder, dropout) for i in range(count))
        self.norm = None if config.post_norm else make_norm(config)

    def forward(self, x: Tensor, real: Tensor | None = None, cache: KeyValueCache | None = None,
                memory: Memory | None = None, types: Tensor | None = None, packed: Packed | None = None,
                since: int = 0, firsts: Tensor | None = None) -> Tensor:
        """Hidden states (B, T, C) of embedded tokens (B, T, C). `real` (B, S) is True where there is no padding;
        `types` (B, T) are token types, all 0 when not given. Of positions `since` one on: (B, T − since, C). Where `firsts`
        (B, T) names positions, none before these is seen, and positions are counted from there."""
        past = cache.length if cache else 0
        positions = self._positions(x, real, past) if packed is None else packed.positions.to(x.device)  # (B or 1, T)
        if firsts is not None and self.config.positions != "rotary":  # which tells distances alone
            positions = positions - firsts
        if self.positions is not None:
            x = x + self.positions(positions + self.config.position_offset).to(x.dtype)
        elif self.config.positions == "sinusoidal":
            x = x + sinusoids(positions, x.shape[-1]).to(x.dtype)
        if self.types is not None:
            x = x + (self.types.weight[0] if types is None else self.types(types)).to(x.dtype)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        full, local = self._views(x, positions, real, cache, memory, past)
        full.packed = local.packed = packed
        full.firsts = local.firsts = firsts
        for layer, kind in zip(self.layers, self.config.kinds_of_layers(len(self.layers))):
            if since and layer is self.layers[-1]:  # those before need all positions for its keys and values
                full, local = replace(full, since=since), replace(local, since=since)
            x = self._through(layer, x, local if kind == "sliding_attention" else full)
        return x if self.norm is None else self.norm(x)

    def _through(self, layer: Block, x: Tensor, view: View) -> Tensor:
        if self.training and torch.is_grad_enabled() and not x.requires_grad:
            others = (view.mask, view.memory and view.memory.states, *layer.parameters())
            if not any(part is not None and part.requires_grad for part in others):
                with torch.no_grad():  # nothing is trained so far
                    return layer(x, view)
            x = x.detach().requires_grad_()  # where training begins: what is fused has all of its gradients or none
        return layer(x, view)

    def _positions(self, x: Tensor, real: Tensor | None, past: int) -> Tensor:
        seen = past + x.shape[1]
        if real is None or not self.causal:
            return torch.arange(past, seen, device=x.device)[None]
        return (real.long().cumsum(-1) - 1).clamp(min=0)[:, past:]  # padding may stand on either side

    def _views(self, x: Tensor, positions: Tensor, real: Tensor | None, cache: KeyValueCache | None,
               memory: Memory | None, past: int) -> tuple[View, View]:
        """What layers with full and with sliding-window attention look at."""
        config, read = self.config, x.shape[1]
        seen = past + read
        mask = visible(read, seen, self.causal, 0, real, x.device)
        turn = rotation(positions, config, config.rope_theta) if config.positions == "rotary" else None
        if self.relative is not None:
            bias = self.relative(past, read)  # (1, H, T, S)
            if mask is None and self.causal:
                mask = torch.ones(read, seen, dtype=torch.bool, device=x.device).tril(past)[None, None]
            mask = bias if mask is None else bias.masked_fill(~mask, float("-inf"))
        full = View(turn, mask, cache, memory)
        if not config.sliding_window:
            return full, full
        local = replace(full, mask=visible(read, seen, self.causal, config.sliding_window, real, x.device))
        if turn is not None and config.local_rope_theta:
            local.turn = rotation(positions, replace(config, rope_type="default"), config.local_rope_theta)
        return full, local


class LanguageHead(nn.Module):
    """Hidden states (…, C) → logits over the vocabulary (…, V), in BERT's families after one more dense layer and norm."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size, bias=config.head_dense_bias) \
            if config.head_dense else None
        self.norm = make_norm(config) if config.head_norm else None
        self.activation = ACTIVATIONS[config.head_act]
        self.scale = config.hidden_size ** -0.5 if config.scale_logits else 1.0
        self.output = Linear(config.hidden_size, config.vocab_size, bias=config.head_bias)
        self.loss_with_gradient = head_loss.with_gradient  # or as torch.compile made it

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.prepared(x))

    def prepared(self, x: Tensor) -> Tensor:
        """(…, C): what the output matrix is multiplied with."""
        if self.dense is not None:
            x = self.activation(self.dense(x))
        if self.norm is not None:
            x = self.norm(x)
        return x if self.scale == 1.0 else x * self.scale


class LabelHead(nn.Module):
    """Hidden states (B, T, C) → logits of labels: (B, labels) for a text ("sequence": from its first token), (B, T,
    labels) for tokens ("token"), (B, T, 2) for where an answer starts and ends ("span").

    Without an output ("none") it is what a bare encoder puts on its first token, (B, C).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.pooled = config.head in ("sequence", "none")
        self.dense = Linear(config.hidden_size, config.hidden_size, bias=config.head_dense_bias) \
            if config.head_dense else None
        self.norm = make_norm(config) if config.head_norm else None
        self.activation = ACTIVATIONS[config.head_act]
        labels = {"span": 2, "none": 0}.get(config.head, len(config.labels))
        self.output = Linear(config.hidden_size, labels) if labels else None

    def forward(self, x: Tensor) -> Tensor:
        if self.pooled:
            x = x[:, 0]
        if self.dense is not None:
            x = self.activation(self.dense(x))
        if self.norm is not None:
            x = self.norm(x)
        return x if self.output is None else self.output(x)


class Transformer(nn.Module):
    """Token ids → hidden states → logits (Vaswani et al. 2017), in the shape that the configuration names."""

    def __init__(self, config: ModelConfig, dropout: float = 0.0):
        super().__init__()
        self.config = config
        self.training_dtype = torch.float32  # of activations while training; weights keep theirs
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.encoder = Stack(config, True, dropout) if config.shape != "decoder" else None
        self.decoder = Stack(config, False, dropout) if config.shape != "encoder" else None
        self.head = LanguageHead(config) if config.head == "lm" else LabelHead(config)
        self.tie()

    def tie(self) -> None:
        """Lets the head share the embedding's matrix where the configuration says so."""
        if self.config.tie_word_embeddings and self.config.head == "lm":
            self.head.output.weight = self.embedding.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: KeyValueCache | None = None,
                decoder_input_ids: Tensor | None = None, token_type_ids: Tensor | None = None) -> Tensor:
        """Logits, (B, T, V) or as LabelHead tells, for input ids (B, T); with an encoder–decoder for the
        `decoder_input_ids` (B, T) given the source (B, S) in `input_ids`. See `hidden` for mask and cache."""
        if self.config.shape == "encoder-decoder":
            memory = self.encode(input_ids, attention_mask)
            return self.head(self.hidden(decoder_input_ids, None, cache, memory))
        hidden = self.hidden(input_ids, attention_mask, cache, token_type_ids=token_type_ids)
        return self.head(self.pooled(hidden, attention_mask))

    def pooled(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Hidden states (B, T, C) as the head reads them: with mean pooling (B, 1, C), the mean of those without padding."""
        if not (self.config.mean_pooling and self.config.head == "sequence"):
            return hidden
        if attention_mask is None:
            return hidden.mean(1, keepdim=True)
        real = attention_mask[:, :, None].to(hidden.dtype)  # (B, T, 1)
        return (hidden * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)

    def hidden(self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: KeyValueCache | None = None,
               memory: Memory | None = None, token_type_ids: Tensor | None = None, packed: Packed | None = None,
               since: int = 0, firsts: Tensor | None = None) -> Tensor:
        """Hidden states (B, T, C) that the head reads, of input ids (B, T); those of positions `since` one on,
        (B, T − since, C), where the rest is not wanted.

        `attention_mask` (B, S) is 1 for real tokens and 0 for padding; decoders count positions over real tokens only,
        so padding may stand on either side. With a cache the ids continue what it holds, S counts that too, and the
        cache grows by T. The decoder of two stacks reads `memory`. Rows may be `packed` into one, (1, N), of which none
        reads another; see `packs`. In a decoder a position sees none before that which `firsts` (B, T) names for it.
        """
        real = None if attention_mask is None else attention_mask.bool()
        stack = self.encoder if self.decoder is None else self.decoder
        hidden = stack(self._embedded(input_ids), real, cache, memory, token_type_ids, packed, since, firsts)
        if cache:
            cache.length += input_ids.shape[1]
        return hidden

    @property
    def packs(self) -> bool:
        """Whether rows may be packed: their attention goes by nothing but their own tokens. Not where a block has a function
        of its own for rectangles, which gains more."""
        config = self.config
        plain = config.shape == "decoder" and config.positions != "relative" and not config.sliding_window
        return plain and not (self.blocks()[0].fusable and fused.active(self.embedding.weight))

    def encode(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Memory:
        """What the decoder of an encoder–decoder reads: its source (B, S) encoded; `attention_mask` is 0 on padding."""
        real = None if attention_mask is None else attention_mask.bool()
        return Memory(self.encoder(self._embedded(input_ids), real), real)

    def _embedded(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        if self.training:
            x = x.to(self.training_dtype)
        return x * self.config.hidden_size ** 0.5 if self.config.scale_embedding else x

    def blocks(self) -> list[Block]:
        """All blocks, those of the encoder first."""
        return [block for stack in (self.encoder, self.decoder) if stack is not None for block in stack.layers]

    def set_dropout(self, dropout: float) -> None:
        """Sets the share of sublayer outputs that training sets to zero."""
        for block in self.blocks():
            block.dropout = dropout
        for stack in (self.encoder, self.decoder):
            if stack is not None:
                stack.dropout = dropout if self.config.shape != "decoder" else 0.0

    def compile_blocks(self, **options) -> None:
        """Has torch.compile, with its options, make one kernel of what it can of each block and of the head's loss in
        training. Evaluations, whose rows have many lengths, run as before."""
        for block in self.blocks():
            block.compiled = torch.compile(block._mixed, **options)
        if isinstance(self.head, LanguageHead):
            self.head.loss_with_gradient = torch.compile(head_loss.with_gradient, **options)

    def set_recompute(self, on: bool) -> None:
        """Whether training keeps only what enters each block, and calculates what lies inside again in the backward pass
        (Chen et al. 2016): memory for a third more work. Values and gradients stay the same."""
        for block in self.blocks():
            block.recompute = on

    def set_fast_attention(self, fast: bool) -> None:
        """Chooses between the fused kernel and the attention one can read."""
        for block in self.blocks():
            for module in (block.attention, block.cross):
                if module is not None:
                    module.fast = fast

    def initialize(self, seed: int) -> None:
        """Draws fresh weights: see `initialize`; `seed` decides them."""
        initialize(self, list(self.named_parameters()), torch.Generator().manual_seed(seed))


def initialize(model: Transformer, named: list[tuple[str, nn.Parameter]], generator: torch.Generator) -> None:
    """Draws these parameters: normal with deviation 0.02 for embeddings and head, 1/(2·√inputs) for the other matrices.

    An embedding that is no head as well has 0.3: its rows get a gradient only where their words are read, and those of rare
    words would stay small beside what the first blocks add. The matrices that write into the residual stream start at zero,
    so every block starts as the identity. Norms start at 1, biases at 0.
    """
    zero = ("attention.output.weight", "cross.output.weight", "mlp.down.weight", "bias")
    tables = tuple(f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding))
    alone = not (model.config.tie_word_embeddings and model.config.head == "lm")
    for name, weight in named:
        if name.endswith(zero):
            nn.init.zeros_(weight)
        elif weight.ndim < 2:
            nn.init.ones_(weight)
        else:
            deviation = 0.02 if name in tables or name == "head.output.weight" else 0.5 * weight.shape[1] ** -0.5
            deviation = 0.3 if alone and name == "embedding.weight" else deviation
            nn.init.normal_(weight, std=deviation, generator=generator)
