"""Compares how fast a text becomes a token cache with plain loops around the tokenizers library.

python tests/benchmarks/tokenizing_beside_encode_batch.py TEXT [--megabytes 40] [--rounds 5]
    [--vocab-size 8192] [--batch 1000] [--tokenizer FOLDER]

TEXT is repeated up to that many MB. In each round all methods take turns in one process with all
cores, so other load slows all alike:

- `corpus.build`, as in `lm train`: reads, cuts and checks the text, flushes to disk, renames;
- `Tokenizer.encode_batch` on lines, 1,000 at a time, with the ids added to an array;
- the same on stretches of 32,000 characters, cut where no token spans the cut. This must give the
  ids of `corpus.build`.

Prints median MB/s and the ratios of the rounds.
"""

import argparse
import array
import hashlib
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import tokenizers as library

from lmcli.config import TokenizerConfig
from lmcli.data import corpus, documents
from lmcli.data.byte_ranges import Document
from lmcli.text import tokenizer

PLAIN_TEXT = documents.DocumentFormat(format="text")


def lines(file: Path) -> Iterator[str]:
    """The lines of a file with their line ends."""
    with file.open(encoding="utf-8", newline="\n") as handle:
        yield from handle


def stretches(file: Path) -> Iterator[str]:
    """The text of a file in pieces of about 32,000 characters."""
    before, documents.PIECE_CHARS = documents.PIECE_CHARS, 1 << 15
    try:
        whole = Document(str(file), 0, file.stat().st_size)
        for piece in documents.read_pieces([whole], PLAIN_TEXT):
            yield piece.text
    finally:
        documents.PIECE_CHARS = before


def encode_plainly(core: library.Tokenizer, texts: Iterator[str], batch: int) -> array.array:
    """The ids of texts by the usual loop, `batch` texts at a time."""
    ids = array.array("I")
    while chunk := list(islice(texts, batch)):
        for encoding in core.encode_batch(chunk, add_special_tokens=False):
            ids.extend(encoding.ids)
    return ids


def build_corpus(
    file: Path, learned: tokenizer.Tokenizer, hashes: dict[str, str], cache: Path
) -> corpus.Corpus:
    """The token cache of a file, built anew."""
    shutil.rmtree(cache, ignore_errors=True)
    os.environ["LM_CACHE"] = str(cache)
    whole = [Document(str(file), 0, file.stat().st_size)]
    return corpus.build(whole, hashes, PLAIN_TEXT, learned, None)


def write_repeated(source: Path, target: Path, megabytes: float) -> None:
    """Writes the text of `source` repeatedly, up to that many MB."""
    text = source.read_bytes()
    with target.open("wb") as out:
        while out.tell() < megabytes * 1e6:
            out.write(text)


def measure(
    methods: dict[str, Callable[[], Any]], rounds: int, megabytes: float
) -> dict[str, list[float]]:
    """Seconds of each method in each round; prints the rounds and checks that ids are equal."""
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for i in range(rounds + 1):
        ids = {}
        for name, method in methods.items():
            started = time.perf_counter()
            ids[name] = method()
            if i:  # the first round warms the library's caches
                seconds[name].append(time.perf_counter() - started)
        equal = ids["corpus.build"].ids.tolist() == ids["encode_batch, stretches"].tolist()
        assert equal, "ids differ"
        speeds = [
            f"{name} {megabytes / times[-1]:.2f} MB/s" for name, times in seconds.items() if i
        ]
        print(f"round {i}", *speeds, sep="  ", flush=True)
    return seconds


def main() -> None:
    """Runs the rounds and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path)
    parser.add_argument("--megabytes", type=float, default=40.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument(
        "--batch", type=int, default=1000, help="lines per encode_batch; stretches: a 16th of it"
    )
    parser.add_argument(
        "--tokenizer", type=Path, help="folder of a tokenizer, instead of one learned from TEXT"
    )
    options = parser.parse_args()
    if options.tokenizer:
        learned = tokenizer.load(options.tokenizer)
    else:
        texts = [options.text.read_text(encoding="utf-8")]
        learned = tokenizer.learn(texts, TokenizerConfig(vocab_size=options.vocab_size))
    core: Any = learned.core
    stretches_per_batch = max(1, options.batch // 16)
    with tempfile.TemporaryDirectory() as folder:
        file, cache = Path(folder) / "text.txt", Path(folder) / "cache"
        write_repeated(options.text, file, options.megabytes)
        with file.open("rb") as handle:
            hashes = {str(file): hashlib.file_digest(handle, "sha256").hexdigest()}
        megabytes = file.stat().st_size / 1e6
        methods = {
            "corpus.build": lambda: build_corpus(file, learned, hashes, cache),
            "encode_batch, lines": lambda: encode_plainly(core, lines(file), options.batch),
            "encode_batch, stretches": lambda: encode_plainly(
                core, stretches(file), stretches_per_batch
            ),
        }
        seconds = measure(methods, options.rounds, megabytes)
    print(f"\n{megabytes:.0f} MB, {os.cpu_count()} cores, vocabulary {learned.size:,}, ids equal")
    for name, times in seconds.items():
        ratios = sorted(other / build for other, build in zip(times, seconds["corpus.build"]))
        print(
            f"{name:26}{megabytes / statistics.median(times):8.2f} MB/s   corpus.build is × "
            f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} – {ratios[-1]:.2f}) as fast"
        )


if __name__ == "__main__":
    main()
