"""What makes a model fast, installed from outside: the plain modules get faster subclasses.

The weights and their names stay the same, and so do the results up to rounding; the tests compare
a plain model with one that has the fast path. LoRA, sharding and saving work with both.
"""

from dataclasses import dataclass, replace
from itertools import chain, groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmcli.config import ModelConfig
from lmcli.kernels import calls, fused_block, fused_loss, products
from lmcli.kernels.causal_attention import BlockShape, causal_attention
from lmcli.kernels.dropout import dropped_sum
from lmcli.model import likelihood
from lmcli.model.attention import (
    Attention,
    AttentionContext,
    CrossAttention,
    causal_mask,
    document_mask,
)
from lmcli.model.heads import LanguageHead
from lmcli.model.layers import MLP, Linear, RMSNorm, gelu_tanh
from lmcli.model.lora import LoraLinear
from lmcli.model.transformer import Block, Stack, Transformer


def build_model(config: ModelConfig, dropout: float = 0.0) -> Transformer:
    """A Transformer with the fast path."""
    return install(Transformer(config, dropout))


def install(model: Transformer) -> Transformer:
    """Gives all modules of a plain model their fast forward passes, in place; returns the model."""
    for module in model.modules():
        if fast := FAST.get(type(module)):
            module.__class__ = fast  # as torch's fully_shard does
        if isinstance(module, FastBlock):
            module.can_fuse = _can_fuse(module)
    return model


def compile_blocks(model: Transformer, **options: Any) -> None:
    """Compiles blocks and head loss by torch.compile, with its options, for training only.

    Evaluations, whose rows have many lengths, run as before.
    """
    for block in model.blocks():
        assert isinstance(block, FastBlock)
        block.compiled = torch.compile(block.mix, **options)
    if isinstance(model.head, FastLanguageHead):
        model.head.loss_with_gradient = torch.compile(fused_loss.with_gradient, **options)


Groups = tuple[tuple[int, int], ...]  # (rows, length) of rows laid end to end


@dataclass(frozen=True)
class FastContext(AttentionContext):
    """An AttentionContext whose mask does not yet separate documents or packed rows."""

    document_start: Tensor | None = None
    packed: Groups = ()


def separated(context: AttentionContext) -> AttentionContext:
    """The context with a mask that separates documents, if there are any."""
    if not isinstance(context, FastContext) or context.document_start is None:
        return context
    mask, start = context.mask, context.document_start
    if mask is None or mask.dtype == torch.bool:
        mask = document_mask(start, mask)
    else:  # numbers to add to the scores
        mask = mask.masked_fill(~document_mask(start, None), float("-inf"))
    return replace(context, mask=mask, document_start=None)


def can_pack(model: Transformer) -> bool:
    """True if `packed_hidden` gains speed: attention depends on nothing but a row's own tokens.

    Blocks with the fused function gain more from rectangles of equal rows.
    """
    config = model.config
    plain = config.shape == "decoder" and not config.sliding_window
    if not isinstance(model, FastTransformer) or not plain or config.positions == "relative":
        return False
    block = model.blocks()[0]
    assert isinstance(block, FastBlock)
    return not (block.can_fuse and fused_block.active(model.embedding.weight))


def packed_hidden(model: Transformer, rows: list[list[int]]) -> Tensor:
    """Hidden states (1, N, C) of rows of ids, N in all, each read alone and laid end to end."""
    groups = tuple((len(list(same)), length) for length, same in groupby(map(len, rows)))
    ids = torch.tensor([list(chain.from_iterable(rows))], device=model.embedding.weight.device)
    return model.hidden(ids, packed=groups)  # type: ignore[call-arg]  # FastTransformer


