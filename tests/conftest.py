"""Fixtures for several folders: real data, small models with random weights."""

import functools
import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest

# as lm does, before torch is loaded: spinning threads slow down a busy machine 10 times
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
if "PYTEST_XDIST_WORKER" in os.environ:  # one worker per core
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# many tests require bit-equality, which only a CPU gives; CUDA_VISIBLE_DEVICES=0 runs them on a GPU
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
ROOT = Path(__file__).resolve().parent.parent
# what pytest makes of 40,000 lines is kept for the other workers and for the next run
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
sys.path.insert(0, str(ROOT / "tests"))  # for forked.py and drawn_screen.py

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # started in the background of a script, which ignores SIGINT: tests send Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.fsync = lambda handle: None  # it takes a third of a short run, and no test cuts the power


def pytest_configure(config):
    """Compiles the kernels beside the collection; every worker would wait for the first one."""
    if config.getoption("numprocesses", None):
        code = "from lmcli.kernels import build; build.library()"
        config.compiling = subprocess.Popen([sys.executable, "-c", code])


def pytest_collectstart(collector):
    """Lets every other worker begin at the end: each finds compiled what another has read."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    if isinstance(collector, pytest.Dir) and worker % 2:
        forwards = collector.collect
        collector.collect = lambda: reversed([*forwards()])


LONG_FILES = ("oracles", "commands", "kernels", "generation", "training", "distributed")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """The same order in all workers, long files first: at the end no worker waits for another."""

    def place(item):
        room = item.path.parent.name
        return LONG_FILES.index(room) if room in LONG_FILES else len(LONG_FILES), item.path

    items.sort(key=place)


def pytest_collection_finish():
    """Searches for garbage rarely (6 % of all time) and not in what was imported."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


# a busy machine is no failure
hypothesis.settings.register_profile("no deadline", deadline=None, max_examples=50)
hypothesis.settings.load_profile("no deadline")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real texts, tokenizers and models; skips the test if it is absent."""
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
    """randomize(module, seed) gives every weight a random value (new models are the identity)."""
    import torch

    def fill(module, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in module.parameters():
                noise = torch.randn(weight.shape, generator=generator)
                weight.copy_(
                    1 + 0.2 * noise if weight.ndim == 1 else noise * weight.shape[1] ** -0.5
                )
        return module.eval()

    return fill


@pytest.fixture(scope="session")
def small_tokenizer():
    """A byte-level BPE of 400 ids, learned from the generated stories; <|endoftext|> is id 0."""
    from lmcli.config import TokenizerConfig
    from lmcli.text.tokenizer import learn

    lines = (ROOT / "data" / "stories.txt").read_text(encoding="utf-8").splitlines()[:300]
    return learn(lines, TokenizerConfig(vocab_size=400))


@pytest.fixture(scope="session")
def small_model(randomize):
    """small_model(**config): a Transformer with random weights; by default 2 layers, context 32."""
    from lmcli.config import ModelConfig
    from lmcli.kernels.fast_path import build_model
    from lmcli.model.transformer import Transformer

    def build(seed: int = 0, **options) -> Transformer:
        sizes = {
            "vocab_size": 401,
            "max_position_embeddings": 32,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }
        return randomize(build_model(ModelConfig(**{**sizes, **options}).complete()), seed)

    return build


@pytest.fixture(scope="session")
def decoder(small_model, small_tokenizer):
    """decoder(model, stop_ids, stop_strings, use_cache, bos, **options); greedy by default."""
    from lmcli.config import GenerateConfig
    from lmcli.generation.decoding import Decoder
    from lmcli.kernels.decoding_state import decoding_state, supports

    def build(
        model=None, stop_ids=(), stop_strings=(), use_cache=True, bos=(0,), **options
    ) -> Decoder:
        config = GenerateConfig(
            **{"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 20, **options}
        )
        model = model or small_model(max_position_embeddings=64, vocab_size=small_tokenizer.size)
        decoder = Decoder(
            model.config,
            functools.partial(decoding_state, model),
            small_tokenizer,
            list(bos),
            list(stop_ids),
            config,
            tuple(stop_strings),
            use_cache,
            extendable=supports(model),
        )
        decoder.model = model  # for the tests; it knows the model by its states only
        return decoder

    return build


@pytest.fixture(scope="session")
def twin(small_model, small_tokenizer, tmp_path_factory):
    """One of our models (context 32), and the same model as transformers loads it."""
    from transformers import AutoModelForCausalLM

    from lmcli.checkpoints import folder as checkpoints
    from lmcli.config import GenerateConfig

    folder = tmp_path_factory.mktemp("twin")
    model = small_model(vocab_size=small_tokenizer.size)
    checkpoints.save(folder, model, small_tokenizer, GenerateConfig())
    return model, AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="session")
def scorer(twin, small_tokenizer):
    """scorer(bos, **options): a Scorer of the first twin."""
    from lmcli.scoring.scorer import Scorer

    def build(bos=(0,), **options) -> Scorer:
        return Scorer(twin[0], small_tokenizer, list(bos), **options)

    return build
