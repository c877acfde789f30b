"""GGUF: what is refused by name, damaged files, and the command line."""

import json
import struct

import pytest
import torch
from tokenizers import Tokenizer as Core
from tokenizers import decoders, models, normalizers, pre_tokenizers

from lmcli.checkpoints import folder as checkpoints
from lmcli.checkpoints import gguf_file
from lmcli.commands import run
from lmcli.config import GenerateConfig
from lmcli.errors import UserError
from lmcli.text.gguf_header import read_header
from lmcli.text.gguf_tokenizer import to_metadata
from lmcli.text.huggingface import LLAMA3_PATTERN
from lmcli.text.tokenizer import load

LLAMA = {"model_type": "llama", "query_key_norm": False}
GEMMA = {
    "model_type": "gemma3_text",
    "sandwich_norm": True,
    "scale_embedding": True,
    "hidden_act": "gelu_pytorch_tanh",
    "sliding_window": 8,
    "local_rope_theta": 10_000.0,
}


def gemma_layers(count):
    """Every sixth layer has full attention."""
    kinds = (f"{'full' if i % 6 == 5 else 'sliding'}_attention" for i in range(count))
    return {**GEMMA, "num_hidden_layers": count, "layer_types": tuple(kinds)}


@pytest.fixture(scope="module")
def file(small_model, small_tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    gguf_file.write(path, small_model(**LLAMA), small_tokenizer, [0], "f32", "small")
    return path


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({**LLAMA, "model_type": "mistral", "sliding_window": 8}, "sliding_window 8"),
        ({"model_type": "qwen3", "attention_bias": "all"}, "attention_bias 'all'"),
        ({**LLAMA, "model_type": "llama", "hidden_act": "relu"}, "hidden_act 'relu'"),
        (
            {
                **LLAMA,
                "model_type": "qwen2",
                "attention_bias": "qkv",
                "rope_type": "llama3",
                "rope_factor": 8.0,
            },
            "rope_type 'llama3'",
        ),
        ({**LLAMA, "model_type": "qwen2", "attention_bias": "qkv", "head_dim": 6}, "head_dim 6"),
        ({**gemma_layers(2), "query_pre_attn_scalar": 7}, "query_pre_attn_scalar 7"),
        ({**gemma_layers(62), "head_dim": 6}, "query_pre_attn_scalar 0"),
    ],
)
def test_a_model_that_llama_cpp_cannot_compute_is_refused(
    options, named, small_model, small_tokenizer, tmp_path
):
    with pytest.raises(UserError, match=rf"llama\.cpp cannot compute .* with {named}"):
        model = small_model(**options)
        gguf_file.write(tmp_path / "a.gguf", model, small_tokenizer, [0], "f32", "small")
    assert not list(tmp_path.iterdir())


def test_a_family_without_an_architecture_is_refused(small_model, small_tokenizer, tmp_path):
    model = small_model(
        **{"model_type": "t5", "shape": "encoder-decoder", "query_key_norm": False},
        norm_eps=1e-6,
        positions="relative",
        scale_attention=False,
        hidden_act="relu",
        gated_mlp=False,
        num_key_value_heads=4,
    )
    with pytest.raises(UserError, match=r"llama\.cpp has no architecture for t5"):
        gguf_file.write(tmp_path / "a.gguf", model, small_tokenizer, [0], "f32", "small")


def test_the_scale_of_the_largest_gemma(small_model, small_tokenizer, tmp_path):
    """llama.cpp knows it by its 62 layers: its divisor is hidden size / heads, not head_dim."""
    model, path = (
        small_model(**gemma_layers(62), head_dim=6, query_pre_attn_scalar=8),
        tmp_path / "a.gguf",
    )
    gguf_file.write(path, model, small_tokenizer, [0], "f32", "small")
    assert gguf_file.read(path).config.query_pre_attn_scalar == 8