class FastTransformer(Transformer):
    """A Transformer that also reads packed rows."""

    def hidden(self, *args: Any, packed: Groups = (), **options: Any) -> Tensor:
        """As of Transformer; with `packed`, the ids (1, N) are rows laid end to end."""
        if not packed:
            return super().hidden(*args, **options)
        (input_ids,), stack = args, self.stacks()[-1]
        positions = torch.cat([torch.arange(length).repeat(rows) for rows, length in packed])
        positions = positions[None].to(input_ids.device)  # (1, N)
        x = stack.embed(self.embed(input_ids), positions)
        context = FastContext(stack.rotary(positions), None, None, None, packed=packed)
        for layer in stack.layers:
            x = layer(x, context)
        return x if stack.norm is None else stack.norm(x)


class FastStack(Stack):
    """A Stack that leaves the separation of documents to its blocks."""

    def contexts(self, *arguments: Any) -> dict[str, AttentionContext]:
        """As of Stack, but masks do not separate documents yet."""
        positions, token_mask, cache, encoder_output, document_start = arguments
        contexts = super().contexts(positions, token_mask, cache, encoder_output, None)
        if document_start is None:
            return contexts
        return {
            layer_type: FastContext(**vars(context), document_start=document_start)
            for layer_type, context in contexts.items()
        }


class FastBlock(Block):
    """A Block that runs as one function with a backward pass of its own where that is possible."""

    compiled: Any = None  # `mix` by torch.compile
    can_fuse = False  # set by `install`

    def __call__(self, x: Tensor, context: AttentionContext) -> Tensor:
        """Runs the block, without a gradient if nothing is trained up to here."""
        if self.training and torch.is_grad_enabled() and not x.requires_grad:
            output = context.encoder_output
            others = (context.mask, output and output.states, *self.parameters())
            if not any(tensor is not None and tensor.requires_grad for tensor in others):
                with torch.no_grad():
                    return super().__call__(x, context)
            x = x.detach().requires_grad_()  # fused functions compute all gradients or none
        return super().__call__(x, context)

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        if self.compiled and self.training:
            return self.compiled(x, separated(context))
        return self.mix(x, context)

    def mix(self, x: Tensor, context: AttentionContext) -> Tensor:
        """(B, T, C) → (B, T − query_start, C), fused or as of Block."""
        if self.can_fuse and fused_block.active(x) and self._whole_rows(context):
            return self._fused(x, context)
        return super().forward(x, separated(context))

    def _whole_rows(self, context: AttentionContext) -> bool:
        """True if all positions attend to those before, and rotary angles fit the fused block."""
        rotary = context.rotary
        return (
            context.mask is None
            and context.cache is None
            and not getattr(context, "packed", ())
            and not context.query_start
            and rotary is not None
            and rotary[0].shape[0] == 1
            and rotary[0].shape[-1] == self.attention.head_dim
        )

    def linears(self) -> tuple[Linear | None, ...]:
        """The seven matrices; None for a gate that the MLP does not have."""
        attention, mlp = self.attention, self.mlp
        projections = attention.query, attention.key, attention.value, attention.output
        return *projections, mlp.gate, mlp.up, mlp.down

    def _fused(self, x: Tensor, context: AttentionContext) -> Tensor:
        """`mix` by `fused_block`."""
        attention, linears = self.attention, [linear for linear in self.linears() if linear]
        (rows, length, _), heads = x.shape, attention.query.out_features // attention.head_dim
        branches = [linear.lora if isinstance(linear, LoraLinear) else None for linear in linears]
        dropouts = [linear.dropout for linear in linears if isinstance(linear, LoraLinear)]
        trained = self.training and torch.is_grad_enabled()
        head_norms = attention.query_norm, attention.key_norm
        assert isinstance(self.mlp_norm, RMSNorm) and context.rotary is not None
        shape = BlockShape(
            rows=rows,
            length=length,
            heads=heads,
            key_heads=heads // attention.groups,
            head_dim=attention.head_dim,
            scale=attention.scale,
            eps=self.mlp_norm.eps,
            head_eps=head_norms[0].eps if head_norms[0] else 0.0,
            dropout=self.dropout if self.training else 0.0,
            lora_dropout=max(dropouts, default=0.0) if trained else 0.0,
        )
        norms = (self.attention_norm, self.mlp_norm, *head_norms)
        weights = fused_block.BlockWeights._make(
            None if module is None else module.weight for module in (*norms, *linears)
        )
        half = attention.head_dim // 2  # both halves hold the same angles
        cos, sin = (table[0, 0, :, :half] for table in context.rotary)
        start = getattr(context, "document_start", None)
        y = fused_block.block(x.flatten(0, 1), shape, (cos, sin), weights, start, tuple(branches))
        return y.view(x.shape)

    def add(self, residual: Tensor, update: Tensor) -> Tensor:
        """residual + dropout(update), which keeps only a seed for the backward pass."""
        if not (self.dropout and self.training):
            return residual + update
        if fused_block.active(update):
            return dropped_sum(residual, update, self.dropout)
        return super().add(residual, update)


