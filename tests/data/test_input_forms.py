"""What real files bring: byte order marks, UTF-16, CSV as in RFC 4180, CR LF, blank lines."""

import csv
import gzip
import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcli.config import TokenizerConfig
from lmcli.data import corpus, rows
from lmcli.data.documents import DocumentFormat, read_pieces, read_rows, survey
from lmcli.data.files import other_encoding
from lmcli.data.rows import RowReader
from lmcli.data.schema import TASK_SCHEMAS
from lmcli.errors import UserError
from lmcli.evaluation.predictions import EvalDataset
from lmcli.text.tokenizer import learn
from lmcli.training.datasets import Source, source_from_facts

BOM = b"\xef\xbb\xbf"
TOKENIZER = learn(["one two three"], TokenizerConfig(vocab_size=300))


@pytest.fixture
def write(tmp_path):
    """write(name, content): the path of a new file."""

    def write(name, content):
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return str(tmp_path / name)

    return write


def records(file, **options):
    reader = RowReader(**options)
    return [record for batch in reader.batches([file]) for record in batch]


def documents(file, **options):
    """The text of each document, as training reads it."""
    doc_format, texts = DocumentFormat(**options), []
    for document in survey([file], doc_format).documents:
        texts.append("".join(piece.text for piece in read_pieces([document], doc_format)))
    return texts


class TestByteOrderMark:
    @pytest.mark.parametrize("end", ["", ".gz"])
    @pytest.mark.parametrize(
        "name, content",
        [
            ("a.txt", "one\n"),
            ("a.jsonl", '{"text": "one"}\n'),
            ("a.csv", 'text,label\n"one",x\n'),
            ("b.csv", '"text",label\n"one",x\n'),
            ("a.tsv", "text\tlabel\none\tx\n"),
        ],
    )
    def test_it_is_no_part_of_the_first_line_nor_field(self, write, name, content, end):
        file = write(name + end, BOM + content.encode())
        assert [record.text for record in records(file)] == ["one"]
        assert [text.rstrip("\n") for text in documents(file)] == ["one"]
        plain = records(write(f"plain-{name}", content))
        assert [record.fields for record in records(file)] == [record.fields for record in plain]

    @pytest.mark.parametrize("chunk", [1, 2, 3, 4, 1 << 18])
    def test_it_is_found_wherever_the_first_chunk_ends(self, write, monkeypatch, chunk):
        monkeypatch.setattr(rows, "CHUNK_BYTES", chunk)
        assert [record.text for record in records(write("a.txt", BOM + b"a\nb"))] == ["a", "b"]
        assert [record.text for record in records(write("b.txt", BOM))] == []
        assert [record.text for record in records(write("c.txt", BOM[:2]), on_error="blank")] == [
            ""
        ]

    def test_a_mark_inside_of_the_text_stays(self, write):
        assert documents(write("a.txt", BOM + BOM + b"a\n" + BOM + b"b\n")) == [
            "\ufeffa\n\ufeffb\n"
        ]

    def test_ranges_are_those_of_the_file(self, write):
        """So what runs of before have stored still names the same bytes."""
        file = write("a.txt", BOM + b"one\r\ntwo\r\n")
        (whole,) = survey([file], DocumentFormat()).documents
        assert (whole.start, whole.end) == (3, 13)
        lines = survey([file], DocumentFormat("line")).documents
        assert [(line.start, line.end) for line in lines] == [(3, 6), (8, 11)]
        assert documents(file, keep_marks=True) == ["\ufeffone\r\ntwo\r\n"]

    def test_a_run_of_before_reads_its_text_as_it_did(self):
        facts = Source(["a"], [], DocumentFormat()).facts()
        assert not source_from_facts(facts).doc_format.keep_marks
        del facts["keep_marks"]
        assert source_from_facts(facts).doc_format.keep_marks


PROSE = {
    "english": "The baker's child didn't sleep; it's late.\n" * 9,
    "chinese": "此开卷第一回也。作者自云，因曾历过一番梦幻之后，故将真事隐去。\n" * 9,
    "chinese without line ends": "此开卷第一回也。作者自云，因曾历过一番梦幻之后，故将真事隐去。"
    * 9,
    "russian": "Все счастливые семьи похожи друг на друга, каждая несчастлива по-своему.\n" * 9,
    "emoji": "🎉🎉 🎉\n" * 40,
}


