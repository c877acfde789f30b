"""What several folders of tests need: the real data beside the repository, small models with weights that matter."""

import os
import signal
from pathlib import Path

import hypothesis
import pytest

# as lm does: threads that spin long make a suite beside other work take ten times as long. Before torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
if "PYTEST_XDIST_WORKER" in os.environ:  # there is one for each core
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# many tests want the same bits from two ways, which only a processor gives; CUDA_VISIBLE_DEVICES=0 runs them on a GPU
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
ROOT = Path(__file__).resolve().parent.parent

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # started in the background of a script: without this no process of the suite would notice Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile("no deadline", deadline=None, max_examples=50)  # a busy machine is no failure
hypothesis.settings.load_profile("no deadline")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real texts, tokenizers and models beside the repository; without it the test is skipped."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}")
    return folder


@pytest.fixture(scope="session")
def difference():
    """difference(a, b) = ‖a − b‖ / ‖b‖ in float32."""
    def measure(a, b) -> float:
        assert a.shape == b.shape
        a, b = a.float().cpu(), b.float().cpu()
        return ((a - b).norm() / b.norm()).item()
    return measure


@pytest.fixture(scope="session")
def randomize():
    """randomize(module, seed) gives every weight a value that shows; fresh models start as the identity."""
    import torch

    def fill(module, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in module.parameters():
                noise = torch.randn(weight.shape, generator=generator)
                weight.copy_(1 + 0.2 * noise if weight.ndim == 1 else noise * weight.shape[1] ** -0.5)
        return module.eval()
    return fill


@pytest.fixture(scope="session")
def small_tokenizer():
    """A byte-level BPE of 400 ids, learnt from the generated stories; <|endoftext|> is id 0."""
    from lmcli.config import TokenizerConfig
    from lmcli.text.tokenizer import learn

    lines = (ROOT / "data" / "stories.txt").read_text(encoding="utf-8").splitlines()[:300]
    return learn(lines, TokenizerConfig(vocab_size=400))


@pytest.fixture(scope="session")
def small_model(randomize):
    """small_model(**config): one of our Transformers with random weights; without options 2 layers, context 32."""
    from lmcli.config import ModelConfig
    from lmcli.model.transformer import Transformer

    def build(seed: int = 0, **options) -> Transformer:
        sizes = {"vocab_size": 401, "max_position_embeddings": 32, "hidden_size": 32, "num_hidden_layers": 2,
                 "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 0}
        return randomize(Transformer(ModelConfig(**{**sizes, **options}).complete()), seed)
    return build
