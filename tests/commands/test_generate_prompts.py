"""`lm generate`: prompts, how their continuations are written, and what ends them."""

import json
import math
import os
import re
import select
import subprocess
import sys
import time
from functools import partial

import pytest

import lmcli
from lmcli.errors import UserError


@pytest.fixture
def generate(inside, trained):
    """generate(*arguments, stdin): standard output as text."""

    def call(*arguments, stdin: bytes = b"") -> str:
        seed = () if "--seed" in arguments else ("--seed", 7)
        done = inside("generate", "-m", trained[0], *seed, *arguments, stdin=stdin)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()

    return call


def test_arguments_win_over_standard_input_unless_it_is_named(generate):
    assert generate("-n", 4, "The", stdin=b"unread\n") == generate("-n", 4, "The")
    lines = [
        json.loads(line)["prompt"]
        for line in generate(
            "-n", 2, "--json", "first", "-", "last", stdin=b"piped\n\nmore"
        ).splitlines()
    ]
    assert lines == ["first", "piped", "", "more", "last"]


def test_samples_of_a_prompt_are_adjacent_and_have_their_own_seeds(generate):
    rows = [
        json.loads(line)
        for line in generate("-n", 12, "--json", "--num-samples", 3, "The", "A").splitlines()
    ]
    assert [row["prompt"] for row in rows] == ["The"] * 3 + ["A"] * 3
    assert [row["seed"] for row in rows] == [7, 8, 9, 10, 11, 12]
    assert len({row["text"] for row in rows}) > 3
    alone = json.loads(generate("-n", 12, "--json", "--seed", 11, "A"))
    assert alone["tokens"] == rows[4]["tokens"]  # so one line of many can be drawn again


def test_200_prompts_with_two_samples_are_400_lines(generate):
    assert generate("-n", 2, "--num-samples", 2, stdin=b"The baker\n\n" * 100).count("\n") == 400


def test_seeds_continue_across_batches_of_prompts(generate):
    rows = map(json.loads, generate("-n", 1, "--json", stdin=b"The\n" * 600).splitlines())
    assert [row["seed"] for row in rows] == list(range(7, 607))


def test_without_a_seed_each_run_differs_and_names_its_seed(inside, trained):
    first, second = (
        json.loads(inside("generate", "-m", trained[0], "--json", "-n", 20, "The").stdout)
        for _ in range(2)
    )
    assert first["seed"] != second["seed"] and first["tokens"] != second["tokens"]
    again = json.loads(
        inside(
            "generate", "-m", trained[0], "--json", "-n", 20, "--seed", first["seed"], "The"
        ).stdout
    )
    assert again == first


def test_temperature_0_is_greedy_whatever_the_seed(generate):
    first, second = (
        generate("--temperature", 0, "--seed", seed, "-n", 20, "The") for seed in (1, 2)
    )
    assert first == second
    one = json.loads(generate("--temperature", 0, "-n", 5, "--json", "The"))
    assert one["tokens"] == json.loads(generate("--top-k", 1, "-n", 5, "--json", "The"))["tokens"]


def test_a_stop_text_ends_the_continuation_before_it(generate):
    whole = json.loads(generate("-n", 60, "--json", "The"))
    stop = whole["text"][5:8]
    cut = json.loads(generate("-n", 60, "--json", "--stop", stop, "--stop", "never said", "The"))
    assert (
        cut["text"] == whole["text"][: whole["text"].index(stop)] and cut["finish_reason"] == "stop"
    )
    assert (
        generate("-n", 60, "--stop", stop, "The") == cut["text"] + "\n"
    )  # streamed: nothing of it was written


def test_max_new_tokens_and_its_reason(generate):
    row = json.loads(generate("-n", 3, "--json", "The"))
    assert len(row["tokens"]) == 3 and row["finish_reason"] == "length"
    assert generate("--max_new_tokens", 3, "The") == row["text"] + "\n"  # _ as well as -


def test_whole_takes_all_of_standard_input_as_one_prompt(generate):
    text = b"The baker\nand the miller\n"
    row = json.loads(generate("--whole", "--json", "-n", 4, stdin=text))
    assert row["prompt"] == text.decode()
    assert generate("--whole", "--echo", "-n", 4, stdin=text) == text.decode() + row["text"] + "\n"


def test_nul_separates_prompts_and_results(generate):
    out = generate("-0", "--echo", "-n", 4, stdin=b"one\nline\0two")
    assert (
        out.endswith("\0")
        and len(out.split("\0")) == 3
        and out.startswith("one\nline")
        and "\0two" in out
    )


def test_an_echoed_prompt_is_escaped_like_its_continuation(generate):
    line = generate("--echo", "-n", 2, stdin=b"a\tb\\c\rd\r\n")
    assert line.startswith("a\\tb\\\\c\\rd") and line.count("\n") == 1


