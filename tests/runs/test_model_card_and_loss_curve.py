"""The loss curve and the model card of a run: well-formed, with the right figures."""

import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest

from lmcli.config import ModelConfig, TrainConfig
from lmcli.runs import loss_curve
from lmcli.runs.model_card import model_card
from lmcli.training.objectives import OBJECTIVES

SVG = "{http://www.w3.org/2000/svg}"


def metrics(steps: int, evaluations: int = 0) -> list[dict]:
    losses = [{"step": i, "elapsed": i / 2, "loss": 8.0 / (i + 1)} for i in range(steps)]
    return losses + [
        {"step": i, "elapsed": i * 5.0, "val_bits_per_byte": 3.0 - i / 4}
        for i in range(evaluations)
    ]


def lines(svg: str) -> list[list[tuple[float, float]]]:
    """The points of each curve."""
    return [
        [tuple(map(float, point.split(","))) for point in line.get("points").split()]
        for line in ElementTree.fromstring(svg).iter(SVG + "polyline")
    ]


@pytest.mark.parametrize("steps, evaluations", [(0, 0), (1, 0), (1, 1), (50, 4), (5000, 9)])
def test_every_run_gives_well_formed_svg_inside_its_frame(steps, evaluations):
    curves = lines(loss_curve.draw(metrics(steps, evaluations), "token", "val_bits_per_byte"))
    assert len(curves) == (steps > 0) + (evaluations > 0)
    for curve in curves:
        assert all(loss_curve.LEFT <= x <= loss_curve.WIDTH - loss_curve.RIGHT for x, _ in curve)
        assert all(loss_curve.TOP <= y <= loss_curve.HEIGHT - loss_curve.BOTTOM for _, y in curve)


def test_curves_fall_and_time_goes_right():
    for curve in lines(loss_curve.draw(metrics(50, 4), "token", "val_bits_per_byte")):
        assert all(b[0] > a[0] and b[1] >= a[1] for a, b in pairwise(curve))  # y grows downwards
        assert (
            curve[0][1] == loss_curve.TOP and curve[-1][1] == loss_curve.HEIGHT - loss_curve.BOTTOM
        )


def test_the_picture_of_a_long_run_is_small():
    svg = loss_curve.draw(metrics(100_000), "token", "val_bits_per_byte")
    assert len(lines(svg)[0]) <= loss_curve.POINTS and len(svg) < 20_000


def test_axes_name_their_units_and_ends():
    texts = [
        text.text
        for text in ElementTree.fromstring(
            loss_curve.draw(metrics(1201, 3), "token", "val_bits_per_byte")
        ).iter(SVG + "text")
    ]
    assert texts[:5] == ["0 min", "2.5 min", "5 min", "7.5 min", "10 min"]
    assert "training loss (nats per token)" in texts and "validation (bits per byte)" in texts
    assert "3.00" in texts and "2.50" in texts  # highest and lowest evaluation


RESULT = {
    "seconds": 61.4,
    "steps": 1234,
    "tokens": 5_000_000,
    "epochs": 2.5,
    "val_bytes": 9876,
    "val_tokens": 3210,
    "best_step": 1200,
    "context": 64,
    "stride": 32,
    "val_bits_per_byte": 1.23456,
    "val_bits_per_character": 1.5,
    "val_perplexity": 12.3456,
}


def card(**changes) -> str:
    config = ModelConfig(vocab_size=512, max_position_embeddings=64)
    arguments = {
        "name": "stories",
        "config": config,
        "train": TrainConfig(),
        "parameters": 1_234_567,
        "architecture": "Qwen3ForCausalLM",
        "files": ["/data/a.txt"],
        "result": RESULT,
        "context_prefix": "<|endoftext|>",
        "objective": OBJECTIVES["causal"],
    }
    return model_card(**{**arguments, **changes})


def test_the_card_names_model_data_and_figures_with_their_counts():
    text = card()
    for part in (
        "# stories",
        "Qwen3ForCausalLM of 1,234,567 parameters",
        "1,234 steps",
        "5,000,000 tokens",
        "2.50 epochs",
        "61 s",
        "9,876 bytes, 3,210 tokens",
        "step 1,200",
        "| bits per byte | 1.2346 |",
        "| bits per character | 1.5000 |",
        "| perplexity per token | 12.346 |",
        "- `a.txt`",
        "begins with `<|endoftext|>`",
    ):
        assert part in text, part
    assert "/data" not in text  # where the files lay is nobody's business
    assert re.match(r"---\n(\w+: \S+\n)+---\n", text)  # front matter that the hub reads


def test_the_card_mentions_no_missing_prefix():
    assert "Every context begins" not in card(context_prefix="")


def test_a_card_lists_at_most_twenty_files():
    text = card(files=[f"/data/{i}.txt" for i in range(50)])
    assert text.count(".txt`") == 20 and "- …" in text
