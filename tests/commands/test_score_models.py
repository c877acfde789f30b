"""`lm score` with several models, kept fields, limits, best and worst words, and painted pages."""

import csv
import gc
import io
import json
import math
import re
import shutil
from html.parser import HTMLParser
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
from safetensors.torch import load_file, save_file

from lmcli.errors import UserError

CORPUS = (
    "item,condition,sentence\n"
    '1,a,"The baker slept all day, ""well""."\n'
    "1,b,The day slept all baker.\n"
    "2,a,\n"
    '2,b,"two\nlines 却说 x"\n'
)
FIGURES = ("surprisal_small", "surprisal_louder", "surprisal_gpt")


@pytest.fixture(scope="module")
def models(trained, small_tokenizer, tmp_path_factory):
    """Three models: the trained one, the same with other weights, and one of another tokenizer."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(trained[0], folder / "louder")
    weights = load_file(folder / "louder" / "model.safetensors")
    save_file(
        {name: tensor * 1.5 for name, tensor in weights.items()},
        folder / "louder" / "model.safetensors",
        {"format": "pt"},
    )
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    GPT2LMHeadModel(GPT2Config(vocab_size=512, **sizes, **ids)).save_pretrained(folder / "gpt")
    small_tokenizer.save(folder / "gpt")
    return [trained[0], folder / "louder", folder / "gpt"]


@pytest.fixture
def score(inside):
    """score(models, *arguments, stdin=b""): the finished process, with exit code 0."""

    def call(models, *arguments, stdin=b""):
        done = inside("score", *(x for m in models for x in ("-m", m)), *arguments, stdin=stdin)
        assert done.returncode == 0, done.stderr.decode()
        return done

    return call


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.csv"
    path.write_text(CORPUS, encoding="utf-8")
    return path


def table(done) -> list[dict]:
    return list(csv.DictReader(io.StringIO(done.stdout.decode()), delimiter="\t", quoting=3))


def objects(done) -> list[dict]:
    return [json.loads(line) for line in done.stdout.decode().splitlines()]


@pytest.mark.parametrize("format", ["csv", "tsv", "jsonl"])
def test_the_reading_time_study(score, models, tmp_path, format):
    """Every word under three models with item and condition, equal to the bit to single runs."""
    rows = list(csv.DictReader(io.StringIO(CORPUS)))
    file = tmp_path / f"corpus.{format}"
    if format == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif format == "tsv":
        lines = [
            "\t".join(each).replace("\n", " ") for each in ([*rows[0]], *(r.values() for r in rows))
        ]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        file.write_text(CORPUS, encoding="utf-8")
    options = (file, "--per", "word", "--field", "sentence")
    study = table(score(models, *options, "--keep", "item,condition"))
    assert list(study[0]) == [
        *("record", "item", "condition", "index", "piece", "start", "end", "bytes"),
        *FIGURES,
    ]
    words = [
        (str(k), r["item"], r["condition"], w)
        for k, r in enumerate(rows, 1)
        for w in r["sentence"].split()
    ]
    assert [(r["record"], r["item"], r["condition"], r["piece"]) for r in study] == words
    for model, name in zip(models, FIGURES):
        alone = [row["surprisal"] for row in table(score([model], *options))]
        assert [row[name] for row in study] == alone
    assert len({row["surprisal_small"] for row in study}) > 5
    together = objects(score(models, *options, "--keep", "item,condition", "--json"))
    for model, name in zip(models, ("small", "louder", "gpt")):
        alone = objects(score([model], *options, "--json"))
        for row, single in zip(together, alone, strict=True):
            assert row[f"logprob_{name}"] == single["logprob"] and row["text"] == single["text"]
            for piece, other in zip(row["pieces"], single["pieces"], strict=True):
                assert piece[f"surprisal_{name}"] == other["surprisal"]
                assert piece[f"logprob_{name}"] == other["logprob"]
    assert [(r["record"], r["item"], "sentence" in r) for r in together] == [
        (1, "1", False),
        (2, "1", False),
        (3, "2", False),
        (4, "2", False),
    ]


def test_records_of_several_models(score, models, corpus):
    rows = table(score(models, corpus, "--field", "sentence"))
    assert list(rows[0]) == [
        "record",
        *(
            f"{figure}_{m}"
            for figure in ("logprob", "bits_per_byte")
            for m in ("small", "louder", "gpt")
        ),
        "text",
    ]
    for model, name in zip(models, ("small", "louder", "gpt")):
        alone = table(score([model], corpus, "--field", "sentence"))
        for figure in ("logprob", "bits_per_byte"):
            assert [row[f"{figure}_{name}"] for row in rows] == [row[figure] for row in alone]
    assert rows[2]["bits_per_byte_small"] == "NA"


def test_tokens_of_several_models_are_those_of_transformers(score, models):
    import torch
    from transformers import AutoModelForCausalLM

    from lmcli.text import tokenizer as tokenizers

    text = "The baker slept all day."
    rows = table(score(models[:2], "--per", "token", stdin=f"{text}\n".encode()))
    for folder, name in zip(models, FIGURES[:2]):
        tokenizer = tokenizers.load(folder)
        ids = [*tokenizer.prefix, *tokenizer.encode(text)]
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([ids])).logits[0]
        logprobs = logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]]
        expected = [-float(x) / math.log(2) for x in logprobs]
        assert [float(row[name]) for row in rows] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--per", "token"), "small and gpt have different tokenizers"),
        (("--pairs",), "several -m and --pairs exclude each other"),
        (("--alternatives", 2), "several -m and --alternatives"),
        (("-m", "SAME"), "-m: small is given twice"),
    ],
)
def test_what_several_models_cannot_do(inside, models, arguments, message):
    arguments = [models[0] if each == "SAME" else each for each in arguments]
    done = inside("score", "-m", models[0], "-m", models[2], *arguments, stdin=b"a\tb\n")
    assert done.returncode == 2 and message in done.stderr.decode() and not done.stdout


def test_kept_fields_in_every_form(score, inside, models, tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [
        {"text": "a b", "n": 1, "t": "x\ty", "index": None},
        {"text": "c", "n": [1], "t": "", "index": True},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    one = models[:1]
    records = table(score(one, file, "--keep", "n,t,text"))
    assert [list(row.values())[:4] for row in records] == [
        ["1", "1", "x\\ty", "a b"],
        ["2", "[1]", "", "c"],
    ]
    assert list(records[0])[:4] == ["record", "n", "t", "given_text"]
    words = table(score(one, file, "--keep", "index", "--per", "word"))
    assert [(r["given_index"], r["index"]) for r in words] == [
        ("NA", "0"),
        ("NA", "1"),
        ("true", "0"),
    ]
    worst = table(score(one, file, "--keep", "n", "--worst", 1))
    assert list(worst[0])[:2] == ["record", "n"] and len(worst) == 1
    for extra, message in (
        (("--keep", "m"), "line 1: no field 'm' among 'text', 'n', 't', 'index'"),
        (("--keep", "n", "--format", "text"), "line 1: is plain text, without a field 'n'"),
    ):
        done = inside("score", "-m", models[0], file, *extra)
        assert done.returncode == 1 and message in done.stderr.decode()
    blank = table(score(one, file, "--keep", "m", "--on-error", "blank"))
    assert [row["m"] for row in blank] == ["NA", "NA"]


def test_numbers_of_records_count_all_files_and_skipped_ones(score, models, tmp_path):
    (tmp_path / "a.csv").write_text('id,text\n7,"x\ny"\n\n8,z\n')
    (tmp_path / "b.jsonl").write_text('{"id": 1, "text": 3}\n{"id": 2, "text": "w"}\n')
    files = (tmp_path / "a.csv", tmp_path / "b.jsonl")
    rows = table(score(models[:1], *files, "--keep", "id", "--on-error", "skip"))
    assert [(row["record"], row["id"]) for row in rows] == [("1", "7"), ("2", "8"), ("4", "2")]


LINES = b"The baker went home.\n\nqZ9# home qZ9#\nThe baker went home.\n"


def test_limits_select_records_and_words(score, models):
    every = table(score(models[:1], stdin=LINES))
    value = sorted(float(row["bits_per_byte"]) for row in every if row["bits_per_byte"] != "NA")[1]
    low, high = (
        table(score(models[:1], option, value + 1e-3, stdin=LINES))
        for option in ("--below", "--above")
    )
    assert [row["text"] for row in low] == ["The baker went home."] * 2
    assert [row["text"] for row in high] == ["qZ9# home qZ9#"]
    words = table(score(models[:1], "--per", "word", stdin=LINES))
    middle = sorted(float(row["surprisal"]) for row in words)[4]
    some = table(score(models[:1], "--per", "word", "--above", middle, stdin=LINES))
    assert some == [row for row in words if float(row["surprisal"]) > middle] and some
    lines = objects(score(models[:1], "--per", "word", "--above", middle, "--json", stdin=LINES))
    pieces = [piece["piece"] for line in lines for piece in line["pieces"]]
    assert pieces == [row["piece"] for row in some] and all(line["pieces"] for line in lines)
    # several models: by the first one
    both = table(score(models[:2], "--per", "word", "--above", middle, stdin=LINES))
    assert [row["surprisal_small"] for row in both] == [row["surprisal"] for row in some]


def test_best_and_worst_words_with_their_context(score, models):
    words = table(score(models[:1], "--per", "word", stdin=LINES))
    distinct = {(row["surprisal"], row["piece"]) for row in words}
    assert len(distinct) == len(words) - 4  # the line that stands twice
    for option, sign in (("--worst", -1), ("--best", 1)):
        rows = table(score(models[:1], "--per", "word", option, 3, stdin=LINES))
        expected = sorted(distinct, key=lambda each: sign * float(each[0]))[:3]
        assert [(row["surprisal"], row["piece"]) for row in rows] == expected
        assert all(f"«{row['piece']}»" in row["context"] for row in rows)
        assert all(
            row["context"].replace("«", "").replace("»", "").encode() in LINES for row in rows
        )
        found = objects(score(models[:1], "--per", "word", option, 3, "--json", stdin=LINES))
        assert [(o["piece"], o["line"], o["context"]) for o in found] == [
            (row["piece"], int(row["line"]), row["context"]) for row in rows
        ]
    best = table(score(models[:1], "--best", 1, stdin=LINES))
    assert best[0]["text"] == "The baker went home." and best[0]["line"] == "1"


def test_words_are_colored_as_a_whole(score, models):
    text = "  The baker 却说 qZ9#\tx "
    painted = score(
        models[:1], "--color", "--per", "word", stdin=f"{text}\n".encode()
    ).stdout.decode()
    assert re.sub(r"\x1b\[[0-9;]*m", "", painted) == f"{text}\n"
    assert re.search(r"\x1b\[48;5;203;38;5;16mqZ9#\x1b\[0m", painted)
    both = score(models[:2], "--color", stdin=b"The baker\n").stdout.decode().splitlines()
    assert [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in both] == [
        "small   The baker",
        "louder  The baker",
    ]


EVIL = 'The <script>alert("x")</script> & \x1b[2J\u202e却说 \ufffe'


class Page(HTMLParser):
    """The text, tags and tooltips of a page."""

    def __init__(self, text):
        super().__init__()
        self.text, self.tags, self.titles = "", set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.titles += [value for name, value in attributes if name == "title"]

    def handle_data(self, data):
        self.text += data


def test_pages_are_whole_safe_and_side_by_side(score, models, tmp_path):
    html, svg = tmp_path / "page.html", tmp_path / "page.svg"
    options = ("--per", "word", "--html", html, "--svg", svg)
    done = score(models[:2], *options, stdin=f"{EVIL}\n\nhome\n".encode())
    assert done.stdout.decode().splitlines() == [str(html), str(svg)]
    page = Page(html.read_text(encoding="utf-8"))
    assert "script" not in page.tags and page.text.count('<script>alert("x")</script>') == 2
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", page.text)
    assert "small" in page.text and "louder" in page.text
    words = table(score(models[:2], "--per", "word", stdin=f"{EVIL}\n\nhome\n".encode()))
    for name in FIGURES[:2]:
        assert all(f"{float(row[name]):.2f} bits" in page.titles for row in words)
    root = ElementTree.parse(svg).getroot()
    drawn = "".join(root.itertext())
    assert "alert(" in drawn and {each.tag.split("}")[1] for each in root.iter()} == {
        *("svg", "style", "g", "rect", "text", "title")
    }
    width = float(root.get("width"))
    texts = [each for each in root.iter() if each.tag.endswith("}text")]
    ends = [float(each.get("x")) + float(each.get("textLength") or 0) for each in texts]
    assert max(ends) <= width
    for file in (html, svg):
        text = file.read_text(encoding="utf-8")
        assert "prefers-color-scheme:dark" in text and not re.search(
            r"src=|href=\"[^#]|@import|url\(", text
        )


def test_a_page_alone_on_standard_output_and_two_in_one_file(score, inside, models, tmp_path):
    page = score(models[:1], "--html", "-", stdin=b"home\n").stdout.decode()
    assert page.startswith("<!doctype html>") and page.endswith("</html>\n")
    file = tmp_path / "x"
    for options, message in (
        (("--html", "-", "--color"), "--html and --color exclude each other"),
        (("--html", file, "--svg", f"{tmp_path}/./x"), "--html and --svg exclude each other"),
    ):
        done = inside("score", "-m", models[0], *options, stdin=b"home\n")
        assert done.returncode == 2 and message in done.stderr.decode() and not done.stdout
    assert not file.exists()


def test_a_page_of_an_interrupted_run_stays_as_a_part(inside, models, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "home"}\n{"text": 3}\n')
    html = tmp_path / "page.html"
    html.write_text("the page before")
    done = inside("score", "-m", models[0], rows, "--html", html)
    assert done.returncode == 1 and b"line 2" in done.stderr
    assert html.read_text() == "the page before"
    assert (tmp_path / "page.html.part").read_text().startswith("<!doctype html>")


def test_names_of_columns_are_escaped_like_cells(score, models, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "home", "a\tb\nc": "x"}) + "\n")
    header, row = score(models[:1], rows, "--keep", "a\tb\nc").stdout.decode().splitlines()
    assert header.split("\t")[:2] == ["record", r"a\tb\nc"] and row.split("\t")[:2] == ["1", "x"]


def test_the_screen_of_a_study(screen, models, corpus):
    options = [x for model in models for x in ("-m", model)]
    options += ["--per", "word", "--field", "sentence", "--keep", "item"]
    shown = screen("score", *options, corpus, columns=60)
    assert shown.code == 0 and max(map(len, shown.lines)) <= 60
    missing, titles, *rows = shown.lines
    assert missing == "not shown at this width: end, start"
    assert re.split(r" +", titles)[-3:] == ["small", "louder", "gpt"]
    row = r" +1  1 +(0  )?The .* \d+\.\d\d +\d+\.\d\d +\d+\.\d\d"
    assert re.fullmatch(row, rows[0]), shown.text


@pytest.fixture
def little_memory(monkeypatch):
    """Memory for one model, and none for two."""
    monkeypatch.setattr("lmcli.model.device.available_memory", lambda device: 1000)


FORMS = [("--per", "word", "--json", "--keep", "item"), ("--color",), ("--worst", 2)]


@pytest.mark.parametrize("form", FORMS)
def test_models_that_do_not_fit_together_give_the_same_bytes(
    score, models, corpus, monkeypatch, form
):
    models = models[::2]
    options = (corpus, "--field", "sentence", *form)
    expected = score(models, *options)
    monkeypatch.setattr("lmcli.model.device.available_memory", lambda device: 1000)
    alone = score(models, *options)
    assert alone.stdout == expected.stdout
    line = b"small, gpt: 0.0 GB of weights, and 0.0 GB of memory are available: scored one"
    assert line in alone.stderr and line not in expected.stderr


def test_only_one_model_at_a_time_is_in_memory(score, models, little_memory, monkeypatch):
    from lmcli.scoring.scorer import Scorer

    alive = []

    def counted(self, texts, *options):
        alive.append(sum(isinstance(each, Scorer) for each in gc.get_objects()))
        return plain(self, texts, *options)

    plain = Scorer.score
    monkeypatch.setattr(Scorer, "score", counted)
    assert score(models[::2], "--per", "word", stdin=LINES).stdout and alive == [1, 1]


def test_a_bad_record_comes_after_what_was_read(inside, models, little_memory, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n{"text": 3}\n')
    options = [x for m in models for x in ("-m", m)]
    done = inside("score", *options, rows, tmp_path / "missing.txt", "-o", tmp_path / "out")
    assert done.returncode == 1 and b"missing.txt" in done.stderr
    (tmp_path / "good.txt").write_text("a b\n" * 3)
    done = inside("score", *options, tmp_path / "good.txt", rows, "-o", tmp_path / "out")
    assert done.returncode == 1 and b"rows.jsonl, line 2" in done.stderr
    assert len((tmp_path / "out.part").read_text().splitlines()) == 4  # as without


def test_several_processes_need_memory_for_all(models, little_memory):
    from lmcli.api import load
    from lmcli.commands.score import _exceeds_memory

    args = SimpleNamespace(pool=SimpleNamespace(size=2), quiet=False)
    loaded = [load(model, lazy=True) for model in models[:2]]
    with pytest.raises(UserError, match=r"a process needs .* of weights"):
        _exceeds_memory(loaded, ["a", "b"], args)
    assert not _exceeds_memory(loaded[:1], ["a"], args)


def test_all_models_have_the_same_words(score, models, berts):
    """Spaces of Unicode, marks, bytes that are no letters: words are those of the text alone."""
    text = "a\u00a0b\u3000c e\u0301 \u200b x\u0085y \ufffd\u2028\U0001f469\u200d\U0001f467 "
    text += "\x1f\t[MASK] \u0130\n"
    both = [*models, berts / "masked"]
    rows = table(score(both, "--per", "word", stdin=text.encode()))
    assert [row["piece"] for row in rows] == [
        word.replace("\t", "\\t") for word in text[:-1].split()
    ]
