"""The model that a run starts from: a new one, or one that was loaded to be trained further."""

import dataclasses
from collections.abc import Callable

import torch

from lmcli.checkpoints.adapters import together
from lmcli.checkpoints.config_json import family_of
from lmcli.config import ModelConfig, Recipe, TrainConfig
from lmcli.errors import UsageError
from lmcli.model.adapters import Lora, freeze_below, put_on
from lmcli.model.device import Placement
from lmcli.model.transformer import Transformer, initialize
from lmcli.text import tokenizer as tokenizers
from lmcli.training import data, memory_room
from lmcli.training.objectives import Objective


def fresh(recipe: Recipe, prepared: data.TrainingData, placement: Placement, objective: Objective) -> Transformer:
    """A new model as the recipe has it, for these ids and labels, its weights drawn.

    Raises UsageError for sizes that contradict tokenizer or context, and for those that the machine cannot hold.
    """
    tokenizer = prepared.tokenizer
    if 0 < recipe.model.vocab_size < tokenizer.size:
        raise UsageError(f"vocab_size {recipe.model.vocab_size} is less than the tokenizer's {tokenizer.size} ids",
                         where="model", hint="leave model.vocab_size out to take the tokenizer's size")
    config = dataclasses.replace(
        recipe.model, vocab_size=recipe.model.vocab_size or tokenizer.size,
        max_position_embeddings=recipe.model.max_position_embeddings or prepared.context,
        bos_token_id=tokenizer.prefix[0] if tokenizer.prefix else None, eos_token_id=_closing(tokenizer),
        pad_token_id=tokenizer.special("pad_token"), **_head(recipe.model, objective, prepared))
    if config.shape == "encoder-decoder":
        config = dataclasses.replace(config, decoder_start_token_id=config.pad_token_id)
    if config.max_position_embeddings < prepared.context:
        raise UsageError(f"max_position_embeddings {config.max_position_embeddings} is less than the context of "
                         f"{prepared.context} tokens", where="model", hint="leave it out, or lower train.context")
    config = config.complete()
    config = dataclasses.replace(config, model_type=family_of(config).model_type)
    memory_room.require(config, placement)
    model = Transformer(config, recipe.train.dropout)
    model.initialize(recipe.train.seed)
    return model


def adopted(model: Transformer, recipe: Recipe, prepared: data.TrainingData, objective: Objective,
            note: Callable[[str], None]) -> Transformer:
    """A loaded model, to be trained further as far as the recipe says; with a fresh head where the objective needs another
    one than it has."""
    changes = _head(model.config, objective, prepared)
    if recipe.train.new_head or any(getattr(model.config, key) != value for key, value in changes.items()):
        if recipe.train.lora_rank and objective.head == "lm":
            raise UsageError("the head over the vocabulary would be new, and an adapter holds none", where="train.lora_rank",
                             hint="train the whole model, or one that has such a head")
        # what a bare encoder puts on its first token, BERT's pooler, is the first layer of a head for labels as well
        pooler = model.config.head == "none" and changes["head"] == "sequence" and changes.get("head_dense")
        old = {name: weight for name, weight in model.named_parameters()
               if not name.startswith("head.") or (pooler and name.startswith("head.dense."))}
        model = Transformer(dataclasses.replace(model.config, **changes).complete())
        model.load_state_dict(old, strict=False)
        new = [(name, weight) for name, weight in model.named_parameters() if name not in old]
        initialize(model, new, torch.Generator().manual_seed(recipe.train.seed))
        note(f"the head is new: {', '.join(name for name, _ in new)}")
    model.set_dropout(recipe.train.dropout)
    choose_trained(model, recipe.train)
    if recipe.train.lora_rank and recipe.train.lora_rank >= model.config.hidden_size:
        note(f"rank {recipe.train.lora_rank} is no less than the model's width of {model.config.hidden_size}: LoRA saves "
             "nothing then")
    return model


def choose_trained(model: Transformer, train: TrainConfig) -> None:
    """Has all of a model trained but what `frozen_layers` names; with `lora_rank` adapters alone, and a head for labels, as
    PEFT does.

    Raises UsageError for blocks and targets that the model has not.
    """
    model.train().requires_grad_()
    for parameter in model.parameters():  # those of GPT-2's files stand, and came as views that no optimizer can update
        parameter.data = parameter.data.contiguous()
    if train.frozen_layers:
        freeze_below(model, train.frozen_layers)
    if train.lora_rank:
        lora = Lora(train.lora_rank, train.lora_alpha or 2.0 * train.lora_rank, train.lora_dropout, train.lora_targets)
        put_on(model, lora, together(model), train.seed)
        if model.config.head != "lm":
            model.head.requires_grad_()


def _closing(tokenizer: tokenizers.Tokenizer) -> int | None:
    named = tokenizer.special("eos_token")
    return named if named is not None or not tokenizer.suffix else tokenizer.suffix[-1]


def _head(config: ModelConfig, objective: Objective, prepared: data.TrainingData) -> dict:
    """The options of the head that an objective needs, as the model's family has it."""
    labels = {"labels": prepared.labels, "multi_label": prepared.several} if prepared.labels else {}
    if config.head == objective.head:
        return labels
    family = family_of(config.complete())
    if objective.head not in family.heads:
        raise UsageError(f"{family.model_type} has no head for {objective.name}", where="train.objective")
    options = {"head_act": "", **family.expected(objective.head)}
    return {"head": objective.head, **labels, **{key: value for key, value in options.items() if key.startswith("head_")}}