class TestLongPrompts:
    LONG = "The baker went home. " * 40

    def test_the_error_says_by_how_much(self, inside, trained, generate):
        lm = lmcli.load(trained[0])
        count = len(lm.prompt(self.LONG))
        message = f"the prompt has {count} tokens, {count - 64} more than the context of 64"
        done = inside("generate", "-m", trained[0], self.LONG)
        assert done.returncode == 1 and done.stdout == b""
        assert done.stderr.decode().startswith(f"lm: error: {message}\n  shorten it, or ")
        text = f"The\n{self.LONG}\nA\n".encode()
        done = inside("generate", "-m", trained[0], "-n", 2, stdin=text)
        assert done.returncode == 1 and f"standard input, line 2: {message}" in str(done.stderr)
        out = generate("-n", 2, "--on-error", "blank", stdin=text).split("\n")
        assert len(out) == 4 and out[0] and not out[1] and out[2]
        with pytest.raises(UserError, match=message):
            lm.generate(self.LONG)
        with pytest.raises(UserError, match=message):
            lm.stream(self.LONG)

    def test_what_is_read_of_them(self, inside, trained):
        lm = lmcli.load(trained[0])
        ids = lm.prompt(self.LONG)
        bos, options = lm.bos_ids(), {"temperature": 0.0, "max_new_tokens": 5}
        for how, newest in ("slide", 32 - len(bos)), ("truncate", 59 - len(bos)):
            (result,) = lm.generate(self.LONG, on_long=how, **options)
            expected = lm.decoder(**options).generate([bos + ids[-newest:]], [0])[0]
            assert result.tokens == expected.tokens
            arguments = ("--on-long", how, "--temperature", 0, "-n", 5, "--json")
            row = json.loads(inside("generate", "-m", trained[0], *arguments, self.LONG).stdout)
            assert row["tokens"] == result.tokens and row["prompt"] == self.LONG

    def test_a_text_that_outgrows_the_context_says_so_once(self, inside, trained):
        options = ("-m", trained[0], "--seed", 7, "-n", 70)
        prompts = b"The\n" * 8
        stderr = inside("generate", *options, stdin=prompts).stderr.decode()
        rows = inside("generate", *options, "--json", "-q", stdin=prompts)
        rows = [json.loads(line) for line in rows.stdout.splitlines()]
        start = len(lmcli.load(trained[0]).prompt("The"))
        count = sum(start + len(row["tokens"]) > 65 for row in rows)
        assert f"lm: {count} texts are longer, with the prompt, than the context of 64" in stderr
        assert stderr.count("\n") == 1 and count > 1
        assert inside("generate", *options, "-q", "The").stderr == b""
        assert inside("generate", *options, "-n", 70, "--stop", "e", "The").stderr == b""


class TestAlternatives:
    def test_they_stand_in_json(self, inside, generate):
        arguments = ("-n", 6, "--json", "The", "A")
        plain, more = generate(*arguments), generate(*arguments, "--logprobs", 3)
        for before, after in zip(map(json.loads, plain.splitlines()), more.splitlines()):
            row = json.loads(after)
            steps = row.pop("alternatives")
            assert row == before and len(steps) == len(row["tokens"])
            for token, logprob, step in zip(row["tokens"], row["token_logprobs"], steps):
                values = [each["logprob"] for each in step]
                assert len(step) == 3 and values == sorted(values, reverse=True)
                same = [each["logprob"] for each in step if each["token"] == token]
                assert same == [logprob] or values[-1] >= logprob
        for count in (1, 10_000):
            row = json.loads(generate("-n", 1, "--json", "--logprobs", count, "The"))
            assert len(row["alternatives"][0]) == min(count, 512)
        total = sum(math.exp(each["logprob"]) for each in row["alternatives"][0])
        assert total == pytest.approx(1, abs=1e-3)

    def test_why_has_a_line_for_each_token(self, generate):
        arguments = ("-n", 6, "The")
        row = json.loads(generate(*arguments, "--json", "--logprobs", 5))
        out = generate(*arguments, "--why")
        assert out.startswith(f"{row['text']}\n\n") and out.endswith("\n\n") and "\x1b" not in out
        lines = out.removesuffix("\n\n").split("\n")[-6:]
        for line, token, logprob, step in zip(
            lines, row["tokens"], row["token_logprobs"], row["alternatives"], strict=True
        ):
            shares = [float(share) for share in re.findall(r"([\d.]+)%", line)]
            expected = [100 * math.exp(each["logprob"]) for each in step if each["token"] != token]
            assert shares == pytest.approx([100 * math.exp(logprob), *expected], abs=0.51)
        assert len(re.findall("%", generate(*arguments, "--why", "--logprobs", 1))) <= 12
        several = generate("--why", "-n", 2, "--num-samples", 2, stdin=b"The\nA\n")
        assert several.count("\n\n") == 8

    def test_a_stop_text_and_echo(self, generate):
        out = generate("-n", 60, "--why", "--echo", "--stop", "e", "The")
        alone = generate("-n", 60, "--echo", "--stop", "e", "The")
        assert out.startswith(alone + "\n")


