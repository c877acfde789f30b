"""Samples for each of many prompts, with results in input order.

Where the decoder can take new prompts while others go on, they enter as they arrive and as rows
become free (continuous batching, Yu et al. 2022); else they are put in batches of similar length.
"""

import math
import random
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, replace
from itertools import chain
from queue import Empty, Queue
from typing import TYPE_CHECKING, NamedTuple, TypeGuard, Union

from lmcli.data.length_batching import group_by_length, tokens_per_forward
from lmcli.distributed.work_queue import LOCAL_POOL, RemoteTask, WorkerPool
from lmcli.errors import UsageError
from lmcli.generation.decoding import Decoder, Generated, PromptRow, TextChunk
from lmcli.generation.prompts import Prompt
from lmcli.terminal import progress

if TYPE_CHECKING:
    from lmcli.generation.mask_filling import MaskFiller

TextGenerator = Union[Decoder, "MaskFiller"]
BATCHES_READ_AHEAD = 2
MOST_UNWRITTEN = 4096  # prompts begun while an earlier one is unfinished


def new_seed() -> int:
    """A random seed of 31 bits, short enough to be typed."""
    return random.SystemRandom().getrandbits(31)


def can_stream(generator: TextGenerator) -> TypeGuard[Decoder]:
    """True if text comes token by token: not from a beam search or a mask filler."""
    return generator.one_row_per_sample


def stream_one(generator: TextGenerator, prompt: list[int], seed: int) -> Iterator[TextChunk]:
    """Yields one text in chunks, the last with the result; what cannot stream gives one chunk."""
    if can_stream(generator):
        yield from generator.stream([prompt], [seed])
        return
    ((result,),) = generate_all(generator, [prompt], 1, seed)
    yield TextChunk(0, result.text, result)


def speed(texts: int, tokens: int, first: float | None, seconds: float) -> str:
    """How fast texts came, for people; the first token after `first` seconds, if that is known.

    The rate of one text is that after its first token, the rate of several is that of the whole.
    """
    parts = [f"{texts:,} texts"] if texts > 1 else []
    parts.append(f"{tokens:,} token{'s' if tokens != 1 else ''}")
    if texts == 1 and first is not None:
        tokens, seconds = tokens - 1, seconds - first
    if tokens > 0:
        parts.append(f"{tokens / seconds:,.1f} tokens/s")
    return ", ".join([*parts, *([] if first is None else [f"the first after {first:.2f} s"])])


class SampledPrompt(NamedTuple):
    """A prompt and the seed of each of its results."""

    prompt: Prompt
    seeds: list[int]

    def rows(self, one_per_sample: bool) -> list[PromptRow]:
        """A row for each seed, or one for all; none for a prompt without ids."""
        ids = self.prompt.ids
        if not ids:
            return []
        rows = [[seed] for seed in self.seeds] if one_per_sample else [self.seeds]
        return [PromptRow(ids, seeds) for seeds in rows]


class PromptGroup(NamedTuple):
    """Rows for one call of the model, at `positions` of the rows of a batch of prompts."""

    rows: list[PromptRow]
    positions: list[int]
    batch: list[SampledPrompt]


def row_by_row(chunks: Iterable[TextChunk]) -> Iterator[TextChunk]:
    """The chunks in the order of their rows: those of a later row wait until it is their turn."""
    waiting: dict[int, list[TextChunk]] = defaultdict(list)
    row = 0
    for chunk in chunks:
        waiting[chunk.row].append(chunk)
        while ready := waiting.pop(row, []):
            yield from ready
            row += ready[-1].result is not None


def generate_all(
    generator: TextGenerator,
    prompts: list[list[int]],
    num_samples: int = 1,
    seed: int | None = None,
    batch_tokens: int = 0,
    best_of: int = 0,
) -> list[list[Generated]]:
    """`num_samples` results for each prompt (ids), in order; seeds as in `generate_each`."""
    batch = [Prompt("", ids) for ids in prompts]
    first = new_seed() if seed is None else seed
    with progress.stage("generating", len(prompts), "texts"):
        each = generate_each(generator, [batch], first, num_samples, batch_tokens, best_of=best_of)
        return [results for _, results in each]


