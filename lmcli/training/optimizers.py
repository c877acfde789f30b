"""Which parameter is updated how: every one that is trained in exactly one group of exactly one optimizer."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from lmcli.config import TrainConfig
from lmcli.model.transformer import Transformer
from lmcli.training.parallel import ALONE, Team, local

# minimax on [0.01, 1] one after another; the first is steep at 1, where a bfloat16 error grows 20-fold: hence the 1.05
QUINTICS = ((7.7116, -22.1159, 16.2503), (3.7871, -3.0655, 0.6532), (2.6687, -1.9833, 0.4533))


class Optimizers:
    """Rules that step together. Each has `groups` of parameters with a rate of their own, and a `state` by parameter."""

    def __init__(self, rules: "list[AdamW | Muon]", team: Team = ALONE):
        self.rules, self.team = rules, team

    @property
    def groups(self) -> "list[Group]":
        """The groups of all rules."""
        return [group for rule in self.rules for group in rule.groups]

    def set_factor(self, factor: float) -> None:
        """Sets every group's learning rate to `factor` times its top."""
        for group in self.groups:
            group.rate = factor * group.top

    def clip(self, most: float) -> float:
        """Scales all gradients down together where their norm is above `most` (0: never); returns the norm before."""
        gradients = [local(p.grad) for group in self.groups for p in group.parameters if p.grad is not None]
        norm = self.team.norm(gradients)
        if most and norm > most:
            torch._foreach_mul_(gradients, most / (norm + 1e-6))
        return norm

    def step(self) -> None:
        """One update of every parameter."""
        for rule in self.rules:
            rule.step()

    def average(self, count: int) -> None:
        """Makes what is kept beside each weight the mean of its values after `count` steps, of which this was the last."""
        for state, parameter in self._states():
            if count == 1:
                state["average"] = parameter.detach().clone()
            else:
                local(state["average"]).lerp_(local(parameter.detach()), 1 / count)

    def swap_averages(self) -> None:
        """Puts the means in place of the weights, and the weights where the means were."""
        for state, parameter in self._states():
            if "average" in state:
                weight, mean = local(parameter.detach()), local(state["average"])
                held = mean.clone()
                mean.copy_(weight)
                weight.copy_(held)

    def _states(self) -> Iterator[tuple[dict[str, Tensor], nn.Parameter]]:
        return ((rule.state[parameter], parameter) for rule in self.rules for group in rule.groups
                for parameter in group.parameters)

    def zero_grad(self) -> None:
        """Drops all gradients."""
        for group in self.groups:
            for parameter in group.parameters:
                parameter.grad = None

    def state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The state of one parameter, to be read or filled in place; empty before its first step, and of one that is not
        trained."""
        return next((rule.state[parameter] for rule in self.rules for group in rule.groups
                     if any(parameter is known for known in group.parameters)), {})


@dataclass
class Group:
    """Parameters with one learning rate: `top` at the top of the schedule, `rate` now."""

    parameters: list[nn.Parameter]
    top: float
    weight_decay: float
    rate: float = field(init=False)

    def __post_init__(self) -> None:
        self.rate = self.top

    def with_gradient(self) -> list[nn.Parameter]:
        """Those that the last backward pass reached."""
        return [parameter for parameter in self.parameters if parameter.grad is not None]


class AdamW:
    """AdamW (Loshchilov & Hutter 2019), in one pass over memory, to the bit as torch.optim.AdamW with fused=True.

    That class is not used because making one imports torch's compiler, a second of every command.
    """

    def __init__(self, groups: list[Group], betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8):
        self.groups, self.betas, self.eps = groups, betas, eps
        self.state: dict[nn.Parameter, dict[str, Tensor]] = defaultdict(dict)

    @torch.no_grad()
    def step(self) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.groups:
            if not (parameters := group.with_gradient()):
                continue
            for parameter in parameters:
                if "step" not in self.state[parameter]:
                    self.state[parameter] |= {"step": torch.zeros((), device=parameter.device),
                                              "exp_avg": torch.zeros_like(parameter),
                                              "exp_avg_sq": torch.zeros_like(parameter)}
            means, squares, steps = ([local(self.state[parameter][key]) for parameter in parameters]
                                     for key in ("exp_avg", "exp_avg_sq", "step"))
            torch._foreach_add_(steps, 1)
            torch._fused_adamw_([local(p) for p in parameters], [local(p.grad) for p in parameters], means, squares, [],
                                steps, lr=group.rate, beta1=self.betas[0], beta2=self.betas[1],
                                weight_decay=group.weight_decay, eps=self.eps, amsgrad=False, maximize=False)


class Muon:
    """Momentum, made orthogonal (Jordan et al. 2024), as torch.optim.Muon; all matrices of one shape, lying or standing, in
    one product.

    The update of a matrix of R rows and C columns is scaled by √max(1, R/C). What makes it orthogonal runs in `dtype`.
    """

    def __init__(self, groups: list[Group], momentum: float = 0.95, dtype: torch.dtype = torch.bfloat16,
                 team: Team = ALONE):
        self.groups, self.momentum, self.dtype, self.team = groups, momentum, dtype, team
        self.state: dict[nn.Parameter, dict[str, Tensor]] = defaultdict(dict)

    @torch.no_grad()
    def step(self) -> None:
        """One update of every matrix that has a gradient."""
        for group in self.groups:
            alike: dict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
            for matrix in group.with_gradient():
                alike[tuple(sorted(matrix.shape))].append(matrix)
            for matrices in alike.values():
                updates = self.team.on_whole(matrices, self._momentum(matrices), _made_orthogonal)
                own = [local(matrix) for matrix in matrices]
                torch._foreach_mul_(own, 1 - group.rate * group.weight_decay)
                for (rows, columns), part, update in zip((matrix.shape for matrix in matrices), own, updates):
                    part.add_(update, alpha=-group.rate * max(1.0, rows / columns) ** 0.5)

    def _momentum(self, matrices: list[nn.Parameter]) -> list[Tensor]:
        """In `dtype`, what the running means of the gradients, looked at one step ahead, say (Nesterov)."""
        gradients = [local(matrix.grad) for matrix in matrices]
        for matrix in matrices:
            if "momentum_buffer" not in self.state[matrix]:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
        means = [local(self.state[matrix]["momentum_buffer"]) for matrix in matrices]
        torch._foreach_lerp_(means, gradients, 1 - self.momentum)
        return [ahead.to(self.dtype) for ahead in torch._foreach_lerp(gradients, means, self.momentum)]


def _wide(matrix: Tensor) -> Tensor:
    return matrix.T if matrix.shape[0] > matrix.shape[1] else matrix


def _made_orthogonal(matrices: list[Tensor]) -> list[Tensor]:
    """`orthogonal` of matrices that lie or stand, all of one shape but for that."""
    made = orthogonal(torch.stack([_wide(matrix) for matrix in matrices]))
    return [update.T if len(matrix) > matrix.shape[1] else update for matrix, update in zip(matrices, made)]


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices (…, R, C), R ≤ C, with their singular values brought near 1: those above a hundredth of the bound on the
    largest end between 0.73 and 1.28 (in bfloat16 up to 1.6), smaller ones grow a hundredfold.

    Each step is an odd quintic, the best one for the interval that the steps before it leave (Amsel et al. 2025, "Polar
    Express"). The bound on the largest value comes from the Gram matrix that the first step needs anyway, and is so close
    that three steps do what five do after division by the Frobenius norm (Jordan et al. 2024).
    """
    x = matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    gram = x @ x.mT
    size = 1.05 * gram.norm(dim=(-2, -1), keepdim=True, dtype=torch.float32).sqrt().clamp(min=1e-7)
    x, gram = x / size.to(x.dtype), gram / size.square().to(x.dtype)
    for linear, cubic, quintic in QUINTICS:
        if gram is None:
            gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=cubic, alpha=quintic), x, beta=linear)
        gram = None
    return x


