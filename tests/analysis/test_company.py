"""Processes that train beside the one that is measured: at work only while they are to be, and gone when it is."""

import multiprocessing
import time
from pathlib import Path

import pytest

from lmcli.analysis.company import Company
from lmcli.errors import UserError
from lmcli.model.device import place
from lmcli.recipes import resolve

RECIPE = resolve("tiny", ("model.hidden_size=16", "model.num_hidden_layers=1", "model.num_attention_heads=1",
                          "tokenizer.vocab_size=300", "train.context=16", "train.batch_tokens=16"), {"steps": 1})


@pytest.fixture
def company():
    """A Company of one; whatever it has started has ended afterwards."""
    yield Company(1, place("cpu", "float32"))
    for member in multiprocessing.active_children():
        member.terminate()
        member.join()


def used(member) -> int:
    """Clock ticks that a process has computed."""
    fields = Path(f"/proc/{member.pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="what a process has used is read in /proc")
def test_it_works_inside_the_block_and_waits_outside(company):
    for _ in range(2):  # the same process both times
        with company.working(RECIPE):
            (member,) = multiprocessing.active_children()
            before, until = used(member), time.monotonic() + 60
            while used(member) < before + 5:
                assert time.monotonic() < until
                time.sleep(0.05)
        before = used(member)
        time.sleep(0.2)
        assert used(member) <= before + 1


def test_one_that_was_killed_is_told(company):
    told = pytest.raises(UserError, match="--nproc: a process that was to train beside this one has ended")
    with told, company.working(RECIPE):
        (member,) = multiprocessing.active_children()
        member.kill()
        member.join()


def test_it_ends_when_the_one_it_was_for_is_gone(company):
    with company.working(RECIPE):
        (member,) = multiprocessing.active_children()
        for pipe in company._pipes:
            pipe.close()
        member.join(60)
        assert member.exitcode == 0
        company._pipes.clear()
