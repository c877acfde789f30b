"""AdamW and Muon: every trained parameter is in exactly one group of exactly one optimizer."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from lmcli.config import TrainConfig
from lmcli.distributed.data_parallel import SINGLE_PROCESS, ReplicaGroup, local_shard
from lmcli.model.transformer import Transformer

# minimax on [0.01, 1], one after another; the first is steep at 1, where a bfloat16 error grows
# 20-fold: hence the factor 1.05 in `orthogonal`
QUINTICS = ((7.7116, -22.1159, 16.2503), (3.7871, -3.0655, 0.6532), (2.6687, -1.9833, 0.4533))

State = dict[nn.Parameter, dict[str, Tensor]]


@dataclass
class ParameterGroup:
    """Parameters with one learning rate: `peak_rate` at the schedule's peak, `rate` now."""

    parameters: list[nn.Parameter]
    peak_rate: float
    weight_decay: float
    rate: float = field(init=False)

    def __post_init__(self) -> None:
        self.rate = self.peak_rate

    def with_gradient(self) -> list[nn.Parameter]:
        """Parameters with a gradient."""
        return [parameter for parameter in self.parameters if parameter.grad is not None]


class Optimizers:
    """One or two rules, AdamW and Muon, that step together."""

    def __init__(self, rules: "list[AdamW | Muon]", replicas: ReplicaGroup = SINGLE_PROCESS):
        self.rules, self.replicas = rules, replicas

    @property
    def groups(self) -> list[ParameterGroup]:
        """The groups of all rules."""
        return [group for rule in self.rules for group in rule.groups]

    def set_factor(self, factor: float) -> None:
        """Sets every group's learning rate to `factor` times its peak."""
        for group in self.groups:
            group.rate = factor * group.peak_rate

    def clip(self, max_norm: float) -> float:
        """Scales all gradients down to `max_norm` together (0: never); returns the norm before."""
        gradients = [g for group in self.groups for g in _gradients(group.with_gradient())]
        norm = self.replicas.gradient_norm(gradients)
        if max_norm and norm > max_norm:
            torch._foreach_mul_(gradients, max_norm / (norm + 1e-6))
        return norm

    def step(self) -> None:
        """Updates every parameter that has a gradient."""
        for rule in self.rules:
            rule.step()

    def average(self, count: int) -> None:
        """Updates the mean of each weight over the last `count` steps, this one included."""
        for state, parameter in self._states():
            if count == 1:
                state["average"] = parameter.detach().clone()
            else:
                local_shard(state["average"]).lerp_(local_shard(parameter.detach()), 1 / count)

    def swap_averages(self) -> None:
        """Exchanges the weights and their means."""
        for state, parameter in self._states():
            if "average" in state:
                weight, mean = local_shard(parameter.detach()), local_shard(state["average"])
                previous_mean = mean.clone()
                mean.copy_(weight)
                weight.copy_(previous_mean)

    def _states(self) -> Iterator[tuple[dict[str, Tensor], nn.Parameter]]:
        return (
            (rule.state[parameter], parameter)
            for rule in self.rules
            for group in rule.groups
            for parameter in group.parameters
        )

    def zero_grad(self) -> None:
        """Drops all gradients."""
        for group in self.groups:
            for parameter in group.parameters:
                parameter.grad = None

    def state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The state of a parameter, which may be filled in place; {} if it is not trained."""
        return next((state for state, trained in self._states() if trained is parameter), {})


class AdamW:
    """AdamW (Loshchilov & Hutter 2019), equal to torch.optim.AdamW with fused=True to the bit.

    That class is not used because creating one imports torch's compiler: a second per command.
    """

    def __init__(
        self,
        groups: list[ParameterGroup],
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ):
        self.groups, self.betas, self.eps = groups, betas, eps
        self.state: State = defaultdict(dict)

    @torch.no_grad()
    def step(self) -> None:
        """Updates every parameter that has a gradient."""
        for group in self.groups:
            if not (parameters := group.with_gradient()):
                continue
            for parameter in parameters:
                if "step" not in self.state[parameter]:
                    self.state[parameter] |= {
                        "step": torch.zeros((), device=parameter.device),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }
            means, squares, steps = (
                [local_shard(self.state[parameter][key]) for parameter in parameters]
                for key in ("exp_avg", "exp_avg_sq", "step")
            )
            torch._foreach_add_(steps, 1)
            torch._fused_adamw_(
                [local_shard(parameter) for parameter in parameters],
                _gradients(parameters),
                means,
                squares,
                [],
                steps,
                lr=group.rate,
                beta1=self.betas[0],
                beta2=self.betas[1],
                weight_decay=group.weight_decay,
                eps=self.eps,
                amsgrad=False,
                maximize=False,
            )


class Muon:
    """Muon (Jordan et al. 2024) as torch.optim.Muon: orthogonalized momentum.

    All matrices of one shape, transposed or not, are one product in `dtype`. The update of a matrix
    of R rows and C columns is scaled by √max(1, R/C).
    """

    def __init__(
        self,
        groups: list[ParameterGroup],
        momentum: float = 0.95,
        dtype: torch.dtype = torch.bfloat16,
        replicas: ReplicaGroup = SINGLE_PROCESS,
    ):
        self.groups, self.momentum, self.dtype, self.replicas = groups, momentum, dtype, replicas
        self.state: State = defaultdict(dict)

    @torch.no_grad()
    def step(self) -> None:
        """Updates every matrix that has a gradient."""
        for group in self.groups:
            by_shape: dict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
            for matrix in group.with_gradient():
                by_shape[tuple(sorted(matrix.shape))].append(matrix)
            for matrices in by_shape.values():
                updates = self.replicas.on_full_matrices(
                    matrices, self._momentum(matrices), _orthogonalize
                )
                shards = [local_shard(matrix) for matrix in matrices]
                torch._foreach_mul_(shards, 1 - group.rate * group.weight_decay)
                for matrix, shard, update in zip(matrices, shards, updates):
                    scale = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
                    shard.add_(update, alpha=-group.rate * scale)

    def _momentum(self, matrices: list[nn.Parameter]) -> list[Tensor]:
        """The running means of the gradients, one step ahead (Nesterov), in `dtype`."""
        for matrix in matrices:
            if "momentum_buffer" not in self.state[matrix]:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
        gradients = _gradients(matrices)
        means = [local_shard(self.state[matrix]["momentum_buffer"]) for matrix in matrices]
        torch._foreach_lerp_(means, gradients, 1 - self.momentum)
        ahead = torch._foreach_lerp(gradients, means, self.momentum)
        return [matrix.to(self.dtype) for matrix in ahead]


def _gradients(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [local_shard(p.grad) for p in parameters if p.grad is not None]


def _orthogonalize(matrices: list[Tensor]) -> list[Tensor]:
    """`orthogonal` of matrices that have one shape, transposed or not."""
    tall = [matrix.shape[0] > matrix.shape[1] for matrix in matrices]
    wide = [matrix.T if turn else matrix for matrix, turn in zip(matrices, tall)]
    return [
        update.T if turn else update for update, turn in zip(orthogonal(torch.stack(wide)), tall)
    ]


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices (…, R, C), R ≤ C, with singular values near 1.

    Values above a hundredth of the bound on the largest end between 0.73 and 1.28 (in bfloat16 up
    to 1.6), smaller ones grow a hundredfold. Each step is an odd quintic, the best one for the
    interval that the steps before leave (Amsel et al. 2025, "Polar Express"). The bound comes from
    the Gram matrix that the first step needs anyway, and is so tight that three steps do what five
    do after division by the Frobenius norm (Jordan et al. 2024).
    """
    x = matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    gram = x @ x.mT
    size = 1.05 * gram.norm(dim=(-2, -1), keepdim=True, dtype=torch.float32).sqrt().clamp(min=1e-7)
    x, gram = x / size.to(x.dtype), gram / size.square().to(x.dtype)
    for i, (linear, cubic, quintic) in enumerate(QUINTICS):
        if i:
            gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=cubic, alpha=quintic)
        x = torch.baddbmm(x, polynomial, x, beta=linear)
    return x