@pytest.mark.parametrize(
    ("number_type", "value", "named"),
    [("f16", 1e5, "65,504"), ("f32", float("nan"), "damaged"), ("q8_0", float("inf"), "damaged")],
)
def test_numbers_that_a_type_cannot_hold_leave_no_file(
    number_type, value, named, small_model, small_tokenizer, tmp_path
):
    model = small_model(**LLAMA)
    with torch.no_grad():
        model.blocks()[1].mlp.up.weight[3, 3] = value
    with pytest.raises(UserError, match=named) as caught:
        gguf_file.write(tmp_path / "a.gguf", model, small_tokenizer, [0], number_type, "small")
    assert "blk.1.ffn_up.weight" in caught.value.what and not list(tmp_path.iterdir())


# tokenizers ---------------------------------------------------------------------------------------


def byte_level(splitter=None, normalizer=None, ignore_merges=False):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Core(
        models.BPE(
            {"<s>": 0, **{c: i + 1 for i, c in enumerate(alphabet)}, "ab": 300},
            [("a", "b")],
            ignore_merges=ignore_merges,
        )
    )
    core.pre_tokenizer = splitter or pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if normalizer:
        core.normalizer = normalizer
    return core


def split(pattern):
    from tokenizers import Regex

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def metadata_of(core, template=((), ()), **settings):
    return to_metadata(core, settings, tuple(map(list, template)), 310, [0])


@pytest.mark.parametrize(("ignores", "name"), [(True, "llama-bpe"), (False, "smaug-bpe")])
def test_the_pattern_of_llama_3_has_two_names(ignores, name):
    metadata = metadata_of(byte_level(split(LLAMA3_PATTERN), ignore_merges=ignores))
    assert metadata["tokenizer.ggml.pre"] == name
    assert metadata["tokenizer.ggml.merges"] == ["a b"]
    assert metadata["tokenizer.ggml.tokens"][300:302] == ["ab", "[PAD301]"]


@pytest.mark.parametrize(
    ("core", "named"),
    [
        (byte_level(split(r"\d+")), r"splits text by \\d"),
        (byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)), "space in front"),
        (byte_level(normalizer=normalizers.Lowercase()), "Lowercase"),
        (Core(models.WordLevel({"a": 0}, unk_token="a")), "WordLevel"),
        (Core(models.BPE({"a": 0}, [])), "no piece for each byte"),
    ],
)
def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused(core, named):
    with pytest.raises(UserError, match=named) as caught:
        metadata_of(core)
    assert caught.value.hint


def test_a_template_of_other_tokens_is_refused():
    with pytest.raises(UserError, match=r"the ids \[5, 6\]"):
        metadata_of(byte_level(), template=((5, 6), ()), bos_token="<s>")


def pieces_tokenizer(merges, pieces=("a", "b", "c", "▁", "ab", "abc", "▁a")):
    vocabulary = {"<unk>": 0, **{f"<0x{i:02X}>": i + 1 for i in range(256)}}
    vocabulary |= {piece: len(vocabulary) + i for i, piece in enumerate(pieces)}
    model = models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    core = Core(model)
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return core


MERGES = [("a", "b"), ("ab", "c"), ("▁", "a")]


def test_scores_are_the_order_of_merges():
    metadata = metadata_of(pieces_tokenizer(MERGES))
    scores = dict(zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]))
    assert scores["ab"] > scores["abc"] > scores["▁a"] > scores["a"]
    assert metadata["tokenizer.ggml.add_space_prefix"] is True
    types = dict(zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]))
    assert (types["<unk>"], types["<0x0A>"], types["ab"]) == (2, 6, 1)


@pytest.mark.parametrize(
    ("merges", "pieces"),
    [
        (MERGES[:2], ("a", "b", "c", "▁", "ab", "abc", "▁a")),  # ▁a is never made
        (  # the two ways to make abc do not follow each other
            [("a", "b"), ("ab", "c"), ("b", "c"), ("a", "bc")],
            ("a", "b", "c", "▁", "ab", "abc", "bc"),
        ),
    ],
)
def test_merges_that_are_no_scores_are_refused(merges, pieces):
    with pytest.raises(UserError, match="its merges are not"):
        metadata_of(pieces_tokenizer(merges, pieces))


