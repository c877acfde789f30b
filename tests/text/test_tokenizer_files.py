"""SentencePiece files, byte by byte."""

from lmcli.text.sentencepiece import parse

# protobuf by hand: field 1 (a piece) of 14 bytes: text "<unk>", score 0.0, type 2; then of 8: "a", -1.0, no type
TWO_PIECES = b"\x0a\x0e\x0a\x05<unk>\x15\0\0\0\0\x18\x02" b"\x0a\x08\x0a\x01a\x15\0\0\x80\xbf"


def test_a_sentencepiece_file_by_hand():
    found = parse(TWO_PIECES)
    assert found.pieces == [("<unk>", 0.0, 2), ("a", -1.0, 1)] and found.names == {"unk_token": "<unk>", "bos_token": "<s>"}
    assert found.add_dummy_prefix and found.remove_extra_whitespaces and found.charsmap == b"" and found.unk_id == 0
