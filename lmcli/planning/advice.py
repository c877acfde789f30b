"""A sentence of advice for each plan, and which plan to take."""

import dataclasses
import math

from lmcli.planning.expected_quality import rounded
from lmcli.planning.plan import Plan

# epochs after which the validation loss rises (tinyshakespeare, 4 × 192: 5, with dropout 9)
MANY_EPOCHS = 8.0
# tokens per parameter below which a smaller model wins (the same text, 4 × 128 … 4 × 256 in 60 s)
FEW_TOKENS = 1.0
LOW_EFFICIENCY = 0.5  # speedup divided by the number of devices


def advise(plans: list[Plan]) -> tuple[list[Plan], str]:
    """(the plans, each with its advice; one sentence on which to take)."""
    possible = [plan for plan in plans if plan.fits and plan.steps]
    best = min(
        possible, key=lambda plan: (plan.bits_per_byte or math.inf, plan.parameters), default=None
    )
    advised = [dataclasses.replace(plan, advice=_advice(plan, best)) for plan in plans]
    if best is None:
        return (
            advised,
            "none of these can be trained here in that time: give more time, or a smaller model",
        )
    expected = f": about {rounded(best.bits_per_byte)} bits per byte" if best.bits_per_byte else ""
    return advised, f"take {best.preset}{expected} in {_duration(best.seconds)}"


def _advice(plan: Plan, best: Plan | None) -> str:
    """What is wrong with a plan, or else what it means, and what to do."""
    take_best = f"; take {best.preset}" if best and best.preset != plan.preset else ""
    if not plan.fits:
        each = " on each device" if plan.devices > 1 else ""
        return (
            f"needs {plan.memory / 1e9:,.1f} GB of memory{each}, "
            f"the machine has {plan.machine_memory / 1e9:,.1f} GB{_less_memory(plan, take_best)}"
        )
    if not plan.steps:
        return f"the time is over before the first step{take_best or '; give more time'}"
    # several devices
    if plan.idle_devices:
        return (
            f"a step has {plan.batch_tokens // plan.context:,} rows for {plan.devices:,} devices: "
            f"{plan.idle_devices:,} are idle; raise train.batch_tokens{take_best}"
        )
    if plan.speedup is not None and plan.speedup < LOW_EFFICIENCY * plan.devices:
        devices_tokens = plan.micro_batch_tokens * plan.devices
        raise_micro = plan.sharding == "sharded" and devices_tokens < plan.batch_tokens
        return (
            f"{plan.devices:,} devices are only {plan.speedup:.1f} times as fast as one: "
            "communication and updates take longer than the computation; "
            f"raise train.{'micro_' if raise_micro else ''}batch_tokens{take_best}"
        )
    # too little time, too little text
    if plan.tokens_per_parameter < FEW_TOKENS and plan.epochs < MANY_EPOCHS:
        factor = _factor(FEW_TOKENS / plan.tokens_per_parameter)
        smaller = take_best or "; take a smaller one"
        return f"a model of this size needs {factor} times the time{smaller}"
    if plan.epochs > MANY_EPOCHS:
        stop = f"; there is little to learn after {MANY_EPOCHS:.0f} epochs, so stop earlier"
        return (
            f"this needs {_factor(plan.epochs / MANY_EPOCHS)} times the text, which is read "
            f"{plan.epochs:,.0f} times{take_best or stop}"
        )
    if plan.epochs < 0.5:
        epoch = _duration(plan.seconds / max(plan.epochs, 1e-9))
        return f"reads {plan.epochs:.0%} of your text; one epoch takes {epoch}{take_best}"
    better = take_best and f", but {best.preset if best else ''} is expected to be better"
    return f"text, model and budget fit together{better}"


def _less_memory(plan: Plan, take_best: str) -> str:
    """How to need less: smaller micro-batches if it is the activations that do not fit."""
    fixed = plan.memory - plan.activations
    if fixed > 0.9 * plan.machine_memory:
        return take_best or "; take a smaller model"
    share = (plan.machine_memory * 0.9 - fixed) / plan.activations
    rows = max(1, int(share * plan.micro_batch_tokens / plan.context))
    return f"; --set train.micro_batch_tokens={rows * plan.context} fits"


def _factor(factor: float) -> str:
    return f"{factor:,.0f}" if factor >= 10 else f"{factor:.1f}"


def _duration(seconds: float) -> str:
    """ "50 s", "12 min", "3.5 h", "40 days"."""
    for unit, size in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            number = seconds / size
            return f"{number:,.0f} {unit}" if number >= 10 else f"{number:.1f} {unit}"
    return f"{seconds:.0f} s"
