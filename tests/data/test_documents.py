"""Documents: their byte ranges, the validation split, and texts in pieces equal to the whole."""

import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import unicodedata
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, normalizers, pre_tokenizers

from lmcli.config import TokenizerConfig
from lmcli.data import documents as documents_module
from lmcli.data import rows
from lmcli.data.byte_ranges import Document
from lmcli.data.corpus import encode_documents
from lmcli.data.documents import DocumentFormat, first_rows, read_pieces, read_rows, survey
from lmcli.errors import UserError
from lmcli.text import tokenizer as tokenizers
from lmcli.text.huggingface import LLAMA3_PATTERN, QWEN2_PATTERN
from lmcli.text.splitting import SAFE_CUT

MARK = "<|endoftext|>"
# few merges beside the bytes, so that every difference in the split into words shows in the ids
LEARNED = {
    pattern: tokenizers.learn(
        [
            "hello  world\n\nit's here, they'LL say 2024!\n\tHello   again\n\n\n" * 4,
            "你好 世界。\n故事 故事\n" * 4,
        ],
        TokenizerConfig(vocab_size=330, pattern=pattern),
    )
    for pattern in ("gpt2", "qwen2")
}
LEARNED["encoder"] = tokenizers.learn(
    ["hello [ world ] <s>\n"] * 4, TokenizerConfig(vocab_size=330), "encoder"
)
for name, pattern in (
    ("nfc", QWEN2_PATTERN),
    ("llama3", LLAMA3_PATTERN),
):  # as Qwen's and Llama 3's own tokenizers are
    core = type(LEARNED["qwen2"].core).from_str(LEARNED["qwen2"].core.to_str())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    if name == "nfc":
        core.normalizer = normalizers.NFC()
    LEARNED[name] = tokenizers.Tokenizer(core)
patterns = pytest.mark.parametrize("pattern", LEARNED)


@pytest.fixture
def small_chunks(monkeypatch):
    """small_chunks(bytes, characters) sets the sizes of chunks of files and of pieces of texts."""

    def set_sizes(chunk, piece=None):
        monkeypatch.setattr(documents_module, "CHUNK_BYTES", chunk)
        monkeypatch.setattr(rows, "CHUNK_BYTES", chunk)
        monkeypatch.setattr(documents_module, "PIECE_CHARS", piece or chunk)

    return set_sizes


def written(folder, data, name="a.txt"):
    file = folder / name
    file.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(file)


def read_text(document, doc_format):
    """The text of one document."""
    return "".join(piece.text for piece in read_pieces([document], doc_format))


def find_all(*files, **options):
    return survey(list(files), DocumentFormat(**options)).documents


def texts(*files, **options):
    doc_format = DocumentFormat(**options)
    return [
        read_text(document, doc_format) for document in survey(list(files), doc_format).documents
    ]


