"""The Transformer: blocks in stacks, one stack (decoder or encoder) or two, and a head.

All differences between families are options of ModelConfig. Letters as in `layers`.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmcli.config import ModelConfig
from lmcli.model.attention import (
    Attention,
    AttentionContext,
    CrossAttention,
    EncoderOutput,
    KeyValueCache,
    attention_mask,
    causal_mask,
    document_mask,
)
from lmcli.model.heads import LabelHead, LanguageHead
from lmcli.model.initialization import initialize
from lmcli.model.layers import MLP, RelativeBias, make_norm, rotary_embedding, sinusoidal_embedding


class Block(nn.Module):
    """Self-attention, then (in a decoder with an encoder) cross-attention, then the MLP.

    A sublayer f is added as x + f(norm(x)), with `sandwich_norm` as x + norm(f(norm(x))), and with
    `post_norm` as norm(x + f(x)). In a parallel block attention and MLP read the same x.
    """

    def __init__(self, config: ModelConfig, layer: int, encoder: bool, dropout: float):
        super().__init__()
        heads = config.encoder_attention_heads if encoder else config.num_attention_heads
        size = config.encoder_head_dim if encoder else config.head_dim
        inner = config.encoder_intermediate_size if encoder else config.intermediate_size
        crossed = config.shape == "encoder-decoder" and not encoder
        normed = layer > 0 or config.first_attention_norm
        self.attention_norm = make_norm(config) if normed else nn.Identity()
        self.attention = Attention(config, layer, heads, size, causal=not encoder)
        self.cross_norm = make_norm(config) if crossed else None
        self.cross = CrossAttention(config, layer, heads, size, causal=False) if crossed else None
        self.mlp_norm = make_norm(config)
        self.mlp = MLP(config, inner)
        sandwich = config.sandwich_norm
        self.attention_out_norm = make_norm(config) if sandwich else nn.Identity()
        self.mlp_out_norm = make_norm(config) if sandwich else nn.Identity()
        self.post_norm, self.parallel = config.post_norm, config.parallel_block
        self.dropout = dropout

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """(B, T, C) → (B, T − query_start, C)."""
        residual = x[:, context.query_start :]
        if self.parallel:
            x = self.add(residual, self.attention(self.attention_norm(x), context))
            return self.add(x, self.mlp(self.mlp_norm(residual)))
        if self.post_norm:
            x = self.attention_norm(self.add(residual, self.attention(x, context)))
            if self.cross is not None and self.cross_norm is not None:
                x = self.cross_norm(self.add(x, self.cross(x, context)))
            return self.mlp_norm(self.add(x, self.mlp(x)))
        attended = self.attention(self.attention_norm(x), context)
        x = self.add(residual, self.attention_out_norm(attended))
        if self.cross is not None and self.cross_norm is not None:
            x = self.add(x, self.cross(self.cross_norm(x), context))
        return self.add(x, self.mlp_out_norm(self.mlp(self.mlp_norm(x))))

    def add(self, residual: Tensor, update: Tensor) -> Tensor:
        """residual + dropout(update)."""
        return residual + F.dropout(update, self.dropout, self.training)


class Stack(nn.Module):
    """Position embeddings, blocks in sequence and, unless post-norm, a last norm."""

    def __init__(self, config: ModelConfig, encoder: bool, dropout: float):
        super().__init__()
        self.config, self.causal = config, not encoder
        # dropout of embeddings; a decoder-only model has none
        self.dropout = dropout if config.shape != "decoder" else 0.0
        count = config.num_encoder_layers if encoder else config.num_hidden_layers
        heads = config.encoder_attention_heads if encoder else config.num_attention_heads
        size, types = config.hidden_size, config.type_vocab_size
        rows = config.max_position_embeddings + config.position_offset
        relative = config.positions == "relative"
        self.positions = nn.Embedding(rows, size) if config.positions == "learned" else None
        self.types = nn.Embedding(types, size) if types else None
        self.embedding_norm = make_norm(config) if config.embedding_norm else None
        self.relative = RelativeBias(config, heads, encoder) if relative else None
        self.layers = nn.ModuleList(Block(config, i, encoder, dropout) for i in range(count))
        self.norm = None if config.post_norm else make_norm(config)

    def forward(
        self,
        x: Tensor,
        token_mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
        encoder_output: EncoderOutput | None = None,
        token_types: Tensor | None = None,
        document_start: Tensor | None = None,
        query_start: int = 0,
    ) -> Tensor:
        """Hidden states (B, T − query_start, C) of embedded tokens (B, T, C).

        `token_mask` (B, S) is False for padding; `token_types` (B, T) are 0 if not given. No
        position attends to keys before its `document_start` (B, T).
        """
        positions = self.token_positions(x, token_mask, cache)
        if document_start is not None and self.config.positions != "rotary":
            # counted from the start of the document; rotary positions are relative anyway
            positions = positions - document_start
        x = self.embed(x, positions, token_types)
        contexts = self.contexts(positions, token_mask, cache, encoder_output, document_start)
        types = self.config.resolved_layer_types(len(self.layers))
        for layer, layer_type in zip(self.layers, types):
            context = contexts[layer_type]
            if query_start and layer is self.layers[-1]:  # the others read all positions as keys
                context = replace(context, query_start=query_start)
            x = layer(x, context)
        return x if self.norm is None else self.norm(x)

    def token_positions(
        self, x: Tensor, token_mask: Tensor | None, cache: KeyValueCache | None
    ) -> Tensor:
        """Positions (B or 1, T); a decoder counts tokens, so padding may be on either side."""
        past = cache.length if cache else 0
        if token_mask is None or not self.causal:
            return torch.arange(past, past + x.shape[1], device=x.device)[None]
        return (token_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past:]

    def embed(self, x: Tensor, positions: Tensor, token_types: Tensor | None = None) -> Tensor:
        """Adds embeddings of positions and token types to x (B, T, C)."""
        if self.positions is not None:
            x = x + self.positions(positions + self.config.position_offset).to(x.dtype)
        elif self.config.positions == "sinusoidal":
            x = x + sinusoidal_embedding(positions, x.shape[-1]).to(x.dtype)
        if self.types is not None:
            types = self.types.weight[0] if token_types is None else self.types(token_types)
            x = x + types.to(x.dtype)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        return F.dropout(x, self.dropout, self.training)

    def contexts(
        self,
        positions: Tensor,
        token_mask: Tensor | None,
        cache: KeyValueCache | None,
        encoder_output: EncoderOutput | None,
        document_start: Tensor | None,
    ) -> dict[str, AttentionContext]:
        """The AttentionContext of each type of layer, for positions (B or 1, T)."""
        config, past, queries = self.config, cache.length if cache else 0, positions.shape[1]
        keys, device = past + queries, positions.device

        def mask_of(window: int) -> Tensor | None:
            mask = attention_mask(queries, keys, self.causal, window, token_mask, device)
            return mask if document_start is None else document_mask(document_start, mask)

        mask = mask_of(window=0)
        if self.relative is not None:
            bias = self.relative(past, queries)  # (1, H, T, S)
            if mask is None and self.causal:
                mask = causal_mask(queries, keys, device)
            mask = bias if mask is None else bias.masked_fill(~mask, float("-inf"))
        rotary = self.rotary(positions)
        full = local = AttentionContext(rotary, mask, cache, encoder_output)
        if config.sliding_window:
            if config.local_rope_theta and rotary is not None:
                plain = replace(config, rope_type="default")
                rotary = rotary_embedding(positions, plain, config.local_rope_theta)
            local = replace(full, rotary=rotary, mask=mask_of(config.sliding_window))
        return {"full_attention": full, "sliding_attention": local}

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        """(cos, sin) of positions (B or 1, T), if they are rotary."""
        if self.config.positions != "rotary":
            return None
        return rotary_embedding(positions, self.config, self.config.rope_theta)


class Transformer(nn.Module):
    """Token ids → hidden states → logits (Vaswani et al. 2017), as the configuration says."""

    def __init__(self, config: ModelConfig, dropout: float = 0.0):
        super().__init__()
        self.config = config
        self.training_dtype = torch.float32
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.encoder = Stack(config, True, dropout) if config.shape != "decoder" else None
        self.decoder = Stack(config, False, dropout) if config.shape != "encoder" else None
        self.head = LanguageHead(config) if config.head == "lm" else LabelHead(config)
        self.tie()

    def tie(self) -> None:
        """Makes head and embedding share one matrix, if the configuration says so."""
        if self.tied and self.head.output is not None:
            self.head.output.weight = self.embedding.weight

    @property
    def tied(self) -> bool:
        """True if head and embedding share one matrix."""
        return self.config.tie_word_embeddings and self.config.head == "lm"

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
        decoder_input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, T, V), or as LabelHead says, of input ids (B, T).

        An encoder–decoder reads sources (B, S) as `input_ids` and returns the logits of
        `decoder_input_ids` (B, T). For mask and cache see `hidden`.
        """
        if self.config.shape == "encoder-decoder":
            assert decoder_input_ids is not None
            encoder_output = self.encode(input_ids, attention_mask)
            return self.head(self.hidden(decoder_input_ids, None, cache, encoder_output))
        hidden = self.hidden(input_ids, attention_mask, cache, token_type_ids=token_type_ids)
        return self.head(self.pooled(hidden, attention_mask))

    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
        encoder_output: EncoderOutput | None = None,
        token_type_ids: Tensor | None = None,
        document_start: Tensor | None = None,
        query_start: int = 0,
    ) -> Tensor:
        """Hidden states (B, T − query_start, C), the input of the head, of input ids (B, T).

        `attention_mask` (B, S) is 0 for padding. With a cache, the ids continue what it holds, S
        includes that, and the cache grows by T. The decoder of two stacks reads `encoder_output`.
        In a decoder, no position attends to any before its `document_start` (B, T). Positions
        before `query_start` are read, but their states are not returned.
        """
        token_mask = None if attention_mask is None else attention_mask.bool()
        stack = self.encoder if self.decoder is None else self.decoder
        assert stack is not None
        others = encoder_output, token_type_ids, document_start, query_start
        hidden = stack(self.embed(input_ids), token_mask, cache, *others)
        if cache:
            cache.length += input_ids.shape[1]
        return hidden

    def encode(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> EncoderOutput:
        """The EncoderOutput of sources (B, S); `attention_mask` is 0 for padding."""
        assert self.encoder is not None
        token_mask = None if attention_mask is None else attention_mask.bool()
        return EncoderOutput(self.encoder(self.embed(input_ids), token_mask), token_mask)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Embedded tokens, (B, T) → (B, T, C)."""
        x = self.embedding(input_ids)
        if self.training:
            x = x.to(self.training_dtype)
        return x * self.config.hidden_size**0.5 if self.config.scale_embedding else x

    def pooled(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Hidden states (B, T, C), or with mean pooling the mean over tokens, (B, 1, C)."""
        if not (self.config.mean_pooling and self.config.head == "sequence"):
            return hidden
        if attention_mask is None:
            return hidden.mean(1, keepdim=True)
        token_mask = attention_mask[:, :, None].to(hidden.dtype)  # (B, T, 1)
        return (hidden * token_mask).sum(1, keepdim=True) / token_mask.sum(1, keepdim=True)

    def stacks(self) -> list[Stack]:
        """The encoder and the decoder, as far as the model has them."""
        return [stack for stack in (self.encoder, self.decoder) if stack is not None]

    def blocks(self) -> list[Block]:
        """All blocks, the encoder's first."""
        return [block for stack in self.stacks() for block in stack.layers]  # type: ignore[misc]

    def set_dropout(self, dropout: float) -> None:
        """Sets the share of sublayer outputs (and embeddings) that training sets to zero."""
        for block in self.blocks():
            block.dropout = dropout
        for stack in self.stacks():
            stack.dropout = dropout if self.config.shape != "decoder" else 0.0

    def set_training_dtype(self, dtype: torch.dtype) -> None:
        """Sets the precision of activations in training; weights keep theirs."""
        self.training_dtype = dtype

    def initialize(self, seed: int) -> None:
        """Draws new weights, determined by `seed`; see `initialization`."""
        generator = torch.Generator().manual_seed(seed)
        initialize(self, self.named_parameters(), self.tied, generator)
