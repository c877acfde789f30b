"""`lm tokenize`: --decode restores any text, errors name bad ids, --train learns a tokenizer."""

import json
import random

import pytest


def random_text(seed: int) -> bytes:
    """2,000 characters of all planes, with every control character that may end a line."""
    draw = random.Random(seed)
    ranges = ((0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF))
    characters = [chr(draw.randint(*draw.choice(ranges))) for _ in range(2000)]
    return "".join([*characters, "\0\r\x0b\x0c\x1c\x85\u2028\u2029\ufeff\n"]).encode()


@pytest.mark.parametrize("seed", range(4))
def test_random_unicode_is_restored_byte_for_byte(inside, trained, seed):
    text = random_text(seed)
    ids = inside("tokenize", "-m", trained[0], stdin=text)
    assert ids.returncode == 0 and ids.stdout.count(b"\n") == text.count(b"\n")
    assert inside("tokenize", "-m", trained[0], "--decode", stdin=ids.stdout).stdout == text


@pytest.mark.parametrize(
    "line, word",
    [
        (b"1 2 x", "'x'"),
        (b"1 99999", "99999"),
        (b"-1", "'-1'"),
        (b"1.5", "'1.5'"),
        (b"1_0", "'1_0'"),
    ],
)
def test_a_bad_id_is_named_with_its_line(inside, trained, line, word):
    done = inside("tokenize", "-m", trained[0], "--decode", stdin=b"5 6\n" + line + b"\n7\n")
    stderr = done.stderr.decode()
    assert (
        done.returncode == 1
        and stderr.startswith("lm: error: standard input, line 2: ")
        and word in stderr.splitlines()[0]
    )


def test_bad_ids_can_be_blanked_or_skipped(inside, trained):
    ids = b"33\nx\n34\n"
    text = inside("tokenize", "-m", trained[0], "--decode", "--on-error", "blank", stdin=ids).stdout
    assert text.split(b"\n")[1] == b"" and text.count(b"\n") == 3
    done = inside("tokenize", "-m", trained[0], "--decode", "--on-error", "skip", stdin=ids)
    assert done.stdout.count(b"\n") == 2 and b"1 bad records" in done.stderr


def test_pieces_offsets_and_ids_agree(inside, trained):
    text = "The baker saw 却说 café.\n".encode()
    ids = inside("tokenize", "-m", trained[0], stdin=text).stdout.split()
    pieces = inside("tokenize", "-m", trained[0], "--pieces", stdin=text).stdout.split()
    spans = [
        tuple(map(int, span.split(b":")))
        for span in inside("tokenize", "-m", trained[0], "--offsets", stdin=text).stdout.split()
    ]
    assert len(ids) == len(pieces) == len(spans)
    assert [index for index, _, _ in spans] == list(map(int, ids))
    assert [start for _, start, _ in spans] == [
        0,
        *(end for _, _, end in spans[:-1]),
    ]  # no byte between two tokens
    assert spans[-1][2] == len(text) - 1
    for (_, start, end), piece in zip(spans, pieces, strict=True):
        if text[start:end].isalpha():  # the vocabulary spells plain letters as themselves
            assert text[start:end] == piece


def test_json_keeps_the_other_fields_of_rows(inside, trained, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        '{"id": 7, "text": "The baker", "tags": ["a", null], "x": {"y": 1.5}}\n'
        '{"id": 8, "text": ""}\n'
    )
    done = inside("tokenize", "-m", trained[0], "--json", "--pieces", "--special", rows)
    first, second = map(json.loads, done.stdout.splitlines())
    assert first["id"] == 7 and first["tags"] == ["a", None] and first["x"] == {"y": 1.5}
    assert (
        first["ids"][0] == 0
        and first["pieces"][0] == "<|endoftext|>"
        and first["count"] == len(first["ids"])
    )
    assert second["ids"] == [0] and second["text"] == ""


@pytest.mark.parametrize("n", [0, 1, 3, 1000])
def test_truncate_keeps_the_first_tokens(inside, trained, n):
    whole = inside(
        "tokenize", "-m", trained[0], stdin=b"The baker of the village\n\n"
    ).stdout.split(b"\n")
    cut = inside(
        "tokenize", "-m", trained[0], "--truncate", n, stdin=b"The baker of the village\n\n"
    ).stdout.split(b"\n")
    assert cut == [b" ".join(line.split()[:n]) for line in whole]


def test_files_are_read_in_the_order_given(inside, trained, tmp_path):
    for name, text in (("b", "beta\n"), ("a", "alpha\n")):
        (tmp_path / name).write_text(text)
    ids = inside(
        "tokenize", "-m", trained[0], tmp_path / "b", "-", tmp_path / "a", stdin=b"piped\n"
    ).stdout
    assert (
        inside("tokenize", "-m", trained[0], "--decode", stdin=ids).stdout
        == b"beta\npiped\nalpha\n"
    )


def test_learning_a_tokenizer(inside, story, tmp_path):
    from tokenizers import Tokenizer

    done = inside("tokenize", "--train", "-o", tmp_path / "learned", "--vocab-size", 400, story)
    assert done.returncode == 0 and done.stdout.decode() == f"{tmp_path / 'learned'}\n"
    theirs = Tokenizer.from_file(str(tmp_path / "learned" / "tokenizer.json"))
    assert theirs.get_vocab_size() == 400
    ours = inside("tokenize", "-m", tmp_path / "learned", stdin=b"The baker\n").stdout
    assert list(map(int, ours.split())) == theirs.encode("The baker", add_special_tokens=False).ids
    again = inside("tokenize", "--train", "-o", tmp_path / "learned", story)
    assert again.returncode == 2 and b"holds a tokenizer already" in again.stderr


def test_a_vocabulary_larger_than_the_text_is_reduced_with_a_note(inside, tmp_path):
    done = inside(
        "tokenize",
        "--train",
        "-o",
        tmp_path / "learned",
        "--vocab-size",
        5000,
        stdin=b"low lower lowest\n" * 9,
    )
    assert done.returncode == 0 and b"room for a vocabulary of" in done.stderr


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (("--decode", "--count"), "exclude each other"),
        (("--vocab-size", "500"), "need --train"),
        (("--train",), "name it with -o DIR"),
        (("--continue",), "--continue needs -o"),
        (("--truncate", "-1"), "--truncate"),
    ],
)
def test_options_that_exclude_each_other_are_usage_errors(inside, trained, arguments, expected):
    done = inside("tokenize", "-m", trained[0], *arguments, stdin=b"a\n")
    assert done.returncode == 2 and expected in done.stderr.decode() and done.stdout == b""


def test_without_a_model_the_hint_names_both_ways_to_give_one(inside, trained, monkeypatch):
    done = inside("tokenize", stdin=b"a\n")
    assert done.returncode == 2 and b"-m DIR" in done.stderr and b"LM_MODEL" in done.stderr
    monkeypatch.setenv("LM_MODEL", str(trained[0]))
    assert inside("tokenize", stdin=b"a\n").returncode == 0