def cut(text, least):
    """The pieces of a text of at least `least` characters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents_module, "PIECE_CHARS", least)
        data = text.encode()
        chunks = [data[i : i + 16] for i in range(0, len(data), 16)]
        return [piece.text for piece in documents_module._cut(chunks, Document("", 0, len(data)))]


def spaces():
    """Every character that Python or Unicode calls white space, look-alikes, and neighbors."""
    spaces = [
        chr(code)
        for code in range(0x110000)
        if chr(code).isspace() or unicodedata.category(chr(code))[0] == "Z"
    ]
    return [*spaces, "\x1b", "\u180e", "\u200b", "\u2060", "\ufeff", "\u00ad", "\x00"]


def near_letters():
    """Characters that regular-expression engines may treat differently: marks, digits, …"""
    return [
        "\u0301",
        "\u0903",
        "\u20dd",
        "\u093f",
        "\u0e31",
        "²",
        "½",
        "Ⅷ",
        "〇",
        "①",
        "٣",
        "𝟘",
        "ʰ",
        "ª",
        "ⓐ",
        "ǅ",
        "ſ",
        "ẞ",
        "İ",
        "_",
        "\u212b",
        "\u0958",
        "\u1100",
        "\u1161",
        "\u11a8",
        "\u0344",
        "\u037e",
        "\u0327",
        "‿",
        "\u200d",
        "ﬁ",
        "一",
        "々",
        "ー",
        "ﾞ",
        "🎉",
        "🏽",
        "\U00016d40",
        "\U00010d50",
        "\U0001e5d0",
        "\ua7cb",
        "\u1c89",
        "\U000323b0",
        "\ue000",
        "\U000e0061",
        "\u0378",
    ]


adversarial = st.lists(
    st.sampled_from(
        [
            *spaces(),
            *near_letters(),
            "\n",
            "\n",
            " ",
            " ",
            "  ",
            "\r\n",
            "\n\n",
            "a",
            "b",
            "Z",
            "é",
            "好",
            "あ",
            "한",
            "1",
            "2024",
            ".",
            "!",
            "，",
            "。",
            ":",
            "?",
            "...",
            "'s",
            "'LL",
            "'",
            " '",
            "'re",
            "’s",
            ",\n",
            "!\n",
            "<|",
            MARK,
            "[MASK]",
            " [MASK]",
            "\n[MASK]",
            "[",
            "x y",
            "\ny",
        ]
    ),
    max_size=30,
).map("".join)


class TestPieces:
    """SAFE_CUT: no token of the supported patterns spans such a cut or depends on what follows."""

    @patterns
    @given(text=adversarial | st.text(max_size=60), least=st.integers(1, 8))
    @settings(max_examples=150)
    @example(text="x\n\ny a\n b", least=1)
    @example(text="it's a b\r\nc d", least=1)
    @example(text="don't\n's", least=1)
    @example(text="a\x1c b\x1f\nc", least=1)
    @example(text="one\n[MASK] two\n [MASK]\nthree, [MASK]", least=1)
    def test_pieces_encode_to_the_ids_of_the_whole(self, pattern, text, least):
        pieces, tokenizer = cut(text, least), LEARNED[pattern]
        assert "".join(pieces) == text and tokenizer.split_safe
        assert [
            index for ids in tokenizer.encode_batch(pieces) for index in ids
        ] == tokenizer.encode(text)

    @patterns
    def test_around_every_character_of_interest(self, pattern):
        """Each character before, between and after the two that a cut depends on."""
        tokenizer = LEARNED[pattern]
        shapes = (
            "{0}\nb",
            "a\n{0}b",
            "a{0}\nb",
            "{0} b",
            "a {0}",
            "a{0} b",
            "a {0}b",
            "!{0}\n{0}a",
            "a b{0}{0}\nc",
            "{0}",
            "a,{0}",
            "a{0}.b",
            "{0}a.{0}",
            "好{0}。\n",
            "a.{0}\nb",
            "{0}， b",
        )
        for character in dict.fromkeys([*spaces(), *near_letters()]):
            for shape in shapes:
                text = shape.format(character)
                for at in [match.start() for match in SAFE_CUT.finditer(text)]:
                    assert tokenizer.encode(text[:at]) + tokenizer.encode(
                        text[at:]
                    ) == tokenizer.encode(text), (text, at)

    @patterns
    def test_every_possible_letter(self, pattern):
        """Cuts are made at all that Python calls letters; the tokenizer's engine must agree."""
        tokenizer = LEARNED[pattern]
        letters = [
            character
            for character in map(chr, range(0x80, 0x110000, 29))
            if SAFE_CUT.search(f"{character} b")
        ]
        assert len(letters) > 3_600
        whole = tokenizer.encode_batch([f"{character} {character}" for character in letters])
        halves = zip(
            tokenizer.encode_batch(letters),
            tokenizer.encode_batch([f" {character}" for character in letters]),
            strict=True,
        )
        assert whole == [first + second for first, second in halves]

    @patterns
    @pytest.mark.parametrize(
        "name, share",
        [("zh-hongloumeng", 20_000), ("wikitext-2-test", 40_000), ("tinyshakespeare", 40_000)],
    )
    def test_real_text(self, shared, pattern, name, share):
        text = (shared / "text" / f"{name}.txt").read_bytes().decode("utf-8")[:share]
        tokenizer, pieces = LEARNED[pattern], cut(text, 3)
        assert len(pieces) > share / 20 and "".join(pieces) == text
        assert [
            index for ids in tokenizer.encode_batch(pieces) for index in ids
        ] == tokenizer.encode(text)

    def test_cuts_by_hand(self):
        assert cut("one two, three\nfour\n\nfive\r\nsix 7 e\u0301, f(g)", 1) == [
            "one",
            " two",
            ", three\n",
            "four\n\nfive\r\nsix 7 e\u0301, f(g)",
        ]
        assert cut("此开卷第一回也．作者自云：因曾\n\n历过", 1) == [
            "此开卷第一回也",
            "．作者自云",
            "：因曾\n\n历过",
        ]

    def test_pieces_have_the_requested_size(self):
        pieces = cut("word " * 200, 50)
        assert all(50 <= len(piece) < 60 for piece in pieces[:-1]) and len(pieces) == 20

    def test_a_long_text_without_a_cut_costs_linear_time(self):
        """Chinese text with two line ends has no cut; each character is searched about once."""
        text = ("好" * 99 + "\n\n") * 600
        data = io.BytesIO(text.encode())
        looked = []

        class Counting:
            def search(self, held, position, end):
                looked.append(max(0, len(held) - position))
                return SAFE_CUT.search(held, position, end)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(documents_module, "SAFE_CUT", Counting())
            patch.setattr(documents_module, "PIECE_CHARS", 100)
            pieces = list(
                documents_module._cut(iter(lambda: data.read(1000), b""), Document("", 0, 0))
            )
        assert [piece.text for piece in pieces] == [text] and sum(looked) < 2 * len(text)

    @given(
        text=st.text("ab \n字🎉", min_size=1, max_size=80).filter(str.strip),
        chunk=st.integers(1, 7),
        data=st.data(),
    )
    @settings(max_examples=60)
    def test_pieces_are_exactly_the_bytes_of_their_range(self, tmp_path_factory, text, chunk, data):
        file = written(tmp_path_factory.mktemp("t"), text)
        borders = sorted(
            data.draw(
                st.sets(st.integers(0, len(text)), min_size=2, max_size=4)
                if len(text) > 3
                else st.just({0, len(text)})
            )
        )
        spans = [tuple(len(text[:at].encode()) for at in pair) for pair in pairwise(borders)]
        wanted = [Document(file, *span) for span in data.draw(st.permutations(spans))]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(documents_module, "CHUNK_BYTES", chunk)
            patch.setattr(documents_module, "PIECE_CHARS", 5)
            text_of = {}
            for piece in read_pieces(wanted, DocumentFormat()):
                text_of[piece.document] = text_of.get(piece.document, "") + piece.text
        raw = text.encode()
        assert text_of == {
            document: raw[document.start : document.end].decode() for document in wanted
        }

    def test_the_last_piece_of_each_document_is_marked(self, tmp_path, small_chunks):
        file = written(tmp_path, "a b c d e\nf g h\n")
        small_chunks(4, 2)
        doc_format = DocumentFormat(documents="line")
        pieces = list(read_pieces(survey([file], doc_format).documents, doc_format))
        assert [(piece.document.start, piece.last) for piece in pieces] == [
            (0, False),
            (0, False),
            (0, False),
            (0, True),
            (10, False),
            (10, True),
        ]

    def test_a_file_that_became_shorter_is_a_user_error(self, tmp_path):
        file = written(tmp_path, "some text\n")
        with pytest.raises(UserError, match="is shorter than when it was first read"):
            read_text(Document(file, 0, 11), DocumentFormat())


