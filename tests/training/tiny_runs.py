"""A Trainer over a tiny model, for the tests of the loop and its steps."""

import time
from types import SimpleNamespace

import numpy as np
import torch

from lmcli.config import ModelConfig, TrainConfig
from lmcli.data.batches import PackedRows
from lmcli.kernels.fast_path import build_model
from lmcli.model.device import DeviceConfig
from lmcli.training.loop import Due, Trainer
from lmcli.training.objective import Evaluation
from lmcli.training.objectives import OBJECTIVES
from lmcli.training.train_step import TrainStep

TINY = ModelConfig(
    vocab_size=40,
    max_position_embeddings=16,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
).complete()


def tiny_model(config=TINY, dropout=0.0):
    model = build_model(config, dropout)
    model.initialize(0)
    return model


def make_step(model=None, rows=None, dtype=torch.float32, **config) -> TrainStep:
    """A TrainStep over 400 tokens that count up to 40, in rows of 8, four rows a step."""
    rows = rows or PackedRows(np.arange(400, dtype=np.uint16) % 40, 8, 0, 0)
    options = {"context": 8, "batch_tokens": 32, **config}
    device_config = DeviceConfig(torch.device("cpu"), dtype)
    model = model or tiny_model()
    return TrainStep(
        model.train(), rows, TrainConfig(**options), device_config, OBJECTIVES["causal"]
    )


class UnannouncedTrainer(Trainer):
    """A Trainer whose events leave out that an evaluation follows."""

    def events(self):
        for event in super().events():
            if not (isinstance(event, Due) and event.what == "evaluation"):
                yield event


def make_trainer(
    evaluate=lambda: SimpleNamespace(criterion=9.0, loss=9.0),
    evaluation_tokens=0,
    started_at=None,
    step=None,
    **options,
) -> Trainer:
    """A Trainer of `make_step`."""
    started_at = time.monotonic() if started_at is None else started_at
    step = step or make_step(**options)
    return UnannouncedTrainer(step, Evaluation(evaluate, evaluation_tokens), started_at)


def run_step(step: TrainStep, share: float):
    """Makes one step that needs no notes."""
    gradients = step.gradients()
    try:
        next(gradients)
    except StopIteration as done:
        return step.update(done.value, share)
    raise AssertionError("a note")