class TestOtherEncodings:
    @pytest.mark.parametrize("text", PROSE.values(), ids=PROSE)
    @pytest.mark.parametrize("mark", [True, False], ids=["marked", "unmarked"])
    @pytest.mark.parametrize("name", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
    def test_utf_16_and_32_are_named_for_iconv(self, write, name, mark, text):
        """The name that is advised reads the file as Python's codec does."""
        file = write("a.txt", (b"" if not mark else "\ufeff".encode(name)) + text.encode(name))
        for read in (lambda: documents(file), lambda: records(file, on_error="skip")):
            with pytest.raises(UserError, match=r"is UTF-\d\d(LE|BE)? text") as caught:
                read()
            words = caught.value.hint.split()
            advised = words[words.index("-f") + 1]
            assert open(file, encoding=advised).read() == text and words[-3] == file

    @pytest.mark.parametrize("text", PROSE.values(), ids=PROSE)
    @pytest.mark.parametrize("name", ["utf-8", "latin-1", "cp1251", "gb18030", "shift-jis"])
    def test_no_other_encoding_is_taken_for_them(self, name, text):
        assert other_encoding(text.encode(name, "ignore")) == ""

    def test_text_with_bytes_0_is_no_utf_16(self, write):
        text = "\0".join(["one", "two", "a", "three"] * 9) + "\n"
        assert [record.text for record in records(write("a.txt", text))] == [text[:-1]]
        assert other_encoding(bytes(range(256)) * 9) == ""
        assert other_encoding(b"nul \0 and tab\t\n") == other_encoding(b"x\0 \0 y\n" * 99) == ""

    def test_compressed_data_under_another_name(self, write):
        file = write("a.txt", gzip.compress(b"text\n"))
        with pytest.raises(UserError, match=r"is gzip data, not text") as caught:
            documents(file)
        assert f"gzip -dc {file}" in caught.value.hint


CELLS = st.text('ab",\n\r é', max_size=8)


class TestCsv:
    @given(
        table=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=6),
        end=st.sampled_from(["\n", "\r\n"]),
        chunk=st.integers(1, 9),
    )
    @settings(max_examples=150)
    def test_rows_are_those_of_the_csv_module(self, tmp_path_factory, table, end, chunk):
        """RFC 4180: line breaks, commas and doubled quotes inside of quotes."""
        out = io.StringIO(newline="")
        writer = csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator=end)
        writer.writerows([("text", "id"), *table])
        file = tmp_path_factory.mktemp("csv") / "a.csv"
        file.write_bytes(out.getvalue().encode())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rows, "CHUNK_BYTES", chunk)
            read = records(str(file))
            assert [(record.text, record.fields["id"]) for record in read] == table
            doc_format = DocumentFormat(fields=("text",))
            kept = [row for row in table if row[0].strip()]
            if kept:
                found = survey([str(file)], doc_format).documents
                assert [tuple(row.values()) for _, row in read_rows(found, doc_format)] == kept
        # a row is named by the line it begins in
        begins = [2]
        for text, name in table[:-1]:
            begins.append(begins[-1] + 1 + (text + name).count("\n"))
        assert [record.line for record in read] == begins

    def test_an_unquoted_cell_may_have_a_quote(self, write):
        file = write("a.csv", 'id,text\n1,5" pipe\n2, "b\n3,"x"\n')
        assert [record.text for record in records(file)] == ['5" pipe', ' "b', "x"]

    def test_a_cell_of_any_size(self, write):
        """The csv module's own limit is 131,072 characters."""
        text = "word " * 40_000
        file = write("a.csv", f'text,label\n"{text}",x\n{text},y\n')
        assert [record.text for record in records(file)] == [text, text]
        assert documents(file) == [text, text]

    @pytest.mark.parametrize("on_error", ["stop", "skip", "blank"])
    def test_an_open_quote_is_an_error_with_its_place(self, write, on_error):
        """Where the next row begins nobody knows, so it is no single bad record."""
        file = write("a.csv", 'text,label\n"two\nlines",x\n"open,y\nthe rest,z\n')
        with pytest.raises(UserError, match="begins in this row and never ends") as caught:
            records(file, on_error=on_error)
        assert caught.value.where == f"{file}, line 4"

    def test_text_after_a_closing_quote_is_a_bad_record(self, write):
        file = write("a.csv", 'text,label\n"a"b,x\nc,y\n')
        with pytest.raises(UserError, match="no whole CSV row") as caught:
            records(file)
        assert caught.value.where == f"{file}, line 2"
        assert [record.text for record in records(file, on_error="skip")] == ["c"]

    def test_predictions_and_references(self, write):
        gold = write("gold.csv", 'source,target\n"a\nb","c\nd"\ne,f\n')
        guess = write("guess.csv", 'prediction,id\n"c\nd",1\ng,2\n')
        data = EvalDataset([gold], TASK_SCHEMAS["texts"])
        assert [(r.inputs, r.references, r.line) for r in data] == [
            (("a\nb",), ("c\nd",), 2),
            (("e",), ("f",), 5),
        ]
        assert list(data.read_predictions(guess)) == [
            (("c\nd",), f"{guess}, line 2"),
            (("g",), f"{guess}, line 4"),
        ]


