"""An estimate of the bits per byte that training will reach, from a fit to measured runs."""

import lzma
import math

# constants of the fit in `expected_bits_per_byte`
FLOOR, CAPACITY, SLOPE, POWER, SIZE_POWER, REPEATS = 0.615, 0.05, 0.25, 0.5, 0.3, 8.0


def xz_bits_per_byte(texts: list[str]) -> float:
    """Bits that xz needs for a byte of the joined texts."""
    content = "".join(texts).encode("utf-8")
    # by default xz takes 94 MB for its dictionary, which would count as memory of this process
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 1 << 20}]
    return 8 * len(lzma.compress(content, filters=filters)) / len(content)


def expected_bits_per_byte(
    xz_bits: float, text_bytes: float, read_bytes: float, block_parameters: int
) -> float:
    """About how many bits per byte a decoder reaches on held-out text like its training text.

    `xz_bits` are the bits per byte of the text under xz, `block_parameters` those without the
    embedding. The estimate is a floor that falls with the model's size, plus what is not learned
    yet: less with the bytes read, more for a larger model at the same bytes. Repeated epochs count
    less and less (Muennighoff et al. 2023), up to eight of them.

    Fitted to 30 runs of 8 to 300 s with 0.3 to 3.2 million parameters in their blocks, 21 of them
    on tinyshakespeare, the others on wikitext-2, two kinds of stories, a Chinese novel and a
    Chinese classic: error 6 % (root mean square), 13 % at most. The constants come from a grid
    search on 28 of them, rounded by hand. Repeated without one text, the search predicts that text
    within 18 %, one of 60 kB within 26 %. These runs are too small to show that the floor falls
    with size (without it the weighted error is 4.8 instead of 4.9 %), but otherwise a larger model
    would never be worth its time. Beyond those sizes the estimate is a guess.
    """
    million = 1e6
    repeats = max(0.0, read_bytes / text_bytes - 1)
    fresh = text_bytes * (1 + REPEATS * (1 - math.exp(-repeats / REPEATS)))
    read = max(1e-3, min(read_bytes, fresh) / million)
    size = block_parameters / million
    return min(8.0, xz_bits * (FLOOR * size**-CAPACITY + SLOPE * read**-POWER * size**SIZE_POWER))


def rounded(bits: float | None) -> float | None:
    """An estimate with its significant digits only: 2.1."""
    return None if bits is None else round(bits, 1)
