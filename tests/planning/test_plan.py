"""lm plan: budgets in steps, probes of large models, memory. No test asserts a speed."""

import dataclasses

import pytest
import torch

from lmcli.config import TokenizerConfig
from lmcli.data.documents import DocumentFormat
from lmcli.errors import UserError
from lmcli.model import flops
from lmcli.model.device import select_device
from lmcli.model.memory import HOLES, PRODUCT_CODE
from lmcli.planning import plan
from lmcli.planning.expected_quality import expected_bits_per_byte, rounded
from lmcli.planning.plan import Planner
from lmcli.recipes import resolve

SMALL = (
    "model.hidden_size=32",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "train.context=16",
    "train.batch_tokens=64",
    "tokenizer.vocab_size=300",
)


def silent(text):
    pass


@pytest.fixture
def story(tmp_path):
    file = tmp_path / "story.txt"
    file.write_text("".join(f"The baker of number {i} went home and slept.\n" for i in range(500)))
    return file


def planned_text(file, recipe=None):
    return plan.read_text(
        (str(file),), (), DocumentFormat(), None, recipe or resolve("tiny", SMALL), silent
    )


@pytest.fixture
def planner(story, monkeypatch):
    monkeypatch.setattr(plan, "SECONDS", 0.01)
    return Planner(planned_text(story), select_device("cpu", "float32"))


@pytest.mark.parametrize(("dtype", "more"), [("float32", 0), ("bfloat16", 1)])
def test_rows_of_many_lengths_take_memory_in_bfloat16(dtype, more, tmp_path, monkeypatch):
    """Measured with preset translate: 880 MB where batches of one shape take 681."""
    monkeypatch.setattr(plan, "SECONDS", 0.01)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Was it so?", "completion": "It was."}\n' * 60)
    planner = Planner(planned_text(rows), select_device("cpu", dtype))
    planned = planner.plan("tiny", resolve("tiny", SMALL))
    besides = planned.process - planner.process - 2 * planned.text_tokens
    assert besides == more * (PRODUCT_CODE + int(HOLES * planned.activations))


def test_the_text_is_split_as_in_training(story):
    text = planned_text(story)
    whole = story.stat().st_size
    assert text.documents == 1 and text.bytes + text.validation_bytes == whole
    assert text.bytes == pytest.approx(0.9 * whole, rel=0.02)
    assert (
        "".join(text.sample) == story.read_text()[: text.bytes]
    )  # small enough to be its own sample
    assert 0.1 < text.xz_bits < 2


@pytest.mark.parametrize(
    "content, message", [(b"", "no text"), (b"\xff\xfe" * 90, "UTF-8"), (b"\n \n", "no text")]
)
def test_data_without_text_is_an_error(tmp_path, content, message):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        planned_text(tmp_path / "a.txt")


def test_a_plan_of_steps(planner):
    recipe = resolve("tiny", SMALL, {"steps": 10})
    plan = planner.plan("tiny", recipe)
    config = dataclasses.replace(
        recipe.model, vocab_size=plan.vocabulary, max_position_embeddings=16
    ).complete()
    assert plan.parameters == flops.parameters(config).total and 256 < plan.vocabulary <= 300
    assert (plan.steps, plan.tokens, plan.batch_tokens, plan.micro_batch_tokens, plan.context) == (
        10,
        640,
        64,
        64,
        16,
    )
    assert plan.flops == 640 * flops.training_flops_per_token(config, 16)
    assert (
        plan.epochs == 640 / plan.text_tokens and plan.tokens_per_parameter == 640 / plan.parameters
    )
    assert (
        plan.memory
        == plan.process + plan.weights + plan.gradients + plan.optimizer + plan.activations
    )
    assert (
        plan.weights == 4 * plan.parameters
        and plan.process > 1 << 24
        and plan.machine_memory > plan.memory
    )
    assert plan.tokens_per_second > 0 and plan.seconds > 0 and 0 < plan.bits_per_byte <= 8