class TestBlankLines:
    @pytest.mark.parametrize(
        "name, content",
        [
            ("a.jsonl", '\n{"text": "a"}\n\n \t\r\n{"text": "b"}\n\n'),
            ("a.csv", "\ntext,label\na,x\n\n\r\nb,y\n\n"),
            ("a.tsv", "\r\ntext\tlabel\na\tx\n\nb\ty\n\n"),
        ],
    )
    def test_they_are_no_rows(self, write, name, content):
        file = write(name, content)
        assert [record.text for record in records(file)] == ["a", "b"]
        assert documents(file) == ["a", "b"]
        lines = content.split("\n")
        assert all(record.text in lines[record.line - 1] for record in records(file))

    def test_blank_keeps_lines_aligned(self, write):
        file = write("a.jsonl", '{"text": "a"}\n\n{"text": "b"}\n')
        assert [record.text for record in records(file, on_error="blank")] == ["a", "", "b"]

    def test_in_a_table_of_one_column_they_are_empty_cells(self, write):
        assert [record.text for record in records(write("a.tsv", "text\na\n\nb\n"))] == [
            "a",
            "",
            "b",
        ]

    @pytest.mark.parametrize("name", ["guess.jsonl", "guess.txt"])
    def test_in_predictions(self, write, name):
        guess = write(name, '{"prediction": "x"}\n\n{"prediction": "y"}\n')
        data = EvalDataset([guess], TASK_SCHEMAS["labels"])
        assert [prediction for prediction, _ in data.read_predictions(guess)] == [("x",), ("y",)]


class TestHalfSurrogates:
    def test_they_are_the_replacement_character_in_every_field(self, write):
        r"""As U+FFFD, which jq writes too; a whole pair is one character."""
        row = r'{"text": "a\ud800b\udc00 \ud83c\udf89", "\uD9ab": ["\udfff", {"n": 1}]}'
        file = write("a.jsonl", row + "\n")
        (record,) = records(file)
        assert record.text == "a\ufffdb\ufffd 🎉"
        assert record.fields == {"text": record.text, "\ufffd": ["\ufffd", {"n": 1}]}
        assert documents(file) == [record.text]
        json.dumps(record.fields, ensure_ascii=False).encode()  # is UTF-8

    def test_a_backslash_that_spells_one_stays(self, write):
        file = write("a.jsonl", r'{"text": "\\ud800"}')
        assert [record.text for record in records(file)] == [r"\ud800"]


