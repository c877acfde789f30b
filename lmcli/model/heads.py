"""Heads: hidden states → logits over the vocabulary, or over labels. Letters as in `layers`."""

from torch import Tensor, nn

from lmcli.config import ModelConfig
from lmcli.model.layers import ACTIVATIONS, Linear, make_norm


class _Head(nn.Module):
    """An optional dense layer and norm before the output, as BERT's families have them."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        size, bias = config.hidden_size, config.head_dense_bias
        self.dense = Linear(size, size, bias=bias) if config.head_dense else None
        self.norm = make_norm(config) if config.head_norm else None
        self.activation = ACTIVATIONS[config.head_act]

    def transform(self, x: Tensor) -> Tensor:
        """(…, C) → (…, C): the input of the output matrix."""
        if self.dense is not None:
            x = self.activation(self.dense(x))
        return x if self.norm is None else self.norm(x)


class LanguageHead(_Head):
    """Hidden states (…, C) → logits over the vocabulary (…, V)."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.scale = config.hidden_size**-0.5 if config.scale_logits else 1.0
        self.output = Linear(config.hidden_size, config.vocab_size, bias=config.head_bias)

    def transform(self, x: Tensor) -> Tensor:
        """(…, C) → (…, C): the input of the output matrix."""
        x = super().transform(x)
        return x if self.scale == 1.0 else x * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.transform(x))


class LabelHead(_Head):
    """Hidden states (B, T, C) → logits of labels.

    "sequence": (B, labels), from the first token; "token": (B, T, labels); "span": (B, T, 2), start
    and end of an answer. "none" has no output: it is the pooler of a bare encoder, (B, C).
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.pooled = config.head in ("sequence", "none")
        labels = {"span": 2, "none": 0}.get(config.head, len(config.labels))
        self.output = Linear(config.hidden_size, labels) if labels else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.transform(x[:, 0] if self.pooled else x)
        return x if self.output is None else self.output(x)
