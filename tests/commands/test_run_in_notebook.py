"""A run, looked at from Python."""

import base64
import json
import re

import pytest

import lmcli
from lmcli.errors import UserError


def test_a_run_has_its_figures_curve_and_model(trained):
    folder, _ = trained
    run = lmcli.Run(folder)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert run.metrics == [json.loads(line) for line in lines] and len(lines) >= 40
    assert run.recipe.model.hidden_size == 64 and run.result["steps"] == 40
    bits = run.result["val_bits_per_byte"]
    assert repr(run) == f"<lmcli.Run {folder}: 40 steps, {bits:.4f} bits/byte>"
    html = run._repr_html_()
    picture = re.match(r'<img alt="" style="[^"]*" src="data:image/svg\+xml;base64,(.*?)">', html)
    assert base64.b64decode(picture[1]) == (folder / "loss.svg").read_bytes()
    assert f">{bits:.4g}</td>" in html
    ours, loaded = run.model(device="cpu"), lmcli.load(folder, device="cpu")
    assert ours.score("One two.") == loaded.score("One two.")


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        lmcli.Run(tmp_path)
