"""Tables on real terminals: what is drawn fits, is aligned, and no number is cut."""

import re

import pytest
from drawn_screen import printable

TEXT = (
    "The baker slept all day, and nobody else in the whole town was awake.\n\n"
    "却说贾雨村\x1b[2J\tend\n"
)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.mark.parametrize("columns", [60, 80])
def test_scores_are_rows_under_their_titles(screen, inside, trained, text, columns):
    shown = screen("score", "-m", trained[0], text, columns=columns)
    assert shown.code == 0 and printable(shown.lines) and len(shown.lines) == 4
    assert max(map(len, shown.lines)) <= columns
    assert shown.lines[0].split() == ["logprob", "tokens", "bytes", "bits_per_byte", "text"]
    piped = inside("score", "-m", trained[0], "--no-header", text).stdout.decode().splitlines()
    for drawn, line in zip(shown.lines[1:], piped, strict=True):
        cells = line.split("\t")
        assert [float(cell) for cell in drawn.split()[:3]] == pytest.approx(
            [float(cell) for cell in cells[:3]], abs=0.01
        )
    assert shown.lines[1].endswith(" …") and "␛[2J␉end" in shown.lines[3]
    ends = {re.match(r"(\s*\S+){4}", line).end() for line in shown.lines[1:]}
    assert len(ends) == 1  # equal decimals, right-aligned


def test_alternatives_at_80_and_60(terminal, trained, text):
    for columns, expected in ((80, 3), (60, 2)):
        lines = terminal("score", "-m", trained[0], "--alternatives", 3, text, columns=columns)
        lines = lines.read().lines
        assert lines[0].startswith("not shown at this width: ")
        titles = next(i for i, line in enumerate(lines) if "piece" in line.split())
        assert max(map(len, lines)) <= columns
        assert len(re.findall(r"\d+%", lines[titles + 1])) >= expected
        assert any("␣" in line for line in lines)


def test_rows_appear_as_they_come(terminal, trained):
    """A person types lines: each has its row at once, and the titles come once."""
    running = terminal("score", "-m", trained[0], "-", columns=80)
    running.type("The baker\n")
    assert running.read(until="bits_per_byte").lines[0] == "The baker"
    running.type("slept all day and all night long\n")
    running.read(until="long")
    running.type("\x04")
    lines = running.read().lines
    assert [line.split()[-1] for line in lines] == ["baker", "text", "baker", "long", "long"]


def test_perplexity_of_two_models_and_two_files(screen, trained, tmp_path):
    files = []
    for k in range(2):
        files.append(tmp_path / f"file{k}.txt")
        files[-1].write_text("The baker slept.\nA dog ran home.\n" * 3)
    copy = tmp_path / "copy"
    copy.symlink_to(trained[0])
    models = ("-m", trained[0], "-m", copy)
    shown = screen("perplexity", *models, "--documents", "line", *files, "-q")
    assert (
        shown.code == 0 and max(map(len, shown.lines)) <= 80 and "lm-perplexity|" not in shown.text
    )
    assert "…" not in shown.text
    rows = [line.split()[:2] for line in shown.lines[1:5]]
    names = (trained[0].name, "copy")
    assert rows == [[name, file.name] for file in files for name in names]
    assert all(re.search(r"\d\.\d+ ± \d\.\d+", line) for line in shown.lines[1:5])
    verbose = screen("perplexity", "-m", trained[0], files[0], "-v", columns=200)
    assert "lm-perplexity|model:" in verbose.text


def test_info_fits_the_screen_and_says_how_to_see_more(screen, trained):
    brief = screen("info", trained[0], columns=60)
    assert brief.code == 0 and len(brief.lines) <= 23
    assert re.fullmatch(r"… \d+ more facts: lm info -v", brief.lines[-1])
    assert "parameters.total" in brief.text and "run.val_bits_per_byte" in brief.text
    whole = screen("info", trained[0], "-v", columns=120)
    assert "run.lm" in whole.text and "more facts" not in whole.text


def test_pieces_stand_above_their_ids(screen, inside, trained, text):
    shown = screen("tokenize", "-m", trained[0], "--pieces", text, columns=60)
    assert shown.code == 0 and max(map(len, shown.lines)) <= 60
    ids = inside("tokenize", "-m", trained[0], text).stdout.decode().splitlines()[0].split()
    assert (
        shown.lines[0].startswith("The")
        and shown.lines[1].split() == ids[: len(shown.lines[1].split())]
    )
    starts = [match.start() for match in re.finditer(r"\S+", shown.lines[1])]
    assert starts == [match.start() for match in re.finditer(r"\S+", shown.lines[0])]


def test_tokens_are_painted_in_turns(screen, inside, trained, text):
    shown = screen("tokenize", "-m", trained[0], "--color", "--special", text)
    assert shown.code == 0 and printable(shown.lines)
    assert shown.lines[0].startswith("<|endoftext|>The baker")
    _, special = shown.color(0, 0)
    colors = [shown.color(0, column)[1] for column in range(13, 20)]
    assert special not in colors and len(set(colors)) == 2
    plain = inside("tokenize", "-m", trained[0], "--color", text).stdout.decode()
    bare = re.sub(r"\x1b\[[0-9;]*m", "", plain)
    assert bare == TEXT.replace("\x1b", "␛").replace("\t", "␉")
    for other in ("--json", "--pieces"):
        done = inside("tokenize", "-m", trained[0], "--color", other, text)
        assert done.returncode == 2 and b"exclude each other" in done.stderr
