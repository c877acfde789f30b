"""Which parameter is updated how: every parameter in exactly one group of exactly one optimizer."""

from collections import defaultdict

import torch
from torch import Tensor, nn

from lmcli.config import TrainConfig


# minimax on [0.01, 1] one after another; the first is steep at 1, where a bfloat16 error grows 20-fold: hence the 1.05
QUINTICS = ((7.7116, -22.1159, 16.2503), (3.7871, -3.0655, 0.6532), (2.6687, -1.9833, 0.4533))


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


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal (Jordan et al. 2024), as torch.optim.Muon; all matrices of one shape in one product.

    The update of a matrix of R rows and C columns is scaled by √max(1, R/C). What makes it orthogonal runs in bfloat16.
    """

    def __init__(self, matrices: list[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    shapes[tuple(matrix.shape)].append(matrix)
            for shape, matrices in shapes.items():
                rate = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                updates = orthogonal(self._momentum(matrices, group["momentum"]))
                torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(matrices, [update.to(matrices[0].dtype) for update in updates], alpha=-rate)

    def _momentum(self, matrices: list[nn.Parameter], momentum: float) -> Tensor:
        """(matrices, R, C) bfloat16: what the running means of the gradients, looked at one step ahead, say (Nesterov)."""
        gradients = [matrix.grad for matrix in matrices]
        for matrix in matrices:
            if "momentum_buffer" not in self.state[matrix]:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
        means = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
        torch._foreach_lerp_(means, gradients, 1 - momentum)
        return torch.stack([ahead.bfloat16() for ahead in torch._foreach_lerp(gradients, means, momentum)])


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices (…, R, C) with their singular values brought near 1: those above a hundredth of the bound on the largest
    end between 0.73 and 1.28, smaller ones grow a hundredfold.

    Each step is an odd quintic, the best one for the interval that the steps before it leave (Amsel et al. 2025, "Polar
    Express"). The bound on the largest value comes from the Gram matrix that the first step needs anyway, and is so close
    that three steps do what five do after division by the Frobenius norm (Jordan et al. 2024).
    """
    x = matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    gram = x @ x.mT
    size = 1.05 * gram.norm(dim=(-2, -1), keepdim=True, dtype=torch.float32).sqrt().clamp(min=1e-7)
    x, gram = x / size.to(x.dtype), gram / size.square().to(x.dtype)
    for linear, cubic, quintic in QUINTICS:
        if gram is None:
            gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=cubic, alpha=quintic), x, beta=linear)
        gram = None
    return x.mT if matrices.shape[-2] > matrices.shape[-1] else x


def build(model: nn.Module, config: TrainConfig) -> Optimizers:
    """AdamW (Loshchilov & Hutter 2019), fused where torch has it; with optimizer "muon" the blocks' matrices get Muon
    (Jordan et al. 2024: momentum, made orthogonal) at `matrix_learning_rate` instead.

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
        parts.append(Muon(inner, lr=config.matrix_learning_rate, weight_decay=config.weight_decay))
    return Optimizers(parts)
