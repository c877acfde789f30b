"""One small trained run for all command tests, and functions that run `lm`."""

import os
import shutil
import subprocess
import sys
from multiprocessing import forkserver
from pathlib import Path

import pytest

from lmcli.commands import run
from lmcli.kernels import build
from lmcli.runs import changes
from lmcli.storage import cache_folder

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the forked processes import it, too
from drawn_screen import InProcess, Screen, Terminal
from forked import LmPopen

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "--preset",
    "tiny",
    "--set",
    "model.hidden_size=64",
    "--set",
    "model.num_hidden_layers=2",
    "--set",
    "tokenizer.vocab_size=512",
    "--set",
    "train.context=64",
    "--set",
    "train.batch_tokens=512",
    "--set",
    "train.sample_every=1000000",
)


@pytest.fixture(scope="session")
def environment(tmp_path_factory) -> dict:
    """The environment of every `lm`: its own cache, one thread, no default model."""
    variables = {key: value for key, value in os.environ.items() if key != "LM_MODEL"}
    cache = tmp_path_factory.mktemp("cache")
    if build.library():  # to compile it takes ten seconds
        (cache / "kernels").mkdir(0o700)
        shutil.copy2(build._library_file(), cache / "kernels")
    changes.code()  # takes a second
    shutil.copytree(cache_folder("code"), cache / "code")
    return {**variables, "LM_CACHE": str(cache), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session", autouse=True)
def forked():
    """Processes of `lm` are forked from one that has imported torch."""
    with pytest.MonkeyPatch.context() as patch:
        if sys.platform == "linux":
            patch.setenv("OMP_NUM_THREADS", "1")  # read when torch is imported
            forkserver.ensure_running()
            patch.undo()
        patch.setattr(subprocess, "Popen", LmPopen)
        yield


@pytest.fixture(scope="session")
def lm(environment):
    """lm(*arguments, stdin=b"", **options): the finished process, its output as bytes."""

    def call(*arguments, stdin: bytes = b"", **options) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "lmcli", *map(str, arguments)]
        return subprocess.run(
            command, input=stdin, capture_output=True, env=environment, timeout=120, **options
        )

    return call


@pytest.fixture
def terminal(environment):
    """terminal(*arguments, columns=80, rows=24, **options): a running `lm` on a `Terminal`."""
    running = []

    def call(*arguments, variables: dict | None = None, **options) -> Terminal:
        running.append(Terminal(arguments, {**environment, **(variables or {})}, **options))
        return running[-1]

    yield call
    for one in running:
        one.close()


@pytest.fixture
def screen(terminal):
    """screen(*arguments, **options): what a `Terminal` shows when `lm` has ended."""

    def call(*arguments, **options) -> Screen:
        return terminal(*arguments, **options).read()

    return call


@pytest.fixture
def drawn(environment, monkeypatch):
    """drawn(*arguments, columns=80): what a terminal shows of `lm` in this process; fast."""
    monkeypatch.setenv("LM_CACHE", environment["LM_CACHE"])
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("LM_MODEL", "COLUMNS", "LINES", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)

    def call(*arguments, columns=80) -> Screen:
        return InProcess(run, columns).draw(*arguments)

    return call


@pytest.fixture
def inside(environment, monkeypatch, capfdbinary, tmp_path):
    """inside(*arguments, stdin=b""): as `lm`, but fast, in this process; no signals or pipes."""
    monkeypatch.setenv("LM_CACHE", environment["LM_CACHE"])
    monkeypatch.delenv("LM_MODEL", raising=False)

    def call(*arguments, stdin: bytes = b"") -> subprocess.CompletedProcess:
        typed = tmp_path / "stdin"
        typed.write_bytes(stdin)
        with typed.open() as handle, monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", handle)
            code = run([*map(str, arguments)])
        sys.stdout.flush()
        return subprocess.CompletedProcess(arguments, code, *capfdbinary.readouterr())

    return call