# damaged files ------------------------------------------------------------------------------------


def refused(path):
    """The error that reading a file raises, which names it; nothing else may be raised."""
    with pytest.raises(UserError) as caught:
        checkpoints.load(path)
    assert str(path) in (caught.value.where or "")
    return caught.value.what


def test_a_file_that_is_cut_off_anywhere_is_refused(file, tmp_path):
    data = file.read_bytes()
    start = min(tensor.start for tensor in read_header(file).tensors.values())
    places = [*range(0, 200), *range(200, start, 997), start + 5, len(data) - 40]
    for place in places:
        (tmp_path / "cut.gguf").write_bytes(data[:place])
        refused(tmp_path / "cut.gguf")


def test_any_changed_byte_of_the_header_is_read_or_refused(file, tmp_path):
    data = file.read_bytes()
    start = min(tensor.start for tensor in read_header(file).tensors.values())
    names = data.index(b"token_embd.weight") - 8
    for place in (*range(0, 600, 3), *range(names, start, 7)):
        for byte in (0x00, 0xFF):
            changed = bytearray(data[: start + 64])
            changed[place] = byte
            (tmp_path / "changed.gguf").write_bytes(changed)
            try:
                read_header(tmp_path / "changed.gguf")
            except UserError as error:
                assert "changed.gguf" in error.where


def header(*parts, tensors=0, values=0, version=3):
    return struct.pack("<4sIQQ", b"GGUF", version, tensors, values) + b"".join(parts)


def text(value):
    return struct.pack("<Q", len(value)) + value


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"", "no GGUF file"),
        (b"PK\3\4 something else", "no GGUF file"),
        (header(version=1), "version 1"),
        (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0), "version 50331648"),
        (header(values=2**63), "go beyond its end"),
        (header(tensors=2**63), "go beyond its end"),
        (header(struct.pack("<Q", 2**63), values=1), "go beyond its end"),
        (header(text(b"a"), struct.pack("<IIQ", 9, 8, 2**62), values=1), "a list of"),
        (header(text(b"a"), struct.pack("<IIQ", 9, 4, 2**62), values=1), "a list of"),
        (header(text(b"a"), struct.pack("<IIQ", 9, 9, 1), values=1), "a list of"),
        (header(text(b"a"), struct.pack("<I", 77), values=1), "unknown type 77"),
        (header(text(b"\xff\xfe"), struct.pack("<IB", 0, 1), values=1), "damaged"),
        (header(*(text(b"a"), struct.pack("<IB", 0, 1)) * 2, values=2), "stands twice"),
        (header(text(b"t"), struct.pack("<I", 9), tensors=1), "9 dimensions"),
        (header(), "architecture None"),
        (
            header(text(b"general.architecture"), struct.pack("<I", 8), text(b"mamba"), values=1),
            "architecture 'mamba'",
        ),
        (header(text(b"split.count"), struct.pack("<IH", 2, 3), values=1), "one of 3 parts"),
    ],
)
def test_a_hostile_header_is_an_error_of_one_line(data, named, tmp_path):
    (tmp_path / "a.gguf").write_bytes(data)
    assert named in refused(tmp_path / "a.gguf")


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        (b"llama.block_count", b"llama.block_cound", "block_cound"),
        (b"blk.1.ffn_up.weight", b"blk.1.ffn_ub.weight", "blk.1.ffn_ub.weight"),
        (b"blk.1.ffn_up.weight", b"blk.0.ffn_up.weight", "stands twice"),
        (b"tokenizer.ggml.pre", b"tokenizer.ggml.prx", "pre-tokenizer None"),
        (b"tokenizer.ggml.tokens", b"tokenizer.ggml.tokenz", "no list of tokens"),
        (b"tokenizer.ggml.merges", b"tokenizer.ggml.mergez", "no list of merges"),
    ],
)
def test_a_wrong_name_is_named(old, new, named, file, tmp_path):
    (tmp_path / "a.gguf").write_bytes(file.read_bytes().replace(old, new))
    assert named in refused(tmp_path / "a.gguf")


