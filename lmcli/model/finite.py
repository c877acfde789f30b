"""Numbers of a model that are no numbers: NaN, or infinite where they cannot be.

A NaN among log-probabilities means "not scored" in this package. What a model computes is stored
as infinity instead (`scoring.token_logprobs`), and whoever writes a record's result raises this
error in its place.
"""

from typing import TYPE_CHECKING

from lmcli.errors import UserError

if TYPE_CHECKING:
    from torch import nn

# problems of a result
LOGPROB = "a log-probability is NaN or infinite"
LOGIT = "a logit is NaN or infinite"


class BadResult(UserError):
    """A model, called `name`, has a problem with the input at a `place`, number `index` of a call.

    Raised in place of a result that holds NaN or infinity.
    """

    def __init__(self, problem: str, name: str, place: str, hint: str, index: int = 0):
        super().__init__(f"{problem}: {place}", where=name, hint=hint)
        self.problem, self.name, self.index = problem, name, index

    def at(self, place: str) -> "BadResult":
        """The same error with another place."""
        return BadResult(self.problem, self.name, place, self.hint or "", self.index)


def not_finite(
    model: "nn.Module", name: str, problem: str, place: str, index: int = 0
) -> BadResult:
    """The error of the model called `name`, which has this problem at a place in the input.

    The hint tells whether weights are the reason; they are read for it.
    """
    weights = [key for key, weight in model.named_parameters() if not weight.isfinite().all()]
    if weights:
        more = f" and {len(weights) - 1} more" if len(weights) > 1 else ""
        hint = f"the model is damaged: NaN or infinity in {weights[0]}{more}"
    else:
        hint = "all weights are finite, so numbers in between overflow"
    if str(next(model.parameters()).dtype) == "torch.float16":
        hint += "; float16 holds no number above 65,504: try --dtype float32"
    return BadResult(problem, name, place, hint, index)
