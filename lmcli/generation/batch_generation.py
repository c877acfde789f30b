"""Samples for each of many prompts, in batches of similar length, with results in input order."""

import math
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import astuple
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard, Union

from lmcli.data.length_batching import group_by_length, tokens_per_forward
from lmcli.distributed.work_queue import LOCAL_POOL, RemoteTask, WorkerPool
from lmcli.errors import UsageError
from lmcli.generation.decoding import Decoder, Generated, TextChunk

if TYPE_CHECKING:
    from lmcli.generation.mask_filling import MaskFiller

TextGenerator = Union[Decoder, "MaskFiller"]
Batch = tuple[Any, list[list[int]], int]  # any value, prompts (ids), the seed of the first sample


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


class PromptRow(NamedTuple):
    """A prompt (ids) and the seeds of the results that one row gives."""

    prompt: list[int]
    seeds: list[int]


class PromptGroup(NamedTuple):
    """Rows for one call of the model: those at `positions` of a batch's `total` rows."""

    rows: list[PromptRow]
    positions: list[int]
    total: int
    batch: Any = None


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
    """`num_samples` results for each prompt (ids), in order.

    Sample k of prompt i is drawn from seed + i · n + k, which its `seed` holds; n is `num_samples`,
    or with `best_of` that many, of which those with the highest mean log-probability are returned.
    """
    batch = None, prompts, new_seed() if seed is None else seed
    results = generate_batches(generator, [batch], num_samples, batch_tokens, best_of=best_of)
    return next(results)[1]


def generate_batches(
    generator: TextGenerator,
    batches: Iterable[Batch],
    num_samples: int = 1,
    batch_tokens: int = 0,
    pool: WorkerPool = LOCAL_POOL,
    best_of: int = 0,
) -> Iterator[tuple[Any, list[list[Generated]]]]:
    """Yields (value, results of each prompt) for each Batch, as `generate_all`; a pool works."""
    if best_of:
        _check_best_of(generator, best_of, num_samples)
    drawn = best_of or num_samples
    rows_per_prompt = drawn if generator.one_row_per_sample else 1
    results: dict[int, list[Generated]] = {}
    groups = _groups(generator, batches, drawn, batch_tokens)
    for group, group_results in pool.map_in_order(groups, remote_task(generator)):
        results.update(zip(group.positions, group_results))
        if len(results) == group.total:
            starts = range(0, group.total, rows_per_prompt)
            samples = ([results[k] for k in range(i, i + rows_per_prompt)] for i in starts)
            by_prompt = [list(chain(*of_prompt)) for of_prompt in samples]
            if best_of:
                by_prompt = [
                    sorted(texts, key=_cost_per_token)[:num_samples] for texts in by_prompt
                ]
            yield group.batch, by_prompt
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
        decode=lambda rows: PromptGroup([PromptRow(*row) for row in rows], [], 0),
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
    generator: TextGenerator, batches: Iterable[Batch], num_samples: int, batch_tokens: int
) -> Iterator[PromptGroup]:
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
    for batch, prompts, first in batches:
        rows = [
            PromptRow(prompt, [first + i * num_samples + k for k in range(num_samples)])
            for i, prompt in enumerate(prompts)
        ]
        if generator.one_row_per_sample:
            rows = [PromptRow(row.prompt, [seed]) for row in rows for seed in row.seeds]
        costs = [generator.cost(row.prompt, num_samples) for row in rows]
        for positions in group_by_length(costs, max_tokens) if rows else ([],):
            yield PromptGroup([rows[i] for i in positions], positions, len(rows), batch)
