"""Initial weights of a new model, or of a new head."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class _NoInitialValues(TorchFunctionMode):
    """The functions of torch.nn.init return their tensor as it is."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__module__", "") == nn.init.__name__:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


@contextmanager
def meta_device() -> Iterator[None]:
    """Modules made in the block have shapes but no memory, for weights that are read afterwards.

    As `torch.device("meta")`, but without drawing initial values, which a meta tensor cannot hold:
    torch would import its compiler for that, which doubles the start of a command.
    """
    with torch.device("meta"), _NoInitialValues():
        yield


def initialize(
    model: nn.Module,
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    tied: bool,
    generator: torch.Generator,
) -> None:
    """Draws these parameters of a Transformer; `tied` says that head and embedding are one matrix.

    Embeddings and head are normal with deviation 0.02, other matrices with 1/(2·√inputs). An untied
    embedding has 0.3: its rows get a gradient only where their words occur, and rows of rare words
    would stay small against what the first blocks add. Matrices that write into the residual stream
    start at zero, so every block starts as the identity. Norms start at 1, biases at 0.
    """
    zero = ("attention.output.weight", "cross.output.weight", "mlp.down.weight", "bias")
    embeddings = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    }
    for name, weight in named_parameters:
        if name.endswith(zero):
            nn.init.zeros_(weight)
        elif weight.ndim < 2:
            nn.init.ones_(weight)
        elif name == "embedding.weight" and not tied:
            nn.init.normal_(weight, std=0.3, generator=generator)
        elif name in embeddings or name == "head.output.weight":
            nn.init.normal_(weight, std=0.02, generator=generator)
        else:
            nn.init.normal_(weight, std=0.5 * weight.shape[1] ** -0.5, generator=generator)