class FastLinear(Linear):
    """A Linear that trains on rows of texts in few shapes (see `products`)."""

    multiply = staticmethod(products.linear)


class FastRMSNorm(RMSNorm):
    """RMSNorm in one pass over memory, forward and backward."""

    def forward(self, x: Tensor) -> Tensor:
        if fused_block.active(x):
            return fused_block.rms_norm(x, self.weight, self.eps)
        return super().forward(x)


class FastMLP(MLP):
    """An MLP whose gate and up are one product, and whose activation is one pass over memory."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) → (B, T, C)."""
        gate, up = self.gate, self.up
        if gate is None:
            inner = up(x)
            in_place = self.activation is gelu_tanh and not inner.requires_grad
            if in_place and fused_block.active(inner):
                return self.down(fused_block.gelu_tanh_(inner))
            return self.down(self.activation(inner))
        if self.activation in fused_block.CURVES and gate.bias is None and fused_block.active(x):
            if torch.is_grad_enabled() and _has_lora(gate, up):
                gate_up = torch.cat([gate(x), up(x)], dim=-1)
            else:
                matrix = torch.cat([weight_of(gate), weight_of(up)])
                gate_up = products.linear(x, matrix.to(x.dtype))
            return self.down(fused_block.gated(gate_up, fused_block.CURVES[self.activation]))
        gated, upper = joint_product(x, gate, up)
        return self.down(self.activation(gated) * upper)


class FastAttention(Attention):
    """Attention by torch's fused kernel or ours, whichever is faster for the shapes at hand."""

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """(B, T, C) → (B, T − query_start, C)."""
        packed = context.packed if isinstance(context, FastContext) else ()
        if not packed:
            return super().forward(x, context)
        heads = self.heads(x, context)  # (1, H or K, N, D) each
        outputs, start = [], 0
        for rows, length in packed:
            end = start + rows * length
            query, key, value = (
                head[0, :, start:end].unflatten(1, (rows, length)).transpose(0, 1) for head in heads
            )
            mixed = self.attend(query, key, value, None)  # (rows, H, length, D)
            outputs.append(mixed.transpose(1, 2).reshape(rows * length, -1))
            start = end
        return self.output(torch.cat(outputs)[None])  # (1, N, C)

    def project(self, x: Tensor, query_start: int) -> tuple[Tensor, ...]:
        """As of Attention, by one product if all positions are queries."""
        if query_start:
            return super().project(x, query_start)
        return joint_product(x, self.query, self.key, self.value)

    def project_keys(self, x: Tensor) -> tuple[Tensor, ...]:
        """As of Attention, by one product."""
        return joint_product(x, self.key, self.value)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """As of Attention."""
        queries, keys = query.shape[2], key.shape[2]
        if _slow_backward(query):
            if products.varied(query, key):
                if mask is not None and mask.dtype != torch.bool:
                    mask = mask.float()
                heads = query.float(), key.float(), value.float()
                return super().attend(*heads, mask).to(query.dtype)
            return super().attend(query, key, value, mask)
        if queries == 1 and mask is None and self.groups > 1:
            # the heads of a group take the place of T, and keys need no copies
            query = query.view(query.shape[0], -1, self.groups, self.head_dim)  # (B, K, H/K, D)
            mixed = F.scaled_dot_product_attention(query, key, value, scale=self.scale)
            return mixed.reshape(query.shape[0], -1, 1, self.head_dim)
        causal = self.causal and mask is None and queries > 1
        if causal and fused_block.active(query) and not query.requires_grad:
            return causal_attention(query, key, value, self.scale)
        if self.groups > 1:
            key = key.repeat_interleave(self.groups, dim=1)  # (B, H, S, D)
            value = value.repeat_interleave(self.groups, dim=1)
        if causal and queries != keys:
            causal, mask = False, causal_mask(queries, keys, query.device)
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(query.dtype)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal, scale=self.scale
        )