def generate_each(
    generator: TextGenerator,
    batches: Iterable[list[Prompt]],
    seed: int,
    num_samples: int = 1,
    batch_tokens: int = 0,
    pool: WorkerPool = LOCAL_POOL,
    best_of: int = 0,
) -> Iterator[tuple[Prompt, list[Generated]]]:
    """Yields each prompt with its results, in order, as soon as they are there; a pool works.

    Sample k of prompt i is drawn from seed + i · n + k, which its `seed` holds; n is `num_samples`,
    or with `best_of` that many, of which those with the highest mean log-probability are returned.
    A prompt without ids has no results. Of the batches only the order of the prompts matters.
    """
    if best_of:
        _check_best_of(generator, best_of, num_samples)
        each = generate_each(generator, batches, seed, best_of, batch_tokens, pool)
        return (
            (prompt, sorted(found, key=_cost_per_token)[:num_samples]) for prompt, found in each
        )
    width = generator.config.num_beams
    if isinstance(generator, Decoder) and 1 < width < num_samples:
        raise UsageError(
            f"--num-samples {num_samples} is more than --num-beams {width}",
            hint=f"set --num-beams {num_samples}, or draw samples with --temperature 1",
        )
    max_tokens = min(
        4 * tokens_per_forward(generator.device_type, batch_tokens),
        64 * generator.model_config.max_position_embeddings,
    )
    sampled = _sampled(batches, seed, num_samples)
    if pool.size == 1 and can_stream(generator) and generator.extendable:
        return _continuously(generator, sampled, num_samples, max_tokens)
    return _in_groups(generator, sampled, num_samples, max_tokens, pool)


def _sampled(
    batches: Iterable[list[Prompt]], seed: int, num_samples: int
) -> Iterator[list[SampledPrompt]]:
    for batch in batches:
        starts = range(seed, seed + len(batch) * num_samples, num_samples)
        yield [
            SampledPrompt(prompt, list(range(start, start + num_samples)))
            for prompt, start in zip(batch, starts)
        ]
        seed += len(batch) * num_samples


def _continuously(
    decoder: Decoder, batches: Iterator[list[SampledPrompt]], num_samples: int, max_tokens: int
) -> Iterator[tuple[Prompt, list[Generated]]]:
    def arrange(rows: list[_Waiting]) -> Iterable[_Waiting]:
        """Sources in groups of similar length, which are encoded together."""
        costs = [decoder.cost(row.prompt, num_samples) for row, _ in rows]
        for positions in group_by_length(costs, max_tokens):
            group = [rows[i][0] for i in positions]
            yield from ((rows[i][0]._replace(group=group), rows[i][1]) for i in positions)

    line = _Line(batches, num_samples, arrange if decoder.has_encoder else list)
    progress.current().begin()
    while line.wait():
        yield from line.finished()
        for chunk in decoder.flow(line.take, max_tokens):
            if chunk.result:
                line.store(chunk.row, chunk.result)
                yield from line.finished()
        yield from line.finished()


_Waiting = tuple[PromptRow, dict[int, Generated]]  # a row, and where its result goes


class _Line:
    """Prompts that a thread reads, in order, until their results are given out.

    `arrange` orders the rows of those that arrived together.
    """

    def __init__(
        self,
        batches: Iterator[list[SampledPrompt]],
        num_samples: int,
        arrange: Callable[[list[_Waiting]], Iterable[_Waiting]],
    ):
        self._samples, self._arrange = num_samples, arrange
        self._arrived: Queue[list[SampledPrompt] | BaseException | None] = Queue(BATCHES_READ_AHEAD)
        self._end: tuple[BaseException | None] | None = None  # why reading ended
        # a prompt, and its results by seed
        self._unwritten: deque[tuple[SampledPrompt, dict[int, Generated]]] = deque()
        self._waiting: deque[_Waiting] = deque()  # rows to be taken
        self._taken: dict[int, dict[int, Generated]] = {}  # where the result of a row goes
        self._number = 0  # of the next row
        threading.Thread(target=self._read, args=(batches,), daemon=True).start()

    def _read(self, batches: Iterator[list[SampledPrompt]]) -> None:
        error = None
        try:
            for batch in batches:
                self._arrived.put(batch)
        except BaseException as problem:
            error = problem
        self._arrived.put(error)

    def wait(self) -> bool:
        """Waits for prompts; False at their end. Raises an error of reading, after all results."""
        self._number = 0
        while not self._end and not self._unwritten:
            self._receive(block=True)
        if self._end and self._end[0] and not self._unwritten:
            raise self._end[0]
        return bool(self._unwritten)

    def _receive(self, block: bool) -> None:
        arrived = self._arrived.get(block)
        if not isinstance(arrived, list):
            self._end = (arrived,)
            return
        rows: list[_Waiting] = []
        for sampled in arrived:
            results: dict[int, Generated] = {}
            self._unwritten.append((sampled, results))
            rows += [(row, results) for row in sampled.rows(one_per_sample=True)]
        self._waiting += self._arrange(rows)

    def take(self) -> PromptRow | None:
        """The next row; None if no prompt has arrived."""
        try:
            while not self._waiting:
                if self._end or len(self._unwritten) >= MOST_UNWRITTEN:
                    return None
                self._receive(block=False)
        except Empty:
            return None
        row, results = self._waiting.popleft()
        self._taken[self._number] = results
        self._number += 1
        return row

    def store(self, number: int, result: Generated) -> None:
        """Keeps the result of a row, by its number since `wait`."""
        self._taken.pop(number)[result.seed] = result
        progress.current().advance(1 / self._samples)

    def finished(self) -> Iterator[tuple[Prompt, list[Generated]]]:
        """The first prompts, as far as they have all their results."""
        while self._unwritten:
            (prompt, seeds), results = self._unwritten[0]
            if prompt.ids and len(results) < len(seeds):
                return
            self._unwritten.popleft()
            yield prompt, [results[seed] for seed in seeds if seed in results]


