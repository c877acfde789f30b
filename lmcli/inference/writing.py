"""Prompts → several texts each, in groups of like length, by whatever writes: a Decoder or a Filler."""

import random
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from lmcli.errors import UsageError
from lmcli.inference.crew import ALONE, Crew, Errand
from lmcli.inference.decoding import Decoder, Generated
from lmcli.inference.filling import Filler
from lmcli.inference.ordering import batch_tokens, grouped_by_length


def new_seed() -> int:
    """A seed that nobody chose: 31 bits, so that it can be typed."""
    return random.SystemRandom().getrandbits(31)


def streams(decoder: Decoder | Filler) -> bool:
    """Whether text comes token by token."""
    return isinstance(decoder, Decoder) and decoder.config.num_beams == 1


class Row(NamedTuple):
    """A prompt (ids) and the seeds of what is wanted of it; each text that is drawn by itself has a row of its own."""

    prompt: list[int]
    seeds: list[int]


class Group(NamedTuple):
    """Rows that are worked on together; they stand at `places` among the `size` rows of a part, by whatever it is known."""

    rows: list[Row]
    places: list[int]
    size: int
    part: Any = None


def decode_all(decoder: Decoder | Filler, prompts: list[list[int]], num_samples: int = 1,
               seed: int | None = None, batch: int = 0) -> list[list[Generated]]:
    """`num_samples` results for each prompt (ids), in order; worked on in groups of like length.

    Sample k of prompt i is drawn from seed + i · num_samples + k, which its `seed` names.
    """
    part = None, prompts, new_seed() if seed is None else seed
    return next(decode_parts(decoder, [part], num_samples, batch))[1]


def decode_parts(decoder: Decoder | Filler, parts: Iterable[tuple[Any, list[list[int]], int]], num_samples: int = 1,
                 batch: int = 0, crew: Crew = ALONE) -> Iterator[tuple[Any, list[list[Generated]]]]:
    """(part, results for each of its prompts), as of `decode_all`, for each (part, prompts, seed); a crew shares the
    groups."""
    found: dict[int, list[Generated]] = {}
    for group, results in crew.in_order(_groups(decoder, parts, num_samples, batch), errand(decoder)):
        found.update((place, [Generated(*values) for values in row]) for place, row in zip(group.places, results))
        if len(found) == group.size:
            rows = num_samples if streams(decoder) else 1  # of a prompt
            yield group.part, [[result for k in range(i, i + rows) for result in found[k]]
                               for i in range(0, group.size, rows)]
            found = {}


def errand(decoder: Decoder | Filler) -> Errand:
    """The decoding of Groups: for each row the fields of its results."""
    def work(group: Group) -> list[list[tuple]]:
        return [[(one.text, one.finish_reason, one.tokens, one.token_logprobs, one.seed) for one in results]
                for results in _decoded(decoder, group.rows)]

    return Errand(work, lambda group: group.rows, lambda rows: Group([Row(*row) for row in rows], [], 0))


def _groups(decoder: Decoder | Filler, parts: Iterable[tuple[Any, list[list[int]], int]], num_samples: int,
            batch: int) -> Iterator[Group]:
    most = min(4 * batch_tokens(decoder.model.embedding.weight.device, batch),
               64 * decoder.model.config.max_position_embeddings)
    width = decoder.config.num_beams
    if isinstance(decoder, Decoder) and 1 < width < num_samples:
        raise UsageError(f"--num-samples {num_samples} is more than --num-beams {width}",
                         hint=f"the best of {num_samples} beams need --num-beams {num_samples}; "
                              "--temperature 1 draws instead")
    for part, prompts, first in parts:
        rows = [Row(prompt, [first + i * num_samples + k for k in range(num_samples)]) for i, prompt in enumerate(prompts)]
        if streams(decoder):
            rows = [Row(row.prompt, [seed]) for row in rows for seed in row.seeds]
        costs = [len(row.prompt) * num_samples if isinstance(decoder, Filler) else decoder.cost(row.prompt) * width
                 for row in rows]
        for places in grouped_by_length(costs, most) if rows else ([],):
            yield Group([rows[i] for i in places], places, len(rows), part)


def _decoded(decoder: Decoder | Filler, rows: list[Row]) -> list[list[Generated]]:
    if not rows:
        return []
    prompts, seeds = [row.prompt for row in rows], [row.seeds for row in rows]
    if isinstance(decoder, Filler):
        return decoder.fill(prompts, len(seeds[0]), seeds)
    if decoder.config.num_beams > 1:
        return decoder.beams(prompts, len(seeds[0]))
    return [[result] for result in decoder.generate(prompts, [seed for seed, in seeds])]
