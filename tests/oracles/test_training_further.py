"""A training step from every checkpoint family and head, against gradients of transformers."""

import pytest
import torch
import transformers
from random_checkpoints import CASES, batch, difference, forward, logits, pair

from lmcli.checkpoints import folder as checkpoints
from lmcli.checkpoints.config_json import family_of
from lmcli.checkpoints.weights import join_tensors, stored_tensors
from lmcli.config import TrainConfig
from lmcli.runs import initial_model
from lmcli.training import optimizers, resume_state

BOUND = 1e-4
TRAIN = TrainConfig(optimizer="adamw", learning_rate=1e-3, weight_decay=0.0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_from_a_folder_is_one_of_transformers(case, tmp_path):
    transformers.logging.set_verbosity_error()
    both = pair(case, tmp_path, checkpoints.load)
    checkpoint, ours, theirs = both.checkpoint, both.ours, both.theirs
    initial_model.set_trainable(ours, TRAIN)
    inputs = batch(case, "none", theirs.config)
    made, wanted = forward(ours, inputs), logits(theirs(**inputs))
    towards = torch.randn(made.shape, generator=torch.Generator().manual_seed(0))
    (made * towards).sum().backward()
    (wanted.view(made.shape) * towards).sum().backward()

    gradients = {
        name: parameter.grad
        for name, parameter in theirs.named_parameters(remove_duplicate=False)
        if parameter.grad is not None
    }
    largest = max(gradient.norm() for gradient in gradients.values())
    compared = 0
    for name, own, layout in stored_tensors(family_of(ours.config), ours):
        found = [ours.get_parameter(part).grad for part in own]
        if name in gradients and all(part is not None for part in found):
            if layout != "less_one":  # a gradient is that of the weight itself
                found = join_tensors(found, layout, ours.config.num_attention_heads)
            else:
                (found,) = found
            expected = gradients[name]
            # that of a key's bias is 0 but for rounding
            assert (
                difference(found, expected) <= BOUND or (found - expected).norm() <= BOUND * largest
            ), name
            compared += 1
    assert compared >= 0.9 * len(gradients)

    before = {name: parameter.detach().clone() for name, parameter in ours.named_parameters()}
    optimizer = optimizers.build(ours, TRAIN)
    optimizer.step()
    for name, parameter in ours.named_parameters():
        if parameter.grad is not None:  # the first update of Adam: by the sign of the gradient
            expected = before[name] - 1e-3 * parameter.grad / (parameter.grad.abs() + 1e-8)
            torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-6)
    resume_state.save(tmp_path, resume_state.Counters(step=1), ours, optimizer)
    checkpoints.save(both.folder, ours, checkpoint.tokenizer, checkpoint.generate)
    again = type(theirs).from_pretrained(both.folder).eval()
    with torch.inference_mode():
        assert difference(forward(ours.eval(), inputs), logits(again(**inputs))) <= 1e-5
