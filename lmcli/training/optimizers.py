"""Which parameter is updated how: every parameter in exactly one group of exactly one optimizer."""

import torch
from torch import nn

from lmcli.config import TrainConfig


class Optimizers:
    """Several torch optimizers that step together; each group keeps its own top learning rate in `group["top"]`."""

    def __init__(self, parts: list[torch.optim.Optimizer]):
        self.parts = parts
        for group in self.param_groups:
            group["top"] = group["lr"]

    @property
    def param_groups(self) -> list[dict]:
        """The groups of all parts."""
        return [group for part in self.parts for group in part.param_groups]

    def set_factor(self, factor: float) -> None:
        """Sets every group's learning rate to `factor` times its top."""
        for group in self.param_groups:
            group["lr"] = factor * group["top"]

    def step(self) -> None:
        """One update of every parameter."""
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        """Drops all gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state_of(self, parameter: nn.Parameter) -> dict:
        """The state of one parameter, to be read or filled in place; empty before its first step."""
        owner = next(part for part in self.parts for group in part.param_groups
                     if any(parameter is known for known in group["params"]))
        return owner.state[parameter]


def build(model: nn.Module, config: TrainConfig) -> Optimizers:
    """AdamW (Loshchilov & Hutter 2019), fused where torch has it; with optimizer "muon" the blocks' matrices get Muon
    (Jordan et al. 2024: momentum, made orthogonal by five Newton–Schulz steps) at `matrix_learning_rate` instead.

    Matrices decay; norms, biases and tables of embeddings do not.
    """
    named = list(model.named_parameters())
    tables = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    inner = [p for name, p in named if p.ndim == 2 and ".layers." in name]
    outer = [p for name, p in named if p.ndim == 2 and ".layers." not in name and name not in tables]
    kept = [p for name, p in named if p.ndim < 2 or name in tables]
    assert len(inner) + len(outer) + len(kept) == len(named)
    by_muon = config.optimizer == "muon"
    decayed = outer if by_muon else inner + outer
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    parts: list[torch.optim.Optimizer] = [torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=fused)]
    if by_muon:
        parts.append(torch.optim.Muon(inner, lr=config.matrix_learning_rate, weight_decay=config.weight_decay))
    return Optimizers(parts)
