"""`lm generate` with an encoder–decoder, an encoder, unable models, and bad lines."""

import json

import pytest


def test_beams_of_the_folder_are_the_default_and_temperature_samples(inside, marian):
    def rows(*arguments):
        done = inside(
            "generate", "-m", marian, "--json", *arguments, stdin=b"the dog\nthe cat ran\n"
        )
        assert done.returncode == 0, done.stderr.decode()
        return [json.loads(line) for line in done.stdout.splitlines()]

    best = rows()
    assert best == rows("--num-beams", 3) and [row["prompt"] for row in best] == [
        "the dog",
        "the cat ran",
    ]
    assert all(1 <= len(row["tokens"]) <= 11 for row in best)  # max_length counts the start token
    assert rows("--num-samples", 3)[0]["tokens"] == best[0]["tokens"]
    greedy = rows("--num-beams", 1)
    assert greedy == rows("--num-beams", 1, "--seed", greedy[0]["seed"])
    drawn = rows("--temperature", 1.5, "--num-samples", 6, "--seed", 1)
    assert len({row["text"] for row in drawn[:6]}) > 1 and drawn[5]["seed"] == 6
    assert len(rows("--num-beams", 1, "-n", 3, "--min-new-tokens", 3)[0]["tokens"]) == 3
    repeated = rows(
        "-n", 25, "--no-repeat-ngram-size", 1, "--early-stopping", "never", "--min-new-tokens", 20
    )
    assert all(len(set(row["tokens"])) == len(row["tokens"]) >= 20 for row in repeated)


@pytest.mark.parametrize("count", [1, 3])
def test_lines_of_beams_stay_in_step_with_prompts(inside, marian, count):
    prompts = b"the dog\na\n\n \n" + b"the baker went home " * 9 + b"\nthe cat ran\n"
    options = ("-m", marian, "--length-penalty", -10, "--early-stopping", "true")
    options += ("--on-long", "truncate")
    done = inside("generate", *options, "--num-samples", count, stdin=prompts)
    assert done.returncode == 0 and len(done.stdout.decode().splitlines()) == 6 * count
    rows = inside("generate", *options, "--num-samples", count, "--json", stdin=prompts).stdout
    named = [json.loads(line)["prompt"] for line in rows.splitlines()]
    assert named == [line for line in prompts.decode().splitlines() for _ in range(count)]


def test_more_samples_than_texts_are_refused(inside, berts):
    """A mask cannot be filled in more ways than there are tokens."""
    done = inside("generate", "-m", berts / "masked", "--num-samples", 31_000, "a [MASK]")
    assert done.returncode == 1
    assert b"prompt 1 ('a [MASK]'): only " in done.stderr and b" texts found" in done.stderr


def test_a_target_is_streamed_without_special_tokens(inside, marian):
    out = inside("generate", "-m", marian, "--num-beams", 1, "the dog").stdout.decode()
    row = json.loads(inside("generate", "-m", marian, "--num-beams", 1, "--json", "the dog").stdout)
    assert out == row["text"] + "\n" and "<|endoftext|>" not in out


def test_a_source_longer_than_the_context(inside, marian):
    long = "the baker went home " * 20
    for how in ((), ("--on-long", "slide")):
        done = inside("generate", "-m", marian, *how, long)
        assert done.returncode == 1 and b"191 more than the context of 32\n" in done.stderr
        assert b"read its beginning alone with --on-long truncate\n" in done.stderr
    done = inside("generate", "-m", marian, "--on-long", "truncate", "-v", long)
    assert done.returncode == 0 and done.stdout.count(b"\n") == 1


def test_a_mask_has_no_alternatives(inside, berts):
    done = inside("generate", "-m", berts / "masked", "--why", "a [MASK]")
    assert done.returncode == 2 and b"--logprobs: an encoder" in done.stderr
    done = inside("generate", "-m", berts / "masked", "[MASK] " * 30)
    assert done.returncode == 1 and b"8 more than the context of 24" in done.stderr


def test_masks_are_filled(inside, berts):
    text = b"Paris is the [MASK] of France.\nthe [MASK] [MASK]\n"
    done = inside("generate", "-m", berts / "masked", "--num-samples", 3, stdin=text)
    lines = done.stdout.decode().splitlines()
    assert len(lines) == 6 and all(
        line.startswith("paris is the ") and line.endswith("of france.") for line in lines[:3]
    )
    assert len(set(lines[:3])) == 3 and "[MASK]" not in done.stdout.decode()
    row = json.loads(
        inside("generate", "-m", berts / "masked", "--json", "a [MASK] and [MASK]").stdout
    )
    assert len(row["tokens"]) == len(row["token_logprobs"]) == 2 and row["finish_reason"] == "stop"


