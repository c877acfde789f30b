"""The model that a run starts from: a new one, or a loaded one that is trained further."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from lmcli.checkpoints.adapter_folder import fused_projections
from lmcli.checkpoints.config_json import family_of
from lmcli.config import ModelConfig, Recipe, TrainConfig
from lmcli.errors import UsageError
from lmcli.kernels.fast_path import build_model
from lmcli.model.device import DeviceConfig
from lmcli.model.initialization import initialize
from lmcli.model.lora import Lora, freeze_below, put_on
from lmcli.model.transformer import Transformer
from lmcli.runs import memory_fit
from lmcli.text.tokenizer import Tokenizer
from lmcli.training.objective import TrainingData


def from_scratch(recipe: Recipe, data: TrainingData, device_config: DeviceConfig) -> Transformer:
    """A new model with random weights, its sizes from the recipe, its ids and labels from the data.

    Raises UsageError for sizes that contradict tokenizer or context, or that memory cannot hold.
    """
    tokenizer = data.tokenizer
    if 0 < recipe.model.vocab_size < tokenizer.size:
        raise UsageError(
            f"vocab_size {recipe.model.vocab_size} is less than the tokenizer's {tokenizer.size}",
            where="model",
            hint="leave model.vocab_size out to take the tokenizer's size",
        )
    config = replace(
        recipe.model,
        vocab_size=recipe.model.vocab_size or tokenizer.size,
        max_position_embeddings=recipe.model.max_position_embeddings or data.context,
        bos_token_id=tokenizer.prefix[0] if tokenizer.prefix else None,
        eos_token_id=_eos(tokenizer),
        pad_token_id=tokenizer.special_id("pad_token"),
        **_head_options(recipe.model, data),
    )
    if config.shape == "encoder-decoder":
        config = replace(config, decoder_start_token_id=config.pad_token_id)
    if config.max_position_embeddings < data.context:
        raise UsageError(
            f"max_position_embeddings {config.max_position_embeddings} is less than the context of "
            f"{data.context} tokens",
            where="model",
            hint="leave it out, or lower train.context",
        )
    config = config.complete()
    config = replace(config, model_type=family_of(config).model_type)
    memory_fit.require_memory(config, device_config)
    model = build_model(config, recipe.train.dropout)
    model.initialize(recipe.train.seed)
    return model


def _eos(tokenizer: Tokenizer) -> int | None:
    named = tokenizer.special_id("eos_token")
    return named if named is not None or not tokenizer.suffix else tokenizer.suffix[-1]


def from_pretrained(
    model: Transformer, recipe: Recipe, data: TrainingData, note: Callable[[str], None]
) -> Transformer:
    """A loaded model, prepared for training; with a new head if the objective needs another one."""
    options = _head_options(model.config, data)
    differs = any(getattr(model.config, key) != value for key, value in options.items())
    if recipe.train.new_head or differs:
        if recipe.train.lora_rank and data.objective.head == "lm":
            raise UsageError(
                "the head over the vocabulary would be new, and an adapter holds none",
                where="train.lora_rank",
                hint="train the whole model, or one with a language head",
            )
        model, names = _with_new_head(model, options, recipe.train.seed)
        note(f"the head is new: {', '.join(names)}")
    model.set_dropout(recipe.train.dropout)
    set_trainable(model, recipe.train)
    if recipe.train.lora_rank and recipe.train.lora_rank >= model.config.hidden_size:
        note(
            f"rank {recipe.train.lora_rank} is no less than the model's width of "
            f"{model.config.hidden_size}: LoRA saves nothing then"
        )
    return model


def _with_new_head(
    model: Transformer, options: dict[str, Any], seed: int
) -> tuple[Transformer, list[str]]:
    """(the model with another head, the names of its new weights)."""
    # BERT's pooler, which a bare encoder has, is also the first layer of a head for labels
    pooler = (
        model.config.head == "none" and options["head"] == "sequence" and options.get("head_dense")
    )
    old = {
        name: weight
        for name, weight in model.named_parameters()
        if not name.startswith("head.") or (pooler and name.startswith("head.dense."))
    }
    model = build_model(replace(model.config, **options).complete())
    model.load_state_dict(old, strict=False)
    new = [(name, weight) for name, weight in model.named_parameters() if name not in old]
    initialize(model, new, model.tied, torch.Generator().manual_seed(seed))
    return model, [name for name, _ in new]


def set_trainable(model: Transformer, train: TrainConfig) -> None:
    """Makes all weights trainable except frozen ones; with `lora_rank` adds adapters.

    Then only these and a head for labels are trained, as by PEFT. Raises UsageError for blocks and
    targets that the model does not have.
    """
    model.train().requires_grad_()
    # GPT-2's weights are transposed views of the file, which no optimizer can update
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()
    if train.frozen_layers:
        freeze_below(model, train.frozen_layers)
    if train.lora_rank:
        lora = Lora(
            train.lora_rank,
            train.lora_alpha or 2.0 * train.lora_rank,
            train.lora_dropout,
            train.lora_targets,
        )
        put_on(model, lora, fused_projections(model), train.seed)
        if model.config.head != "lm":
            model.head.requires_grad_()


def _head_options(config: ModelConfig, data: TrainingData) -> dict[str, Any]:
    """The options of the head that the objective needs, as the model's family has it."""
    labels: dict[str, Any] = {}
    if data.labels:
        labels = {"labels": data.labels, "multi_label": data.multi_label}
    head = data.objective.head
    if config.head == head:
        return labels
    family = family_of(config.complete())
    if head not in family.heads:
        raise UsageError(
            f"{family.model_type} has no head for {data.objective.name}", where="train.objective"
        )
    options = {"head_act": "", **family.options_for(head)}
    head_options = {key: value for key, value in options.items() if key.startswith("head_")}
    return {"head": head, **labels, **head_options}
