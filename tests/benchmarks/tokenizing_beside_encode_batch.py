"""How fast a text becomes a token cache, beside plain loops around the tokenizers library.

python tests/benchmarks/tokenizing_beside_encode_batch.py TEXT [--megabytes 40] [--rounds 5] [--vocab-size 8192]
    [--batch 1000] [--tokenizer FOLDER]

TEXT is repeated until it has that many MB. In each round all take their turn, in one process with all cores, so noise hits
all alike: `corpus.build`, as `lm train` does it, with its reading, cutting, checking of what is there, flush to disk and
rename; `Tokenizer.encode_batch` over lines, a thousand at a time, the ids added to an array; and the same over stretches of
32,000 characters, cut where no token spans the cut, which gives the ids that ours gives. Ours must be equal to the latter.
Printed are MB/s, medians, and the ratio of each round.
"""

import argparse
import array
import hashlib
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import tokenizers as library

from lmcli.config import TokenizerConfig
from lmcli.text import corpus, documents, tokenizer
from lmcli.text.ranges import Document


def lines(file: Path) -> Iterator[str]:
    """The lines of a file with their ends."""
    with file.open(encoding="utf-8", newline="\n") as handle:
        yield from handle


def stretches(file: Path) -> Iterator[str]:
    """The text of a file in pieces of some 32,000 characters."""
    size, before = file.stat().st_size, documents.PIECE_CHARS
    documents.PIECE_CHARS = 1 << 15
    try:
        for piece in documents.Layout(format="text").pieces([Document(str(file), 0, size)]):
            yield piece.text
    finally:
        documents.PIECE_CHARS = before


def plain(core: library.Tokenizer, texts: Iterator[str], batch: int) -> array.array:
    """The loop that people write."""
    found = array.array("I")
    while some := list(islice(texts, batch)):
        for encoded in core.encode_batch(some, add_special_tokens=False):
            found.extend(encoded.ids)
    return found


def ours(file: Path, using: tokenizer.Tokenizer, hashes: dict[str, str], cache: Path) -> corpus.Corpus:
    """The token cache of a file, made anew."""
    shutil.rmtree(cache, ignore_errors=True)
    os.environ["LM_CACHE"] = str(cache)
    whole = [Document(str(file), 0, file.stat().st_size)]
    return corpus.build(whole, hashes, documents.Layout(format="text"), using, None)


def repeated(source: Path, target: Path, megabytes: float) -> None:
    """Writes the text of `source` again and again, until there are so many MB."""
    text = source.read_bytes()
    with target.open("wb") as out:
        while out.tell() < megabytes * 1e6:
            out.write(text)


def main() -> None:
    """Runs the rounds and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--megabytes", type=float, default=40.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=1000, help="lines of one encode_batch; stretches: a sixteenth of it")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer's folder, instead of one learnt from TEXT")
    options = parser.parse_args()
    using = tokenizer.load(options.tokenizer) if options.tokenizer else tokenizer.learn(
        [options.text.read_text(encoding="utf-8")], TokenizerConfig(vocab_size=options.vocab_size))
    with tempfile.TemporaryDirectory() as folder:
        file, cache = Path(folder) / "text.txt", Path(folder) / "cache"
        repeated(options.text, file, options.megabytes)
        with file.open("rb") as handle:
            hashes = {str(file): hashlib.file_digest(handle, "sha256").hexdigest()}
        size = file.stat().st_size / 1e6
        ways = {"corpus.build": lambda: ours(file, using, hashes, cache),
                "encode_batch, lines": lambda: plain(using.core, lines(file), options.batch),
                "encode_batch, stretches": lambda: plain(using.core, stretches(file), max(1, options.batch // 16))}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for i in range(options.rounds + 1):
            found = {}
            for name, way in ways.items():
                started = time.perf_counter()
                found[name] = way()
                if i:  # the first round warms the library's caches
                    seconds[name].append(time.perf_counter() - started)
            assert found["corpus.build"].ids.tolist() == found["encode_batch, stretches"].tolist(), "ids differ"
            print(f"round {i}", *(f"{name} {size / taken[-1]:.2f} MB/s" for name, taken in seconds.items() if taken),
                  sep="  ", flush=True)
        print(f"\n{size:.0f} MB, {os.cpu_count()} cores, vocabulary {using.size:,}, ids equal")
        for name, taken in seconds.items():
            ratios = sorted(other / mine for other, mine in zip(taken, seconds["corpus.build"]))
            print(f"{name:26}{size / statistics.median(taken):8.2f} MB/s   corpus.build is × "
                  f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} – {ratios[-1]:.2f}) as fast")


if __name__ == "__main__":
    main()
