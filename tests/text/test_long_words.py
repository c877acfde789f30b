"""Learning a vocabulary from what is no text: words of any length, signals, a deadline."""

import os
import random
import signal
import threading
import time

import pytest
from tokenizers import Tokenizer as Core
from tokenizers import models, pre_tokenizers, trainers

from lmcli.config import TokenizerConfig
from lmcli.data import corpus
from lmcli.data.documents import DocumentFormat, survey
from lmcli.errors import UserError
from lmcli.text import tokenizer as tokenizers
from lmcli.text.interruptible import DeadlineExceeded, run_in_thread
from lmcli.text.splitting import LONGEST_WORD, split_long_words

GENERATOR = random.Random(0)
LONG = {
    "one letter": "a" * 2_000_000,
    "spaces": " " * 2_000_000,
    "line ends": "\n" * 2_000_000,
    "DNA": "".join(GENERATOR.choices("ACGT", k=500_000)),
    "digits": "".join(GENERATOR.choices("0123456789", k=500_000)),
    "rule": "-=" * 500_000,
    "underscores": "_" * 500_000,
    "Chinese": "".join(GENERATOR.choices([*map(chr, range(0x4E00, 0x4F01))], k=300_000)),
}


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_a_word_of_any_length_is_learned_from_in_seconds(text):
    """Before, the first of them took over nine minutes for 10 MB."""
    parts = list(split_long_words([text]))
    assert max(map(len, parts)) < 2 * LONGEST_WORD
    if len(set(text)) < 3:
        assert "".join(parts) == text[: len("".join(parts))]
    began = time.monotonic()
    tokenizer = tokenizers.learn([text], TokenizerConfig(vocab_size=600))
    assert time.monotonic() - began < 30
    assert tokenizer.decode(tokenizer.encode(text[:5000])) == text[:5000]


@pytest.mark.parametrize("pattern", ["gpt2", "qwen2"])
def test_a_vocabulary_of_text_is_the_trainers_own(pattern):
    """Words of up to 256 characters are learned from as the library does by itself."""
    words = ["Donaudampfschifffahrt" * 12, "本" * 250, "=" * 255, " " * 250 + "x", "it's 2024!"]
    texts = [" ".join(GENERATOR.choices(words, k=40)) for _ in range(30)]
    config = TokenizerConfig(vocab_size=500, pattern=pattern)
    core = Core(models.BPE())
    core.pre_tokenizer = tokenizers.learn(["a"], config).core.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    core.train_from_iterator(texts, trainer)
    assert tokenizers.learn(texts, config).core.get_vocab() == core.get_vocab()


class TestInterruption:
    def test_a_signal_ends_the_wait_for_a_library(self):
        """As Ctrl-C does: an exception in the main thread, while the thread works on."""
        release = threading.Event()
        timer = threading.Timer(0.2, _interrupt)
        timer.start()
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            run_in_thread(lambda items: release.wait(20), [])
        release.set()
        assert time.monotonic() - began < 10

    def test_nothing_more_is_read_after_the_deadline(self):
        fed, release = [], threading.Event()

        def work(items):
            for item in items:
                fed.append(item)
                release.wait(10)

        with pytest.raises(DeadlineExceeded):
            run_in_thread(work, range(5), time.monotonic() + 0.1)
        release.set()
        time.sleep(0.1)
        assert fed == [0]

    def test_errors_of_the_work_are_raised(self):
        with pytest.raises(UserError, match="bad"):
            run_in_thread(lambda items: list(items), _failing())
        assert run_in_thread(sum, [1, 2, 3]) == 6

    def test_time_ends_the_learning(self, tmp_path, monkeypatch):
        (tmp_path / "a.txt").write_text("some words of text\n" * 999)
        doc_format, config = DocumentFormat(), TokenizerConfig(vocab_size=300)
        documents = survey([str(tmp_path / "a.txt")], doc_format).documents
        monkeypatch.setattr("lmcli.data.documents.PIECE_CHARS", 100)
        notes = []
        learned = corpus.learn_tokenizer(
            documents, doc_format, config, notes.append, deadline=time.monotonic() + 60
        )
        assert 257 < learned.size <= 300
        monkeypatch.setattr(corpus, "LEARNING_SHARE", 0)
        corpus.learn_tokenizer(
            documents, doc_format, config, notes.append, deadline=time.monotonic() + 60
        )
        assert any("the vocabulary is learned from the first" in note for note in notes)
        with pytest.raises(UserError, match="the time was over") as caught:
            corpus.learn_tokenizer(
                documents, doc_format, config, notes.append, deadline=time.monotonic() - 1
            )
        assert caught.value.where == "--time" and "--tokenizer" in caught.value.hint


def _interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def _failing():
    yield 1
    raise UserError("bad")