def build(model: Transformer, config: TrainConfig, team: Team = ALONE) -> Optimizers:
    """AdamW, or with optimizer "muon" AdamW beside Muon, which gets the blocks' matrices at `matrix_learning_rate` and
    multiplies in the precision of the forward pass. LoRA's, whose factors are nothing to make orthogonal, are AdamW's.

    Matrices decay; norms, biases, tables of embeddings, and LoRA's, which stand for a change and start at none, do not.
    Rates fall with depth by `layer_decay` (Clark et al. 2020, "ELECTRA").
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    tables = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    tables |= {name for name, _ in named if name.endswith((".lora_a", ".lora_b"))}
    inner = [p for name, p in named if p.ndim == 2 and ".layers." in name and name not in tables]
    outer = [p for name, p in named if p.ndim == 2 and ".layers." not in name and name not in tables]
    kept = [p for name, p in named if p.ndim < 2 or name in tables]
    assert len(inner) + len(outer) + len(kept) == len(named)
    decay, rate, by_muon = config.weight_decay, config.learning_rate, config.optimizer == "muon"
    grouped = partial(_groups, depths(model) if config.layer_decay < 1 else {}, config.layer_decay)
    adamw = AdamW([*grouped(outer if by_muon else inner + outer, rate, decay), *grouped(kept, rate, 0.0)])
    muon = Muon(grouped(inner, config.matrix_learning_rate, decay), dtype=model.training_dtype, team=team)
    return Optimizers([adamw, muon] if by_muon else [adamw], team)


def _groups(depth: dict[nn.Parameter, int], decay: float, parameters: list[nn.Parameter], top: float,
            weight_decay: float) -> list[Group]:
    """Parameters in a group for each depth, with `top` times `decay` to its power."""
    levels: dict[int, list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        levels[depth.get(parameter, 0)].append(parameter)
    return [Group(level, top * decay ** deep, weight_decay) for deep, level in sorted(levels.items())]


def depths(model: Transformer) -> dict[nn.Parameter, int]:
    """Through how many blocks a gradient has come when it reaches a parameter, the parameter's own among them: 0 in the head
    and the last norm, one more than there are blocks in what the lowest one reads."""
    blocks = model.blocks()
    found = dict.fromkeys(model.parameters(), len(blocks) + 1)
    for above, block in enumerate(reversed(blocks)):
        found |= dict.fromkeys(block.parameters(), above + 1)
    for stack in (model.encoder, model.decoder):
        if stack is not None and stack.norm is not None:
            own = found[next(stack.layers[-1].parameters())]
            found |= dict.fromkeys(stack.norm.parameters(), own - 1)
    return found | {p: 0 for p in model.head.parameters() if p is not model.embedding.weight}
