"""What a notebook shows of results, models and runs, and what they are as tables."""

import copy
import json
import pickle
import re
import sys
import types
from contextlib import nullcontext
from html.parser import HTMLParser

import pytest

import lmcli
from lmcli.checkpoints import folder as checkpoints
from lmcli.config import GenerateConfig
from lmcli.errors import UserError
from lmcli.generation.decoding import Generated
from lmcli.scoring.classifier import Classification, LabeledToken
from lmcli.scoring.question_answering import Answer
from lmcli.terminal import notebook, progress
from lmcli.terminal.notebook import Results, Table, html_table, painted_html
from lmcli.terminal.painted_text import Segment, segments

HOSTILE = "<script>alert('1 & 2')</script>\x1b[31m \u202e"


class Reader(HTMLParser):
    """The texts, tags and titles of a page; `open` are tags that were not closed."""

    def __init__(self, html):
        super().__init__()
        self.texts, self.tags, self.titles, self.open = [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == [] and "script" not in self.tags

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag != "img":
            self.open.append(tag)
        self.titles += [value for name, value in attributes if name == "title"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def lm(small_model, small_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    checkpoints.save(folder, small_model(), small_tokenizer, GenerateConfig(max_new_tokens=3))
    return lmcli.load(str(folder), device="cpu")


@pytest.mark.parametrize("per", ["token", "word"])
def test_scores_are_the_painted_text(lm, per):
    texts = ["The old dog é 日本 🙂.", HOSTILE.replace("\x1b", "")]
    scores = lm.score(texts, per=per)
    page = Reader(scores._repr_html_())
    assert "".join(page.texts) == texts[0] + texts[1].replace("\u202e", "<U+202E>")
    bits = [piece.surprisal for score in scores for piece in score.pieces]
    shown = {f"{each:.2f} bits" for each in bits if each is not None}
    assert set(page.titles) <= shown | {"not scored"} and len(page.titles) > 5
    one = Reader(scores[0]._repr_html_())
    assert "".join(one.texts).replace(" ", "").startswith("Theolddog")


def test_scores_of_records_are_a_table(lm):
    scores = lm.score(["One two.", HOSTILE])
    page = Reader(scores._repr_html_())
    assert page.tags.count("tr") == 3 and f"{scores[0].bits_per_byte:.4g}" in page.texts
    assert "<script>alert('1 & 2')</script>␛[31m <U+202E>" in page.texts
    row = scores.rows()[0]
    assert row == {
        **{"record": 1, "input": "One two.", "logprob": scores[0].logprob},
        **{"tokens": scores[0].tokens, "bytes": 8, "bits_per_byte": scores[0].bits_per_byte},
    }


def test_shades_are_those_of_the_terminal():
    from lmcli.terminal.painted_text import HEX, SHADES

    def hexadecimal(color):  # xterm's 6 × 6 × 6 colors
        levels = (color - 16) // 36, (color - 16) // 6 % 6, (color - 16) % 6
        return "#" + "".join(f"{0 if not n else 55 + 40 * n:02x}" for n in levels)

    assert {color: hexadecimal(color) for _, color in SHADES} == HEX


def test_parts_keep_every_character_once():
    text = "aé日🙂b"
    data = text.encode()
    for size in range(1, len(data)):  # pieces that end within characters
        pieces = [(i, min(i + size, len(data)), 1.0) for i in range(0, len(data), size)]
        assert "".join(part for part, _ in segments(text, pieces)) == text
    assert segments(" ab ", [(1, 2, None), (2, 3, 9.0)]) == [
        *((" ", 0.0), ("a", None)),
        *(("b", 9.0), (" ", 0.0)),
    ]
    html = painted_html(
        [Segment("a", None), Segment("b", 9.0), Segment(" ", 0.0), Segment("c", 1.0)]
    )
    assert re.findall(r"<span([^>]*)>", html) == [
        ' title="not scored" style="opacity:.65"',
        ' title="9.00 bits" style="background:#ffaf5f;color:#000"',
        ' title="1.00 bits"',
    ]


def test_generated_texts_and_perplexity(lm):
    texts = lm.generate(["Once", "There"], num_samples=2, seed=1, temperature=1.0)
    assert [row["record"] for row in texts.rows()] == [1, 2, 3, 4]
    assert [row["input"] for row in texts.rows()] == ["Once", "Once", "There", "There"]
    assert [row["logprob"] for row in texts.rows()] == [sum(t.token_logprobs) for t in texts]
    Reader(texts._repr_html_())
    figures = lm.perplexity("One two three.")
    assert f"{figures.bits_per_byte:.4g}" in Reader(figures._repr_html_()).texts
    assert f"{figures.bits_per_byte:.4f} bits/byte" in repr(figures)


def test_labels_and_answers():
    whole = Classification(["<b>"], {"<b>": 0.75, "c": 0.25}, [1.0, 0.0])
    token = LabeledToken(["PER"], {"PER": 0.9}, [0.0], "Ada", 0, 3)
    results = Results([whole, Classification(pieces=[token])], ["x", ("a", "b")])
    assert results.rows() == [
        {"record": 1, "input": "x", "labels": "<b>", "probability": 0.75, "<b>": 0.75, "c": 0.25},
        {
            **{"record": 2, "input_1": "a", "input_2": "b", "index": 0, "piece": "Ada"},
            **{"start": 0, "end": 3, "label": "PER", "probability": 0.9},
        },
    ]
    page = Reader(results._repr_html_())
    assert "b" not in page.tags and "<b>" in page.texts and "–" in page.texts
    answers = Results([Answer("at home", 0.5, 3, 10, 0.1)], [{"question": "q", "context": "c"}])
    assert answers.rows() == [
        {
            **{"record": 1, "question": "q", "context": "c", "answer": "at home"},
            **{"score": 0.5, "start": 3, "end": 10, "no_answer": 0.1},
        }
    ]


class TestLists:
    def test_results_are_lists(self):
        results = Results(
            [Generated(str(n), "stop", [1] * 900, [0.5] * 900, n) for n in range(9)], "x" * 9
        )
        assert isinstance(results, list) and results == list(results) and len(results) == 9
        assert results[2:4] == [results[2], results[3]] and json.dumps(Table([1, 2])) == "[1, 2]"
        for same in (
            copy.copy(results),
            copy.deepcopy(results),
            pickle.loads(pickle.dumps(results)),
        ):
            assert same == results and same.rows() == results.rows()

    def test_they_are_short_as_text(self):
        results = Results([Generated("a", "stop", [1] * 900, [0.5] * 900, 7)] * 9, "x" * 9)
        assert repr(results[0]) == ("Generated(text='a', finish_reason='stop', seed=7, problem='')")
        assert repr(results).endswith(", … 4 more]") and len(repr(results)) < 500

    def test_a_long_table_is_cut(self):
        page = Reader(html_table([{"n": n, "x": None, "big": 12345678.9} for n in range(1234)]))
        assert page.tags.count("tr") == 51 and page.texts[-1] == "… 1,184 more rows"
        assert "12,345,679" in page.texts

    def test_to_pandas(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "pandas", None)
        with pytest.raises(UserError) as caught:
            Table([{"a": 1}]).to_pandas()
        assert (caught.value.what, caught.value.hint) == (
            "to_pandas needs pandas",
            "pip install pandas",
        )
        monkeypatch.undo()
        pandas = pytest.importorskip("pandas")
        frame = Results([Generated("a", "stop", [1], [-0.5], 7)], ["x"]).to_pandas()
        assert isinstance(frame, pandas.DataFrame)
        assert frame.to_dict("records") == [
            {
                **{"record": 1, "input": "x", "text": "a", "finish_reason": "stop"},
                **{"tokens": 1, "logprob": -0.5, "seed": 7},
            }
        ]


def test_a_model_is_a_table(lm):
    page = Reader(lm._repr_html_())
    count = f"{sum(weight.numel() for weight in lm.model.parameters()):,}"
    assert count in page.texts and "a language model (decoder)" in page.texts
    assert repr(lm) == f"<lmcli.Model {lm.name}: a language model (decoder), {count} parameters>"


class TestProgress:
    @pytest.fixture
    def kernel(self, monkeypatch):
        """What a kernel of IPython displays: a list of (what happened, its data)."""
        shown = []

        class Handle:
            def update(self, data, raw):
                shown.append(data["text/plain"])

        def display(data, raw, display_id):
            shown.append(data["text/plain"])
            return Handle()

        ipython = types.ModuleType("IPython")
        ipython.get_ipython = lambda: types.SimpleNamespace(kernel=object())
        ipython.display = types.ModuleType("IPython.display")
        ipython.display.display = display
        monkeypatch.setitem(sys.modules, "IPython", ipython)
        monkeypatch.setitem(sys.modules, "IPython.display", ipython.display)
        monkeypatch.setattr(notebook, "SECONDS_BEFORE", 0.0)
        monkeypatch.setattr(notebook, "SECONDS_BETWEEN", 0.0)
        return shown

    def test_long_work_draws_one_line_that_ends_empty(self, kernel, lm):
        lm.score(["One two three.", "Four."] * 40, batch=64)
        percents = [int(re.search(r"(\d+)(\.\d)? %", text)[1]) for text in kernel if "%" in text]
        assert percents == sorted(percents) and len(set(percents)) > 5
        assert kernel[-1] == "" and "scoring" in kernel[0]
        assert not progress.is_watched()

    @pytest.mark.parametrize("work", ["generate", "perplexity"])
    def test_other_work_does_too(self, kernel, lm, work):
        getattr(lm, work)("Once upon a time")
        assert {"generate": "generating", "perplexity": "scoring"}[work] in kernel[0]
        assert kernel[-1] == ""

    def test_an_error_ends_it(self, kernel, lm):
        with pytest.raises(UserError), notebook.progress_shown(), progress.stage("x", 2) as stage:
            stage.advance(1)
            raise UserError("no")
        assert kernel[-1] == "" and not progress.is_watched()

    def test_elsewhere_it_does_nothing(self, monkeypatch):
        assert isinstance(notebook.progress_shown(), nullcontext)
        shell = types.SimpleNamespace(get_ipython=lambda: object())  # IPython in a terminal
        monkeypatch.setitem(sys.modules, "IPython", shell)
        assert isinstance(notebook.progress_shown(), nullcontext)


def test_ipython_takes_them(lm):
    formatters = pytest.importorskip("IPython.core.formatters")
    html = formatters.HTMLFormatter()
    assert html(lm.score(["One two."], per="token")).startswith("<div")
    assert html(lm).startswith("<table") and html(lm.generate("Once")).startswith("<table")