def test_verbose_tells_how_fast_texts_came(inside, trained):
    options = ("generate", "-m", trained[0], "-v", "-n", 4, "--seed", 7)
    for texts, stdin, pattern in (
        (("The",), b"", r"4 tokens, [\d,.]+ tokens/s, the first after \d\.\d\d s"),
        ((), b"The\nA\n", r"2 texts, 8 tokens, [\d,.]+ tokens/s, the first after \d\.\d\d s"),
        (("--num-beams", 2, "The"), b"", r"4 tokens, [\d,.]+ tokens/s"),
        ((), b"", r"0 tokens"),
    ):
        done = inside(*options, *texts, stdin=stdin)
        last = done.stderr.decode().splitlines()[-1]
        assert done.returncode == 0 and re.fullmatch(f"lm: {pattern}", last)


def test_generation_continues_beyond_the_context(generate):
    rows = map(json.loads, generate("-n", 150, "--json", "--num-samples", 8, "The").splitlines())
    assert (
        max(len(row["tokens"]) for row in rows) == 150
    )  # of eight, one at least meets no end of text


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (("--temperature", "-1", "a"), "--temperature"),
        (("--top-p", "1.5", "a"), "--top-p"),
        (("-n", "0", "a"), "-n"),
        (("--stop", "", "a"), "--stop"),
        (("\udcff",), "UTF-8"),
        (("--num-samples", "3", "--num-beams", "2", "a"), "num-beams"),
        (("--logprobs", "0", "--json", "a"), "--logprobs"),
        (("--logprobs", "3", "a"), "--logprobs needs --json or --why"),
        (("--why", "--json", "a"), "--why and --json exclude each other"),
        (("-i", "--why"), "-i and --why exclude each other"),
        (("-i", "--on-long", "slide"), "-i and --on-long exclude each other"),
    ],
)
def test_impossible_options_are_usage_errors(inside, trained, arguments, expected):
    done = inside("generate", "-m", trained[0], *arguments)
    assert done.returncode == 2 and expected in done.stderr.decode() and done.stdout == b""


def test_invalid_utf8_on_standard_input_is_named(inside, trained):
    done = inside("generate", "-m", trained[0], "-n", 2, stdin=b"fine\n\xff\n")
    assert done.returncode == 1 and b"standard input, line 2" in done.stderr


def test_text_is_streamed(trained, environment):
    command = [
        sys.executable,
        "-m",
        "lmcli",
        "generate",
        "-m",
        trained[0],
        "-n",
        "20000",
        "--stop",
        "never said",
        "--temperature",
        "0",
        "--echo",
        "The baker",
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    ) as process:
        assert select.select([process.stdout], [], [], 60)[0]
        assert os.read(process.stdout.fileno(), 100).startswith(b"The baker")
        time.sleep(0.1)
        assert process.poll() is None  # it is still at work, and what it has written can be read
        process.kill()


def test_head_ends_generation_quietly(trained, piped):
    done = piped(1, "generate", "-m", trained[0], "-n", 4, "--seed", 1, line="The baker")
    assert done.returncode == 141 and done.stderr == b""


def test_texts_of_a_form_in_every_way_of_writing_them(inside, trained, tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "array", "items": {"enum": [1, 2]}, "maxItems": 2}')
    generate = partial(inside, "generate", "-m", trained[0], "--seed", 7)
    texts = generate("--choices", '["a, b", "c"]', "--num-samples", 9, "The").stdout.decode()
    assert {*texts.splitlines()} == {"a, b", "c"}
    lines = generate("--choices", "x,y", "--best-of", 3, stdin=b"The\nA\n").stdout.decode()
    assert re.fullmatch("[xy]\n[xy]\n", lines)
    rows = generate("--json-schema", schema, "--json", stdin=b"The\nA\nB\n").stdout.splitlines()
    assert all(isinstance(json.loads(json.loads(row)["text"]), list) for row in rows)
    cut = generate("--regex", "[0-9]{50}", "-n", 5, "The")
    assert re.fullmatch(rb"[0-9]{5,}\n", cut.stdout)
    assert b"1 text was cut before having the form; -n gives more tokens" in cut.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--choices", "[1"), "--choices: not a JSON list"),
        (("--choices", "a,,b"), "--choices: must not be empty"),
        (("--regex", ""), "--regex: must not be empty"),
        (("--json-schema", "none.json"), "--json-schema: none.json: No such file"),
        (("--json-schema", '{"type": "x"}'), "--json-schema: "),
        (("--regex", "a", "--stop", "b"), "--regex: --stop would cut"),
        (("--regex", "a", "--num-beams", "2"), "--regex: beam search (2 beams) is not supported"),
        (("--ban", ""), "--ban: must not be empty"),
        (("--logit-bias", "the"), "--logit-bias: 'the' is not TOKEN=VALUE"),
        (("--best-of", "2", "--temperature", "0"), "--best-of 2 needs texts that are drawn"),
        (("--best-of", "2", "--num-samples", "3"), "--best-of 2 is less than --num-samples 3"),
    ],
)
def test_impossible_forms_and_rules_are_usage_errors(inside, trained, arguments, message):
    done = inside("generate", "-m", trained[0], *arguments, "The")
    assert done.returncode == 2 and done.stdout == b""
    assert message in done.stderr.decode() and len(done.stderr.splitlines()) <= 2
