"""Numbers of a model that are no numbers: NaN, or infinite where they cannot be.

A NaN among log-probabilities means "not scored" in this package. What a model computes is stored
as infinity instead (`scoring.token_logprobs`), and whoever writes a record's result raises this
error in its place.
"""

from torch import nn

from lmcli.errors import UserError


def not_finite(model: nn.Module, name: str, what: str, where: str) -> UserError:
    """The error of the model called `name`, whose `what` at a place in the input is no number.

    The hint tells whether weights are the reason; they are read for it.
    """
    weights = [key for key, weight in model.named_parameters() if not weight.isfinite().all()]
    if weights:
        more = f" and {len(weights) - 1} more" if len(weights) > 1 else ""
        hint = f"the model is damaged: NaN or infinity in {weights[0]}{more}"
    else:
        hint = "all weights are finite, so numbers in between overflow: try --dtype float32"
    return UserError(f"{what} of {where} is NaN or infinite", where=name, hint=hint)