def test_an_unknown_type_and_a_wrong_shape_are_named(file, tmp_path):
    data = file.read_bytes()
    at = data.index(b"blk.1.ffn_up.weight") + len(b"blk.1.ffn_up.weight")
    for offset, value, named in ((20, 99, "99 is not"), (4, 7, "has shape"), (20, 24, "I8")):
        changed = bytearray(data)
        changed[at + offset] = value
        (tmp_path / "a.gguf").write_bytes(changed)
        problem = refused(tmp_path / "a.gguf")
        assert "blk.1.ffn_up.weight" in problem and named in problem


# the command line ---------------------------------------------------------------------------------


def test_a_folder_becomes_a_file_and_a_folder_again(
    small_model, small_tokenizer, tmp_path, capfd, monkeypatch
):
    monkeypatch.setenv("LM_CACHE", str(tmp_path / "cache"))
    source, file = tmp_path / "source", tmp_path / "model.gguf"
    source.mkdir()
    checkpoints.save(source, small_model(**LLAMA), small_tokenizer, GenerateConfig())
    assert run(["export", str(source), "--gguf", str(file), "--type", "q8_0"]) == 0
    out, err = capfd.readouterr()
    assert out == f"{file}\n" and "MB of q8_0 weights" in err
    assert run(["export", str(source), "--gguf", str(file)]) == 2
    assert "exists already" in capfd.readouterr().err
    assert run(["export", str(source), "--gguf", str(file), "--overwrite", "-q"]) == 0
    assert run(["export", str(file), "-o", str(tmp_path / "again"), "-q"]) == 0
    capfd.readouterr()
    before, after = (checkpoints.load(folder).model for folder in (source, tmp_path / "again"))
    for name, weight in before.state_dict().items():
        assert torch.equal(weight, after.state_dict()[name])
    # a file is allowed wherever a model is
    (tmp_path / "a.txt").write_text("Once upon a time\n")
    scores = []
    for model in (source, file):
        assert run(["score", "-m", str(model), str(tmp_path / "a.txt"), "--no-header"]) == 0
        scores.append(capfd.readouterr().out)
    assert scores[0] == scores[1] != ""
    assert run(["tokenize", "-m", str(file), str(tmp_path / "a.txt")]) == 0
    assert capfd.readouterr().out.split() == [*map(str, load(source).encode("Once upon a time"))]
    assert run(["generate", "-m", str(file), "-n", "3", "--seed", "1", "Once"]) == 0
    assert run(["perplexity", "-m", str(file), "--json", str(tmp_path / "a.txt")]) == 0
    capfd.readouterr()
    assert run(["info", "--json", str(file)]) == 0
    facts = json.loads(capfd.readouterr().out)
    assert facts["architecture"] == "llama" and facts["tokenizer"]["ids"] == small_tokenizer.size
    assert facts["weights"]["dtypes"] == {"float32": facts["parameters"]["total"]}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), "give one of -o DIR and --gguf FILE"),
        (("-o", "a", "--gguf", "b"), "give one of -o DIR and --gguf FILE"),
        (("-o", "a", "--type", "f16"), "--type: does not apply to -o"),
        (("--gguf", "b", "--dtype", "float16"), "--dtype: does not apply to --gguf"),
        (("--gguf", "b", "--int8"), "--int8 and --int4: does not apply to --gguf"),
        (("-o", "a", "--int8", "--int4"), "--int8 and --int4 are given"),
        (("--gguf", "/tmp"), "/tmp: is a folder"),
    ],
)
def test_options_that_do_not_go_together_are_wrong_usage(arguments, named, capfd):
    assert run(["export", "missing", *arguments]) == 2
    assert named in capfd.readouterr().err


def test_a_missing_file_is_an_error_of_one_line(tmp_path, capfd):
    missing = str(tmp_path / "missing.gguf")
    assert run(["generate", "-m", missing, "Once"]) == 1
    assert capfd.readouterr().err.startswith(f"lm: error: {missing}: ")
