"""The Transformer: block, stack, model. Decoder-only so far; this is how the other two shapes fit.

- A `Stack` is embedding-free: an encoder–decoder is two of them (`encoder`, `decoder`), an encoder only the first,
  with a mask that is not causal.
- Post-norm (BERT, BART, Marian) is the block's other order: norm(x + f(x)) instead of x + f(norm(x)); the two norms of
  a block keep their names, and the stack's final norm falls away. A parallel block (GPT-NeoX) adds both f's to one x.
- Cross-attention is a third sublayer between the two, the same `Attention` reading keys and values from the encoder's
  output; its cache is filled once.
- A relative bias (T5) is one table, owned by the stack, that turns into an additive (1, H, T, S) tensor once a forward
  and travels beside the mask; rotary (`turn`) travels the same way and is then absent.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmcli.config import ModelConfig
from lmcli.model.attention import Attention, KeyValueCache, causal_mask
from lmcli.model.layers import GatedMLP, RMSNorm, rotation


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). (B, T, C) → (B, T, C)."""

    def __init__(self, config: ModelConfig, layer: int, dropout: float):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config)
        self.dropout = dropout

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor | None,
                cache: KeyValueCache | None) -> Tensor:
        x = x + self._drop(self.attention(self.attention_norm(x), turn, mask, cache))
        return x + self._drop(self.mlp(self.mlp_norm(x)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class Stack(nn.Module):
    """Blocks one after another and the final norm. (B, T, C) → (B, T, C)."""

    def __init__(self, config: ModelConfig, dropout: float):
        super().__init__()
        self.layers = nn.ModuleList(Block(config, i, dropout) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor | None,
                cache: KeyValueCache | None) -> Tensor:
        for layer in self.layers:
            x = layer(x, turn, mask, cache)
        return self.norm(x)


class Transformer(nn.Module):
    """A language model: token ids → hidden states → logits over the next token."""

    def __init__(self, config: ModelConfig, dropout: float = 0.0):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.decoder = Stack(config, dropout)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()

    def tie(self) -> None:
        """Lets the head share the embedding's matrix where the configuration says so."""
        if self.config.tie_word_embeddings:
            self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None,
                cache: KeyValueCache | None = None) -> Tensor:
        """Logits (B, T, V) for input ids (B, T); see `hidden` for the other two."""
        return self.head(self.hidden(input_ids, attention_mask, cache))

    def hidden(self, input_ids: Tensor, attention_mask: Tensor | None = None,
               cache: KeyValueCache | None = None) -> Tensor:
        """Final hidden states (B, T, C) of input ids (B, T).

        `attention_mask` (B, S) is 1 for real tokens and 0 for padding; positions count real tokens only, so padding may
        stand on either side. With a cache the ids continue what it holds, S counts that too, and the cache grows by T.
        """
        read = input_ids.shape[1]
        past = cache.length if cache else 0
        seen = past + read
        if attention_mask is None:
            mask = None
            positions = torch.arange(past, seen, device=input_ids.device)[None]  # (1, T)
        else:
            mask = _mask(attention_mask.bool(), read)
            positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past:]  # (B, T)
        turn = rotation(positions, self.config.head_dim, self.config.rope_theta)
        x = self.decoder(self.embedding(input_ids), turn, mask, cache)
        if cache:
            cache.length = seen
        return x

    def set_fast_attention(self, fast: bool) -> None:
        """Chooses between the fused kernel and the attention one can read."""
        for layer in self.decoder.layers:
            layer.attention.fast = fast

    def initialize(self, seed: int) -> None:
        """Draws fresh weights: normal with deviation 0.02 for embeddings and 1/(2·√inputs) for the other matrices.

        The two matrices that write into the residual stream start at zero, so every block starts as the identity.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if weight.ndim < 2:
                nn.init.ones_(weight)
            elif name.endswith(("attention.output.weight", "mlp.down.weight")):
                nn.init.zeros_(weight)
            else:
                deviation = 0.02 if name in ("embedding.weight", "head.weight") else 0.5 * weight.shape[1] ** -0.5
                nn.init.normal_(weight, std=deviation, generator=generator)


def _mask(real: Tensor, read: int) -> Tensor:
    """(B, 1, T, S) bool: causal, blind to padding; a padding position looks at itself, so that its softmax exists."""
    seen = real.shape[1]
    at = torch.arange(seen, device=real.device)
    itself = at == at[seen - read:, None]  # (T, S)
    return (causal_mask(read, seen, real.device) & (real[:, None, :] | itself))[:, None]