class TestSurvey:
    def test_a_file_is_one_document_with_its_newlines(self, tmp_path):
        file = written(tmp_path, "\na\r\n\nb\n")
        assert find_all(file) == [Document(file, 0, 7)] and texts(file) == ["\na\n\nb\n"]

    def test_the_hash_is_that_of_the_content(self, tmp_path):
        content = "text\n" * 9
        plain, packed = (
            written(tmp_path, content),
            written(tmp_path, gzip.compress(content.encode()), "b.gz"),
        )
        for options in ({}, {"documents": "line"}, {"documents": "blank"}):
            assert survey([plain, packed], DocumentFormat(**options)).hashes == dict.fromkeys(
                (plain, packed), hashlib.sha256(content.encode()).hexdigest()
            )

    @pytest.mark.parametrize("chunk", [1, 2, 5, 12, 13, 14, 1 << 18])
    @pytest.mark.parametrize(
        "content, expected",
        [
            (f"a{MARK}b", ["a", "b"]),
            (f"a\n{MARK}\nb\n", ["a\n", "b\n"]),
            (f"{MARK}\r\n\r\na{MARK}\n\n\n{MARK}{MARK}\n \n{MARK}b", ["a", "b"]),
            (f"a {MARK[:-1]} {MARK[1:]} {MARK}  b", [f"a {MARK[:-1]} {MARK[1:]} ", "  b"]),
            (f"<<|endoftext{MARK}|>", ["<<|endoftext", "|>"]),
            (f"字🎉{MARK}\n好", ["字🎉", "好"]),
            (f"   {MARK}   a", ["   a"]),
            (f"a{MARK}", ["a"]),
            (f"a{MARK}\n", ["a"]),
            (" " * 40 + "a" + " " * 40, [" " * 40 + "a" + " " * 40]),
        ],
    )
    def test_marks_separate_documents_wherever_chunks_end(
        self, tmp_path, small_chunks, chunk, content, expected
    ):
        small_chunks(chunk)
        assert texts(written(tmp_path, content)) == expected

    @given(parts=st.lists(st.text("a<|\n ", max_size=8), max_size=6), chunk=st.integers(1, 40))
    @settings(max_examples=80)
    def test_marks_against_split(self, tmp_path_factory, parts, chunk):
        content = MARK.join(["start", *parts])
        first, *rest = content.split(MARK)
        expected = [
            part for part in [first, *(part.lstrip("\r\n") for part in rest)] if part.strip()
        ]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(documents_module, "CHUNK_BYTES", chunk)
            assert texts(written(tmp_path_factory.getbasetemp(), content)) == expected

    @pytest.mark.parametrize("chunk", [1, 3, 1 << 18])
    @pytest.mark.parametrize(
        "options, content, expected",
        [
            ({"documents": "line"}, "a\n\n b \n\t\nc\rd", ["a", " b ", "c\rd"]),
            ({"documents": "blank"}, "\n\na\nb\n\n \nc\n\n", ["a\nb", "c"]),
            ({"documents": "blank"}, "a\n\n\nb\nc", ["a", "b\nc"]),
            ({"documents": "blank"}, "a\r\n\r\nb", ["a", "b"]),
        ],
    )
    def test_lines_and_paragraphs(self, tmp_path, small_chunks, chunk, options, content, expected):
        small_chunks(chunk)
        assert texts(written(tmp_path, content), **options) == expected

    @pytest.mark.parametrize("chunk", [7, 1 << 18])
    def test_json_lines_rows_are_documents(self, tmp_path, small_chunks, chunk):
        small_chunks(chunk)
        rows = [
            {"text": f"row\n{MARK} 字"},
            {"text": " "},
            {"prompt": "p", "completion": "c"},
            {"text": "last"},
        ]
        file = written(
            tmp_path, "\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "a.jsonl"
        )
        assert texts(file) == [f"row\n{MARK} 字", "pc", "last"]
        assert len(find_all(written(tmp_path, "{}\n", "b.jsonl"), format="text")) == 1

    def test_json_fields_can_be_named(self, tmp_path):
        file = written(tmp_path, '{"text": "no", "b": "yes"}\n', "a.jsonl.gz")
        os.replace(written(tmp_path, gzip.compress(b'{"text": "no", "b": "yes"}\n'), "g"), file)
        assert texts(file, fields=("b",)) == ["yes"]

    def test_a_compressed_file_is_read_by_content_offsets(self, tmp_path):
        file = written(tmp_path, gzip.compress(f"one{MARK}two".encode()), "a.txt.gz")
        documents = find_all(file)
        assert [(document.start, document.end) for document in documents] == [(0, 3), (16, 19)]
        assert [read_text(document, DocumentFormat()) for document in reversed(documents)] == [
            "two",
            "one",
        ]

    @pytest.mark.parametrize("chunk", [1, 4, 1 << 18])
    @pytest.mark.parametrize("options", [{}, {"documents": "line"}, {"documents": "blank"}])
    @pytest.mark.parametrize(
        "data, line",
        [(b"ok\nfine \xe5\xad\x97\nb\xffd\n", 3), (b"\xe5\xad", 1), (b"a\n\xed\xa0\x80", 2)],
    )
    def test_invalid_utf8_names_file_and_line(
        self, tmp_path, small_chunks, chunk, options, data, line
    ):
        small_chunks(chunk)
        with pytest.raises(UserError, match="invalid UTF-8") as caught:
            find_all(written(tmp_path, data), **options)
        assert caught.value.where.endswith(f"a.txt, line {line}")

    def test_bad_rows_stop_or_are_skipped(self, tmp_path):
        file = written(
            tmp_path, '{"text": "a"}\nnope\n{"body": 1}\n\xff\n'.encode("latin-1"), "a.jsonl"
        )
        with pytest.raises(UserError, match=r"a\.jsonl, line 2: invalid JSON"):
            find_all(file)
        doc_format = DocumentFormat(on_error="skip")
        surveyed = survey([file], doc_format)
        assert len(surveyed.documents) == 1 and surveyed.skipped == 3

    @pytest.mark.parametrize("content", ["", "\n \t\n", f"{MARK}\n{MARK}"])
    def test_empty_data_is_a_user_error(self, tmp_path, content):
        with pytest.raises(UserError, match=r"a\.txt: no text in it"):
            find_all(written(tmp_path, content))

    def test_a_missing_file_is_a_user_error(self, tmp_path):
        with pytest.raises(UserError, match=r"gone\.txt: cannot read: No such file"):
            find_all(str(tmp_path / "gone.txt"))


