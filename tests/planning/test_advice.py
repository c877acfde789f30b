"""The sentence of advice for a plan."""

import dataclasses

import pytest

from lmcli.planning.advice import _duration, advise
from lmcli.planning.plan import Plan

PLAN = Plan(
    "tiny",
    parameters=10**6,
    vocabulary=1024,
    context=128,
    batch_tokens=8192,
    micro_batch_tokens=2048,
    text_bytes=10**6,
    text_tokens=500_000,
    steps=250,
    tokens=2_048_000,
    epochs=4.1,
    tokens_per_parameter=2.05,
    flops=1e13,
    weights=4_000_000,
    gradients=4_000_000,
    optimizer=5_000_000,
    activations=60_000_000,
    process=400_000_000,
    memory=473_000_000,
    machine_memory=10**10,
    tokens_per_second=20_000.0,
    seconds=100.0,
    bits_per_byte=2.1,
)


def advice_for(**changes):
    other = dataclasses.replace(PLAN, preset="other", bits_per_byte=2.5, **changes)
    plans, best = advise([PLAN, other])
    assert best == "take tiny: about 2.1 bits per byte in 100 s"
    return plans[1].advice


def test_advice():
    assert advise([PLAN])[0][0].advice == "text, model and budget fit together"
    assert advice_for() == "text, model and budget fit together, but tiny is expected to be better"
    assert (
        advice_for(epochs=320.0)
        == "this needs 40 times the text, which is read 320 times; take tiny"
    )
    assert (
        advice_for(tokens_per_parameter=0.25)
        == "a model of this size needs 4.0 times the time; take tiny"
    )
    assert advice_for(epochs=0.1) == "reads 10% of your text; one epoch takes 17 min; take tiny"
    assert advice_for(steps=0) == "the time is over before the first step; take tiny"
    assert (
        advice_for(memory=2 * 10**10, weights=2 * 10**10)
        == "needs 20.0 GB of memory, the machine has 10.0 GB; take tiny"
    )
    assert advice_for(memory=12 * 10**9, activations=8 * 10**9) == (
        "needs 12.0 GB of memory, the machine has 10.0 GB; --set train.micro_batch_tokens=1280 fits"
    )
    assert advise([dataclasses.replace(PLAN, steps=0)])[1].startswith(
        "none of these can be trained here"
    )


@pytest.mark.parametrize(
    "seconds, text",
    [(50, "50 s"), (300, "5.0 min"), (4000, "67 min"), (9000, "2.5 h"), (10**6, "12 days")],
)
def test_durations_in_words(seconds, text):
    assert _duration(seconds) == text
