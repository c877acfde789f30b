"""Cells and TSV lines, as every command writes them."""


def cell(value: float | None) -> str:
    """A number as TSV has it: six significant digits, NA for None."""
    if value is None:
        return "NA"
    return str(value) if isinstance(value, int) else f"{value:.6g}" if value else "0"


def tsv_line(*cells: str) -> str:
    """One line of tab-separated cells, which must be escaped already."""
    return "\t".join(cells) + "\n"


def numbered(names: list[str], count: int | None) -> list[str]:
    """The column names of `count` items, numbered from 1; the names alone without a count."""
    return [f"{name}_{k + 1}" for k in range(count) for name in names] if count else names