@patterns
def test_documents_are_encoded_the_same_in_pieces_and_measured(tmp_path, small_chunks, pattern):
    text = "it's here  now\n\n你好 世界 again\n" * 5
    file = written(tmp_path, text)
    small_chunks(16, 4)
    (document,) = encode_documents(find_all(file), DocumentFormat(), LEARNED[pattern])
    assert document.ids.tolist() == LEARNED[pattern].encode(text)
    assert (document.bytes, document.characters, document.words) == (
        len(text.encode()),
        len(text),
        30,
    )


def test_standard_input_is_stored_under_its_content(tmp_path):
    program = "from lmcli.data.files import pin; print(pin('-'))"
    env = {**os.environ, "LM_CACHE": str(tmp_path / "cache")}
    names = [
        subprocess.run(
            [sys.executable, "-c", program],
            input=data,
            env=env,
            capture_output=True,
            timeout=30,
            check=True,
        )
        .stdout.decode()
        .strip()
        for data in (b"one\r\n", b"two", b"one\r\n")
    ]
    assert names[0] == names[2] != names[1] and hashlib.sha256(b"two").hexdigest()[:16] in names[1]
    assert open(names[0], "rb").read() == b"one\r\n"
    assert len(os.listdir(tmp_path / "cache" / "stdin")) == 2


