"""What a model is trained for: (model, batch) → hidden states at the targets, the head over them, and the targets."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lmcli.model.likelihood import summed_loss
from lmcli.model.transformer import Transformer
from lmcli.text.batches import IGNORED, Batch


class Predictions(NamedTuple):
    """Hidden states (N, C) from which `head` makes logits, and the N targets they are to predict."""

    hidden: Tensor
    head: Callable[[Tensor], Tensor]
    targets: Tensor


def causal(model: Transformer, batch: Batch) -> Predictions:
    """Every next token of packed rows."""
    ids, targets, _ = _tensors(model, batch)
    firsts = None if batch.firsts is None else _on(ids.device, batch.firsts)
    return Predictions(model.hidden(ids, firsts=firsts).flatten(0, 1), model.head, targets.flatten())


def completion(model: Transformer, batch: Batch) -> Predictions:
    """Every token of what follows a given text, and its end."""
    ids, targets, _ = _tensors(model, batch)
    chosen = targets != IGNORED
    return Predictions(model.hidden(ids)[chosen], model.head, targets[chosen])  # padding stands behind, where nothing looks


def masked(model: Transformer, batch: Batch) -> Predictions:
    """The tokens that were masked (Devlin et al. 2019); the head runs on them alone."""
    ids, targets, real = _tensors(model, batch)
    chosen = targets != IGNORED
    return Predictions(model.hidden(ids, real)[chosen], model.head, targets[chosen])


def seq2seq(model: Transformer, batch: Batch) -> Predictions:
    """Every token of the target and its end, given the source and the target before it (teacher forcing)."""
    ids, targets, real = _tensors(model, batch)
    decoder_ids = _on(ids.device, batch.decoder_ids)
    hidden = model.hidden(decoder_ids, memory=model.encode(ids, real))  # what follows a token cannot change it: no mask
    chosen = targets != IGNORED
    return Predictions(hidden[chosen], model.head, targets[chosen])


def classification(model: Transformer, batch: Batch) -> Predictions:
    """The label of each text, or its labels: targets are then (N, labels), 0 or 1."""
    ids, targets, real = _tensors(model, batch)
    hidden = model.hidden(ids, real, token_type_ids=_types(model, batch))
    return Predictions(model.pooled(hidden, real), model.head, targets)


def span(model: Transformer, batch: Batch) -> Predictions:
    """The first and the last token of each answer, among the candidates (Devlin et al. 2019, §4.2): a row of logits (2·B, T)
    for each, those of the starts first."""
    ids, targets, real = _tensors(model, batch)
    hidden = model.hidden(ids, real, token_type_ids=_types(model, batch))
    logits = model.head(hidden).float().movedim(-1, 0)  # (2, B, T)
    if batch.candidates is not None:
        logits = logits.masked_fill(~_on(ids.device, batch.candidates), float("-inf"))
    return Predictions(logits.flatten(0, 1), nn.Identity(), targets.T.flatten())


def _types(model: Transformer, batch: Batch) -> Tensor | None:
    """Token types, where there are any and the model tells them apart."""
    if batch.types is None or model.config.type_vocab_size < 2:
        return None
    return _on(model.embedding.weight.device, batch.types)


def _tensors(model: Transformer, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
    device = model.embedding.weight.device
    return _on(device, batch.ids), _on(device, batch.targets), None if batch.real is None else _on(device, batch.real)


def _on(device: torch.device, array: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    # from pinned memory a GPU fetches it while it works; else the copy waits until it has no more work
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@dataclass(frozen=True)
class Objective:
    """One objective: its function, the model's shape and head, and what one target is called."""

    name: str
    predict: Callable[[Transformer, Batch], Predictions]
    shape: str
    head: str
    target: str


OBJECTIVES = {objective.name: objective for objective in (
    Objective("causal", causal, "decoder", "lm", "token"),
    Objective("completion", completion, "decoder", "lm", "token"),
    Objective("masked", masked, "encoder", "lm", "masked token"),
    Objective("seq2seq", seq2seq, "encoder-decoder", "lm", "target token"),
    Objective("classification", classification, "encoder", "sequence", "text"),
    Objective("span", span, "encoder", "span", "position"))}


def loss(objective: Objective, model: Transformer, batch: Batch, smoothing: float = 0.0) -> Tensor:
    """The summed loss of a batch in nats; differentiable. There is no smoothing over positions, which are no words."""
    return summed_loss(*objective.predict(model, batch), 0.0 if objective.name == "span" else smoothing)