def build(
    model: Transformer, config: TrainConfig, replicas: ReplicaGroup = SINGLE_PROCESS
) -> Optimizers:
    """AdamW, or with optimizer "muon" AdamW and Muon, which updates the blocks' matrices.

    Muon has `matrix_learning_rate` and the precision of the forward pass. Matrices decay; norms,
    biases, embedding tables and LoRA's factors (which start a change at 0) do not, and AdamW
    updates them. Rates fall with depth by `layer_decay` (Clark et al. 2020, "ELECTRA").
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    # what does not decay
    modules = model.named_modules()
    tables = {f"{name}.weight" for name, module in modules if isinstance(module, nn.Embedding)}
    tables |= {name for name, _ in named if name.endswith((".lora_a", ".lora_b"))}
    matrices = [(name, p) for name, p in named if p.ndim == 2 and name not in tables]
    others = [p for name, p in named if p.ndim < 2 or name in tables]
    inner = [p for name, p in matrices if ".layers." in name]
    outer = [p for name, p in matrices if ".layers." not in name]
    if len(inner) + len(outer) + len(others) != len(named):
        raise ValueError("a parameter is in no group, or in two")
    # the groups, by depth
    muon, decay, rate = config.optimizer == "muon", config.weight_decay, config.learning_rate
    groups = partial(_groups, depths(model) if config.layer_decay < 1 else {}, config.layer_decay)
    adamw = AdamW(
        [*groups(outer if muon else inner + outer, rate, decay), *groups(others, rate, 0.0)]
    )
    if not muon:
        return Optimizers([adamw], replicas)
    inner_groups = groups(inner, config.matrix_learning_rate, decay)
    rule = Muon(inner_groups, dtype=model.training_dtype, replicas=replicas)
    return Optimizers([adamw, rule], replicas)


def _groups(
    depth: dict[nn.Parameter, int],
    layer_decay: float,
    parameters: list[nn.Parameter],
    peak_rate: float,
    weight_decay: float,
) -> list[ParameterGroup]:
    """Parameters in one group per depth d, with rate `peak_rate` · `layer_decay`^d."""
    levels: dict[int, list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        levels[depth.get(parameter, 0)].append(parameter)
    return [
        ParameterGroup(level, peak_rate * layer_decay**d, weight_decay)
        for d, level in sorted(levels.items())
    ]


def depths(model: Transformer) -> dict[nn.Parameter, int]:
    """How many blocks a gradient has passed when it reaches a parameter, its own block included.

    0 for the head and the last norm; one more than there are blocks for the input of the lowest.
    """
    blocks = model.blocks()
    depth = dict.fromkeys(model.parameters(), len(blocks) + 1)
    for above, block in enumerate(reversed(blocks)):
        depth |= dict.fromkeys(block.parameters(), above + 1)
    for stack in model.stacks():
        if stack.norm is not None:
            last_block = depth[next(stack.layers[-1].parameters())]
            depth |= dict.fromkeys(stack.norm.parameters(), last_block - 1)
    return depth | {p: 0 for p in model.head.parameters() if p is not model.embedding.weight}