class TestLineEnds:
    LF = "one two\n\nthree, four\nfive\rsix\n字\n"

    @pytest.mark.parametrize("documents_", ["file", "line", "blank"])
    @pytest.mark.parametrize("chunk", [1, 2, 5, 1 << 18])
    def test_crlf_gives_what_lf_gives(self, write, monkeypatch, chunk, documents_):
        monkeypatch.setattr(rows, "CHUNK_BYTES", chunk)
        monkeypatch.setattr("lmcli.data.documents.CHUNK_BYTES", chunk)
        plain = write("a.txt", self.LF)
        crlf = write("b.txt", self.LF.replace("\n", "\r\n"))
        assert documents(crlf, documents=documents_) == documents(plain, documents=documents_)
        assert [r.text for r in records(crlf)] == [r.text for r in records(plain)]

    def test_bytes_are_those_of_the_text(self, write):
        crlf = write("b.txt", self.LF.replace("\n", "\r\n"))
        doc_format = DocumentFormat()
        found = survey([crlf], doc_format).documents
        (encoded,) = corpus.encode_documents(found, doc_format, TOKENIZER)
        assert encoded.ids.tolist() == TOKENIZER.encode(self.LF)
        assert encoded.bytes == len(self.LF.encode())
        assert found.bytes == encoded.bytes + self.LF.count("\n")  # a CR for each line end

    @given(
        st.text("ab \n\r字", min_size=1, max_size=200).filter(str.strip),
        st.integers(1, 7),
        st.integers(1, 9),
    )
    @settings(max_examples=100)
    def test_pieces_know_their_bytes_in_the_file(self, tmp_path_factory, text, chunk, piece):
        """So an interrupted build of a corpus continues at the right byte."""
        file = tmp_path_factory.mktemp("t") / "a.txt"
        file.write_bytes(text.encode())
        doc_format = DocumentFormat()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lmcli.data.documents.CHUNK_BYTES", chunk)
            patch.setattr("lmcli.data.documents.PIECE_CHARS", piece)
            (whole,) = survey([str(file)], doc_format).documents
            pieces = list(read_pieces([whole], doc_format))
            assert "".join(piece.text for piece in pieces) == text.replace("\r\n", "\n")
            at = 0
            for one in pieces:
                part = whole._replace(start=at, end=at + one.size)
                assert "".join(p.text for p in read_pieces([part], doc_format)) == one.text
                at += one.size
            assert at == whole.end

    def test_rows_keep_the_cr_that_they_spell(self, write):
        assert documents(write("a.jsonl", '{"text": "a\\r\\nb"}\r\n')) == ["a\r\nb"]
        assert documents(write("a.csv", 'text,label\r\n"a\r\nb",x\r\n')) == ["a\r\nb"]


class TestBounds:
    def test_a_line_without_end_is_an_error_with_its_place(self, write, monkeypatch):
        monkeypatch.setattr(rows, "MAX_LINE_BYTES", 1000)
        monkeypatch.setattr(rows, "MAX_TEXT_LINE_BYTES", 3000)
        monkeypatch.setattr(rows, "CHUNK_BYTES", 100)
        monkeypatch.setattr("lmcli.data.documents.CHUNK_BYTES", 100)
        file = write("a.txt", b"one\n" + b"a" * 5000)
        for read in (
            lambda: records(file, on_error="skip"),
            lambda: documents(file, documents="line"),
            lambda: documents(file),
        ):
            with pytest.raises(UserError, match="without a line end") as caught:
                read()
            assert caught.value.where == f"{file}, line 2"
        assert len(documents(write("b.txt", b"a" * 2500))[0]) == 2500
        with pytest.raises(UserError, match="never ends"):
            records(write("a.csv", b'text\n"' + b"a\n" * 900))

    def test_a_text_without_a_place_to_cut_is_cut_all_the_same(self, write, monkeypatch):
        monkeypatch.setattr("lmcli.text.splitting.LONGEST_PIECE", 10_000)
        file = write("a.txt", "a" * 25_000 + "\r\n")
        doc_format = DocumentFormat()
        found = survey([file], doc_format).documents
        pieces = [piece.text for piece in read_pieces(found, doc_format)]
        assert list(map(len, pieces)) == [10_000, 10_000, 5_001]
        (ids,) = TOKENIZER.encode_batch(["a" * 25_000 + "\n"])
        assert ids == [i for piece in pieces for i in TOKENIZER.encode(piece)]