class FastCrossAttention(FastAttention, CrossAttention):
    """CrossAttention by the same kernels."""


class FastLanguageHead(LanguageHead):
    """A LanguageHead that computes losses without holding all logits (see `fused_loss`)."""

    loss_with_gradient: Any = staticmethod(fused_loss.with_gradient)  # or as torch.compile made it

    def summed_loss(self, hidden: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        """As `likelihood.summed_loss`; the gradient is computed together with the loss."""
        x, output = self.transform(hidden), self.output
        branch = output.lora_branch(x) if isinstance(output, LoraLinear) else None
        return fused_loss.cross_entropy(
            x, output.weight, output.bias, targets, smoothing, self.loss_with_gradient, branch
        )

    def target_losses(self, hidden: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        """As `likelihood.target_losses`."""
        if torch.is_grad_enabled() or smoothing or not fused_block.active(hidden):
            return likelihood.chunked_losses(hidden, self, targets, smoothing)
        x, matrix = self.transform(hidden), weight_of(self.output)
        return fused_loss.target_losses(x, matrix, self.output.bias, targets)


FAST: dict[type[nn.Module], type[nn.Module]] = {
    Transformer: FastTransformer,
    Stack: FastStack,
    Block: FastBlock,
    Linear: FastLinear,
    RMSNorm: FastRMSNorm,
    MLP: FastMLP,
    Attention: FastAttention,
    CrossAttention: FastCrossAttention,
    LanguageHead: FastLanguageHead,
}


def joint_product(x: Tensor, *linears: Linear) -> tuple[Tensor, ...]:
    """x (…, C) times each matrix; in training by one product, whose gradients are fewer, larger."""
    if not torch.is_grad_enabled() or _has_lora(*linears):
        return tuple(linear(x) for linear in linears)
    biases: list[Tensor] = [linear.bias for linear in linears]
    bias = None if biases[0] is None else torch.cat(biases).to(x.dtype)
    matrix = torch.cat(tuple(linear.weight for linear in linears)).to(x.dtype)
    joined = products.linear(x, matrix, bias)
    return joined.split([linear.out_features for linear in linears], dim=-1)


def _can_fuse(block: FastBlock) -> bool:
    """True for the block that `fused_block` computes, see there."""
    linears = block.linears()
    return (
        isinstance(block.attention_norm, RMSNorm)
        and isinstance(block.mlp_norm, RMSNorm)
        and block.cross is None
        and block.attention.causal
        and block.attention.head_dim <= calls.WIDEST_HEAD
        and block.mlp.activation is F.silu
        and all(linear is not None and linear.bias is None for linear in linears)
        and not (block.post_norm or block.parallel)
        and isinstance(block.mlp_out_norm, nn.Identity)
    )


def weight_of(linear: Linear) -> Tensor:
    """The matrix (out, in), with what LoRA adds to it."""
    return linear.matrix if isinstance(linear, LoraLinear) else linear.weight


def _has_lora(*linears: Linear) -> bool:
    return any(isinstance(linear, LoraLinear) for linear in linears)


def _slow_backward(query: Tensor) -> bool:
    """True if plain products train faster than the fused kernel: short rows on a CPU.

    The kernel's backward pass takes most of its time there (4 × 128, context 128: 1.38 times the
    tokens per second by plain products; no gain at context 256).
    """
    return query.requires_grad and query.device.type == "cpu" and query.shape[2] <= 128