def test_the_number_of_tokens_is_close_to_a_real_tokenizers(planner, story):
    from lmcli.text.tokenizer import learn

    text = story.read_text()[: planner.text.bytes]
    plan = planner.plan("tiny", resolve("tiny", SMALL, {"epochs": 1}))
    ids = learn([text], TokenizerConfig(vocab_size=300)).encode(text)
    assert plan.text_tokens == pytest.approx(len(ids) + 1, rel=0.01)  # and the closing token
    assert plan.epochs == pytest.approx(1, abs=0.02) and plan.steps == -(
        -(plan.text_tokens // 16) // 4
    )


@pytest.mark.parametrize("preset", ["encoder-small", "seq2seq-small"])
def test_other_shapes_have_no_bits_per_byte(planner, preset):
    plan = planner.plan(preset, resolve(preset, SMALL[:5], {"steps": 2}))
    assert plan.bits_per_byte is None and plan.steps == 2 and plan.memory > plan.process


def steps(train, sets=(), before=3.0, times=8, step_tokens=2048, text_tokens=100_000):
    recipe, pauses = resolve("tiny", sets, train), plan.Pauses(times, 0.5, 0.25)
    return plan._steps(recipe.train, 2.048 + 0.1, step_tokens, text_tokens, before, pauses)


def test_steps_and_seconds_of_each_budget():
    step = 2.048 + 0.1
    assert steps({"steps": 100}) == (100, pytest.approx(3 + 100 * step + 8 * 0.75))
    assert steps({"steps": 100}, ("train.eval_every=50",)) == (
        100,
        pytest.approx(3 + 100 * step + 2 * 0.5 + 8 * 0.25),
    )
    assert steps({"steps": 100}, times=3)[1] == pytest.approx(3 + 100 * step + 3 * 0.5 + 8 * 0.25)
    assert steps({"steps": 3}) == (3, pytest.approx(3 + 3 * step + 3 * 0.75))
    assert steps({"tokens": 10_000})[0] == 5  # the last one is whole
    assert steps({"epochs": 2})[0] == -(-2 * (100_000 // 128) // 16)
    assert steps({"epochs": 2, "steps": 7})[0] == 7
    count, seconds = steps({"time": 600.0})
    assert seconds == 600 and count == int((600 - 3 - 8 * 0.75) / step)
    assert steps({"time": 600.0, "steps": 5}) == (5, pytest.approx(3 + 5 * step + 5 * 0.75))
    assert steps({"time": 2.0}) == (0, 2.0)  # too short for one step


@pytest.mark.parametrize(
    "preset, sets, max_flops, expected",
    [
        ("tiny", (), 1e12, [(4, 2048)]),
        ("tiny", ("train.micro_batch_tokens=1024",), 1e12, [(4, 1024)]),
        ("small", ("train.batch_tokens=65536",), 1e12, [(6, 16384)]),
        ("base", (), 1e12, [(1, 6144), (3, 6144)]),
        ("base", (), 1e9, [(1, 1024), (3, 1024)]),
        ("seq2seq-small", (), 1e9, [(3, 128)]),
    ],
)
def test_a_large_model_is_measured_with_few_layers(preset, sets, max_flops, expected):
    recipe = resolve(preset, sets)
    config = dataclasses.replace(
        recipe.model,
        vocab_size=recipe.tokenizer.vocab_size,
        max_position_embeddings=recipe.train.context,
    ).complete()
    recipe = dataclasses.replace(recipe, model=config)
    rows = (
        min(recipe.train.batch_tokens, plan.micro_batch(recipe, torch.device("cpu")))
        // recipe.train.context
    )
    probes = plan._probes(recipe, max(1, rows) * recipe.train.context, max_flops)
    assert [
        (probe.model.num_hidden_layers, probe.train.batch_tokens) for probe in probes
    ] == expected
    assert all(probe.model.hidden_size == config.hidden_size for probe in probes)


def test_more_text_helps_and_repeated_text_helps_less():
    def bits(text, read, body=1e6):
        return expected_bits_per_byte(2.6, text, read, int(body))

    assert bits(1e6, 1e5) > bits(1e6, 1e6) > bits(1e6, 4e6) > 0
    assert bits(1e6, 1e8) > bits(1e8, 1e8)
    assert bits(1e6, 1e8) == pytest.approx(bits(1e6, 1e9), rel=0.01)
    assert bits(1e6, 1.0) <= 8
    assert rounded(2.1234) == 2.1 and rounded(None) is None