def _in_groups(
    generator: TextGenerator,
    batches: Iterator[list[SampledPrompt]],
    num_samples: int,
    max_tokens: int,
    pool: WorkerPool,
) -> Iterator[tuple[Prompt, list[Generated]]]:
    results: dict[int, list[Generated]] = {}
    groups = _groups(generator, batches, num_samples, max_tokens)
    task = replace(
        remote_task(generator),
        size=lambda group: sum([len(row.seeds) for row in group.rows]) / num_samples,
    )
    for group, group_results in pool.map_in_order(groups, task):
        results.update(zip(group.positions, group_results))
        rows = [len(each.rows(generator.one_row_per_sample)) for each in group.batch]
        if len(results) == sum(rows):
            in_order = iter([results[i] for i in range(len(results))])
            for each, count in zip(group.batch, rows):
                yield each.prompt, list(chain(*(next(in_order) for _ in range(count))))
            results = {}


def _check_best_of(generator: TextGenerator, best_of: int, num_samples: int) -> None:
    if not generator.one_row_per_sample or not generator.config.temperature:
        raise UsageError(
            f"--best-of {best_of} needs texts that are drawn", hint="set --temperature 1"
        )
    if best_of < num_samples:
        raise UsageError(f"--best-of {best_of} is less than --num-samples {num_samples}")


def _cost_per_token(result: Generated) -> float:
    """The mean negative log-probability of a text's tokens; infinite for a text without tokens."""
    # a problem goes first, so that it is reported
    values = result.token_logprobs
    return -math.inf if result.problem else -sum(values) / len(values) if values else math.inf


def remote_task(generator: TextGenerator) -> RemoteTask:
    """The generation of a PromptGroup: the results of each of its rows."""

    def work(group: PromptGroup) -> list[list[Generated]]:
        if not group.rows:
            return []
        results = generator.complete(
            [row.prompt for row in group.rows], [row.seeds for row in group.rows]
        )
        return [_as_many(of_row, row.seeds) for of_row, row in zip(results, group.rows)]

    return RemoteTask(
        work,
        encode=lambda group: group.rows,
        decode=lambda rows: PromptGroup([PromptRow(*row) for row in rows], [], []),
        encode_result=lambda results: [[astuple(result) for result in row] for row in results],
        decode_result=lambda results: [[Generated(*values) for values in row] for row in results],
    )


def _as_many(results: list[Generated], seeds: list[int]) -> list[Generated]:
    """The results, followed by a problem if there are fewer than seeds."""
    if len(results) == len(seeds) or any(result.problem for result in results):
        return results
    found = f"{len(results)} text{'s' if len(results) != 1 else ''}"
    problem = f"only {found} found, fewer than --num-samples {len(seeds)}"
    return [*results, Generated("", "stop", [], [], seeds[0], problem)]


def _groups(
    generator: TextGenerator,
    batches: Iterator[list[SampledPrompt]],
    num_samples: int,
    max_tokens: int,
) -> Iterator[PromptGroup]:
    for batch in batches:
        rows = list(chain(*(each.rows(generator.one_row_per_sample) for each in batch)))
        costs = [generator.cost(row.prompt, num_samples) for row in rows]
        for positions in group_by_length(costs, max_tokens) if rows else ([],):
            yield PromptGroup([rows[i] for i in positions], positions, batch)