@pytest.fixture
def piped(environment):
    """piped(count, *arguments, line=""): `yes LINE | lm ARGUMENTS | head -COUNT`.

    Returns the finished process; its output is the lines that were read.
    """

    def call(count, *arguments, line: str = "") -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "lmcli", *map(str, arguments)]
        with subprocess.Popen(["yes", line], stdout=subprocess.PIPE) as source:
            process = subprocess.Popen(
                command,
                stdin=source.stdout,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment,
            )
            read = b"".join(process.stdout.readline() for _ in range(count))
            process.stdout.close()
            errors = process.stderr.read()
            process.wait(60)
            process.stderr.close()
            source.kill()
        return subprocess.CompletedProcess(command, process.returncode, read, errors)

    return call


@pytest.fixture(scope="session")
def story(tmp_path_factory) -> Path:
    """A text file of about 120 kB with several documents."""
    path = tmp_path_factory.mktemp("text") / "story.txt"
    text = (ROOT / "data" / "stories.txt").read_text(encoding="utf-8")[:120_000]
    path.write_text(text.rpartition("<|endoftext|>")[0], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def trained(lm, story, tmp_path_factory):
    """(run folder, the process that trained it): 40 steps of a very small model."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    done = lm("train", story, "-o", folder, *SMALL, "--steps", 40)
    assert done.returncode == 0, done.stderr.decode()
    return folder, done


@pytest.fixture(scope="session")
def chat_model(small_model, small_tokenizer, tmp_path_factory):
    """A random model with a chat template; its context is long."""
    from lmcli.checkpoints import folder
    from lmcli.config import GenerateConfig
    from lmcli.text.chat_template import DEFAULT_TEMPLATE
    from lmcli.text.tokenizer import Tokenizer

    path = tmp_path_factory.mktemp("chat")
    settings = {**small_tokenizer.settings, "chat_template": DEFAULT_TEMPLATE}
    model = small_model(max_position_embeddings=8192, vocab_size=small_tokenizer.size)
    defaults = GenerateConfig(temperature=0.0, max_new_tokens=6)
    folder.save(path, model, Tokenizer(small_tokenizer.core, settings), defaults)
    return path


@pytest.fixture(scope="session")
def marian(tmp_path_factory, small_tokenizer):
    """A small Marian model of transformers; its generation_config.json has 3 beams."""
    import torch
    from tokenizers import processors
    from transformers import MarianConfig, MarianMTModel

    from lmcli.text.tokenizer import Tokenizer

    folder = tmp_path_factory.mktemp("marian")
    torch.manual_seed(0)
    model = MarianMTModel(
        MarianConfig(
            vocab_size=410,
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            max_position_embeddings=32,
            pad_token_id=409,
            eos_token_id=0,
            decoder_start_token_id=409,
            init_std=0.6,
        )
    )
    model.generation_config.update(
        num_beams=3, max_length=12, bad_words_ids=[[409]], forced_eos_token_id=0
    )
    model.save_pretrained(folder)
    words = Tokenizer(type(small_tokenizer.core).from_str(small_tokenizer.core.to_str()))
    words.core.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    words.save(folder)
    return folder


@pytest.fixture(scope="session")
def berts(tmp_path_factory, shared):
    """Folders of small random BERTs with MiniLM's tokenizer, each with another head."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("berts")
    torch.manual_seed(0)
    for name, kind in (
        ("masked", transformers.BertForMaskedLM),
        ("labels", transformers.BertForSequenceClassification),
        ("answers", transformers.BertForQuestionAnswering),
        ("bare", transformers.BertModel),
    ):
        kind(
            transformers.BertConfig(
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=16,
                max_position_embeddings=24,
            )
        ).save_pretrained(folder / name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(shared / "tokenizers" / "bert-minilm" / file, folder / name)
    return folder


@pytest.fixture
def stopped_after_five(inside, monkeypatch):
    """stopped_after_five(*arguments): `inside`, a run that stops after its fifth step."""
    from lmcli.training import loop

    events = loop.Trainer.events

    def stop(trainer):
        for event in events(trainer):
            if isinstance(event, loop.Step):
                trainer.stop = event.step == 5
            yield event

    def call(*arguments) -> subprocess.CompletedProcess:
        with monkeypatch.context() as patched:
            patched.setattr(loop.Trainer, "events", stop)
            return inside(*arguments)

    return call