def test_rows_of_a_tsv_after_its_header_are_documents(tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_text("id\ttext\tlabel\n1\ta b\tx\r\n2\tc\ty\n3\t\tz\n")
    doc_format = DocumentFormat()
    documents = survey([str(path)], doc_format).documents
    assert [read_text(document, doc_format) for document in documents] == ["a b", "c"]
    assert list(read_rows(documents, doc_format)) == list(
        zip(
            documents,
            [{"id": "1", "text": "a b", "label": "x"}, {"id": "2", "text": "c", "label": "y"}],
        )
    )
    assert survey([str(path)], doc_format).empty == 1
    assert [row["label"] for row in first_rows([str(path)], doc_format, 9)] == ["x", "y", "z"]
    assert len(survey([str(path)], DocumentFormat(format="text")).documents) == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"text": "a"}', "field 'label' is missing: no label"),
        ('{"text": "a", "label": ""}', "no label"),
        ('{"text": "a", "label": 0.5}', "no label"),
        ('{"text": "a", "label": [1]}', "no label"),
        ("[1]", "not a JSON object"),
    ],
)
def test_a_row_without_a_label_names_its_line(row, message, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "b", "label": 1}\n' + row + "\n")
    with pytest.raises(UserError, match=message) as caught:
        survey([str(path)], DocumentFormat(label="label"))
    assert caught.value.where == f"{path}, line 2"
    assert len(survey([str(path)], DocumentFormat(label="label", on_error="skip")).documents) == 1
