"""The sentence that a plan is told with."""

import dataclasses

import pytest

from lmcli.analysis import advice
from lmcli.analysis.planning import Plan

PLAN = Plan("tiny", parameters=10**6, vocabulary=1024, context=128, batch_tokens=8192, micro_batch_tokens=2048,
            text_bytes=10**6, text_tokens=500_000, steps=250, tokens=2_048_000, epochs=4.1, tokens_per_parameter=2.05,
            flops=1e13, weights=4_000_000, gradients=4_000_000, optimizer=5_000_000, activations=60_000_000,
            process=400_000_000, memory=473_000_000, machine_memory=10**10, tokens_per_second=20_000.0, seconds=100.0,
            bits_per_byte=2.1)


def told(**changes):
    other = dataclasses.replace(PLAN, preset="other", bits_per_byte=2.5, **changes)
    plans, best = advice.advise([PLAN, other])
    assert best == "take tiny: about 2.1 bits per byte in 100 s"
    return plans[1].advice


def test_advice():
    assert advice.advise([PLAN])[0][0].advice == "text, model and budget go together"
    assert told() == "text, model and budget go together, but tiny is expected to do better"
    assert told(epochs=320.0) == "your text is 40 × too small for this: it is read 320 times; take tiny"
    assert told(tokens_per_parameter=0.25) == "there is 4.0 × too little time for a model of this size; take tiny"
    assert told(epochs=0.1) == "reads 10% of your text; all of it would take 17 min; take tiny"
    assert told(steps=0) == "the time is over before the first step; take tiny"
    assert told(memory=2 * 10**10, weights=2 * 10**10) == \
        "needs 20.0 GB of memory, 10.0 GB are there; take tiny"
    assert told(memory=12 * 10**9, activations=8 * 10**9) == \
        "needs 12.0 GB of memory, 10.0 GB are there; --set train.micro_batch_tokens=1280 fits"
    assert advice.advise([dataclasses.replace(PLAN, steps=0)])[1].startswith("none of these can be trained here")


@pytest.mark.parametrize("seconds, said", [(50, "50 s"), (300, "5.0 min"), (4000, "67 min"), (9000, "2.5 h"),
                                           (10**6, "12 days")])
def test_durations_in_words(seconds, said):
    assert advice._spelt(seconds) == said
