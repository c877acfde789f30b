"""What to make of plans: a sentence for each, and which to take."""

import dataclasses
import math

from lmcli.analysis.planning import Plan, rounded

MANY_EPOCHS = 8.0  # passes after which validation stops falling (tinyshakespeare, 4 × 192: after 5, with dropout 9)
FEW_TOKENS = 1.0  # a parameter: with fewer a smaller model is the better one (the same text, 4 × 128 … 4 × 256 in 60 s)
HALF = 0.5  # of what so many devices could do: with less they have too little to do


def advise(plans: list[Plan]) -> tuple[list[Plan], str]:
    """(the plans, each with its sentence of advice; one sentence on which to take)."""
    able = [plan for plan in plans if plan.fits and plan.steps]
    best = min(able, key=lambda plan: (plan.bits_per_byte or math.inf, plan.parameters), default=None)
    told = [dataclasses.replace(plan, advice=_advice(plan, best)) for plan in plans]
    if best is None:
        return told, "none of these can be trained here in that time: give more time, or a smaller model"
    reached = f": about {rounded(best.bits_per_byte)} bits per byte" if best.bits_per_byte else ""
    return told, f"take {best.preset}{reached} in {_spelt(best.seconds)}"


def _advice(plan: Plan, best: Plan | None) -> str:
    other = f"; take {best.preset}" if best and best.preset != plan.preset else ""
    if not plan.fits:
        there, each = plan.machine_memory / 1e9, " on each device" if plan.devices > 1 else ""
        return f"needs {plan.memory / 1e9:,.1f} GB of memory{each}, {there:,.1f} GB are there{_less(plan, other)}"
    if not plan.steps:
        return f"the time is over before the first step{other or '; give more'}"
    if plan.idle_devices:
        return (f"{plan.devices:,} devices share {plan.batch_tokens // plan.context:,} rows a step: {plan.idle_devices:,} "
                f"of them idle; raise train.batch_tokens{other}")
    if plan.speedup is not None and plan.speedup < HALF * plan.devices:
        parted = plan.sharding == "sharded" and plan.micro_batch_tokens * plan.devices < plan.batch_tokens
        return (f"{plan.devices:,} devices are only {plan.speedup:.1f} × as fast as one: each computes too little beside "
                f"what it sends and updates; raise train.{'micro_' if parted else ''}batch_tokens{other}")
    if plan.tokens_per_parameter < FEW_TOKENS and plan.epochs < MANY_EPOCHS:
        return (f"there is {_times_too(FEW_TOKENS / plan.tokens_per_parameter)} too little time for a model of this size"
                f"{other or '; a smaller one learns faster'}")
    if plan.epochs > MANY_EPOCHS:
        alone = f", and after some {MANY_EPOCHS:.0f} there is little left to learn; stop earlier"
        return (f"your text is {_times_too(plan.epochs / MANY_EPOCHS)} too small for this: it is read "
                f"{plan.epochs:,.0f} times{other or alone}")
    if plan.epochs < 0.5:
        return (f"reads {plan.epochs:.0%} of your text; all of it would take "
                f"{_spelt(plan.seconds / max(plan.epochs, 1e-9))}{other}")
    return f"text, model and budget go together{other and f', but {best.preset} is expected to do better'}"


def _less(plan: Plan, other: str) -> str:
    """What to do about memory: where activations are what does not fit, smaller micro-batches."""
    without = plan.memory - plan.activations
    if without > 0.9 * plan.machine_memory:
        return other or "; take a smaller model"
    share = (plan.machine_memory * 0.9 - without) / plan.activations
    rows = max(1, int(share * plan.micro_batch_tokens / plan.context))
    return f"; --set train.micro_batch_tokens={rows * plan.context} fits"


def _times_too(factor: float) -> str:
    return f"{factor:,.0f} ×" if factor >= 10 else f"{factor:.1f} ×"


def _spelt(seconds: float) -> str:
    """"50 s", "12 min", "3.5 h", "40 days"."""
    for unit, size in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            number = seconds / size
            return f"{number:,.0f} {unit}" if number >= 10 else f"{number:.1f} {unit}"
    return f"{seconds:.0f} s"