def test_a_prompt_without_a_mask_follows_on_error(inside, berts):
    text = b"a [MASK]\nno mask\n\nthe [MASK]\n"
    done = inside("generate", "-m", berts / "masked", stdin=text)
    assert (
        done.returncode == 1
        and b"standard input, line 2: nothing to fill: the prompt has no [MASK]" in done.stderr
    )
    blank = inside("generate", "-m", berts / "masked", "--on-error", "blank", stdin=text)
    lines = blank.stdout.decode().split("\n")
    assert (
        blank.returncode == 0
        and len(lines) == 5
        and lines[1:3] == ["", ""]
        and lines[0]
        and lines[3]
    )
    left = inside("generate", "-m", berts / "masked", "--on-error", "skip", stdin=text)
    assert (
        left.stdout.decode().split("\n") == [lines[0], "", lines[3], ""]
        and b"1 bad line left out" in left.stderr
    )
    one = inside("generate", "-m", berts / "masked", "no mask")
    assert one.returncode == 1 and b"[MASK]" in one.stderr and len(one.stderr.splitlines()) == 2


@pytest.mark.parametrize(
    ("kind", "what", "hint"),
    [
        ("labels", "a classifier of texts (encoder), which lm generate cannot use", "lm classify"),
        (
            "answers",
            "a question-answering model (encoder), which lm generate cannot use",
            "lm classify (finds answers",
        ),
        ("bare", "an encoder without a head, which lm generate cannot use", "logits"),
    ],
)
def test_the_error_of_a_model_that_cannot_generate_names_its_commands(
    kind, what, hint, inside, berts
):
    done = inside("generate", "-m", berts / kind, "a [MASK]")
    stderr = done.stderr.decode()
    assert (
        done.returncode == 1 and what in stderr and hint in stderr and len(stderr.splitlines()) == 2
    )


def test_an_empty_line_without_a_bos_token_has_an_empty_result(inside, trained):
    done = inside(
        "generate",
        "-m",
        trained[0],
        "--no-bos",
        "-n",
        3,
        "--seed",
        1,
        stdin=b"The\n\nThe baker\n\n",
    )
    lines = done.stdout.decode().split("\n")
    assert (
        done.returncode == 0
        and len(lines) == 5
        and lines[1] == lines[3] == ""
        and lines[0]
        and lines[2]
    )
    assert done.stderr.decode().count("\n") == 1 and "2 empty lines" in done.stderr.decode()
    rows = inside(
        "generate",
        "-m",
        trained[0],
        "--no-bos",
        "-n",
        3,
        "--json",
        "--num-samples",
        2,
        stdin=b"\nThe\n",
    )
    rows = [json.loads(row) for row in rows.stdout.splitlines()]
    assert [row["finish_reason"] for row in rows[:2]] == [None, None] and rows[3]["tokens"]


def test_invalid_utf8_follows_on_error(inside, trained):
    def lines(how):
        done = inside(
            "generate",
            "-m",
            trained[0],
            "-n",
            3,
            "--seed",
            1,
            "--on-error",
            how,
            stdin=b"The\n\xff\nA\n",
        )
        return done.returncode, done.stdout.decode().split("\n"), done.stderr.decode()

    code, blank, _ = lines("blank")
    assert code == 0 and len(blank) == 4 and blank[1] == "" and blank[2]
    code, left, stderr = lines("skip")
    assert code == 0 and len(left) == 3 and "1 bad line left out" in stderr
    code, none, stderr = lines("stop")
    assert code == 1 and none == [""] and "--on-error blank" in stderr


def test_several_arguments_are_streamed_one_after_another(inside, trained):
    texts = [
        json.loads(row)["text"]
        for row in inside(
            "generate",
            "-m",
            trained[0],
            "-n",
            9,
            "--seed",
            5,
            "--json",
            "--num-samples",
            2,
            "The",
            "A",
        ).stdout.splitlines()
    ]
    done = inside(
        "generate", "-m", trained[0], "-n", 9, "--seed", 5, "--num-samples", 2, "The", "A"
    )
    assert done.stdout.decode() == "".join(f"{text}\n" for text in texts)
