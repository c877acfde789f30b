"""The table of checkpoint families. A family is a row of data: what its `config.json` calls our options, which of them it
fixes, and what its files call our tensors. `config_json` and `folder` read and write by this table and know no names."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

# what the options of ModelConfig are in a family that says nothing about them
PLAIN = {
    "query_key_norm": False, "attention_bias": "none", "scale_attention": True, "positions": "rotary",
    "position_offset": 0, "rotary_fraction": 1.0, "norm": "rms", "norm_bias": True, "post_norm": False,
    "parallel_block": False, "first_attention_norm": True, "embedding_norm": False, "hidden_act": "silu",
    "gated_mlp": True, "mlp_bias": False, "scale_embedding": False, "scale_logits": False, "type_vocab_size": 0,
    "head_dense": False, "head_dense_bias": True, "head_norm": False, "head_bias": False, "sliding_window": 0,
    "multi_label": False,
}


class Row(NamedTuple):
    """A module (or one tensor) of a file and the modules of ours that it holds, `{}` standing for the layer's number.

    `layout` tells how: plain; flat (reshaped); columns (stored transposed); rows (several, one under the other); heads
    (several, one under the other within each head). `when` is an option and the value for which the row holds.
    """

    theirs: str
    ours: tuple[str, ...]
    layout: str = "plain"
    when: tuple[str, Any] | None = None


def rows(prefix_theirs: str, prefix_ours: str, **names: str) -> tuple[Row, ...]:
    """A Row for each name; in our names `__` stands for a dot."""
    return tuple(Row(f"{prefix_theirs}{theirs}", (f"{prefix_ours}{ours.replace('__', '.')}",))
                 for ours, theirs in names.items())


@dataclass(frozen=True)
class Family:
    """One family. `heads` maps a head to its architecture (the first is taken when a file names none); `keys` our field
    to its key in config.json; `options` are the fields it fixes, `head_options` those that hang on the head.

    `defaults` fills keys that config.json may leave out; `fixed` are keys whose only supported value is given (they are
    written out, and another value is refused); `choices` are keys whose value stands for some of our options. `prefix`
    leads all names but those of a head, and a bare model leaves it out. `window` is the key of the sliding window.
    `follows` maps a key that may be left out to the key whose value it then has,
    `also` maps further architectures, whose files hold what one of ours needs, to its head.

    Of the tensors: `copies` are modules that repeat the embedding in some files; `twice` names tensors that are stored
    beside the one that holds the same; `optional` ones are zero when left out; `aside` belongs to heads we do not have.
    `modules` maps a module's name in files to the one it has in transformers, and so in adapters, where the two differ.
    """

    model_type: str
    shape: str
    heads: dict[str, str]
    keys: dict[str, str]
    options: dict[str, Any]
    rows: tuple[Row, ...]
    head_rows: dict[str, tuple[Row, ...]] = field(default_factory=dict)
    head_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)
    choices: dict[str, tuple[tuple[Any, dict[str, Any]], ...]] = field(default_factory=dict)
    follows: dict[str, str] = field(default_factory=dict)
    also: dict[str, str] = field(default_factory=dict)
    copies: tuple[str, ...] = ()
    twice: dict[str, str] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    aside: tuple[str, ...] = ()
    modules: dict[str, str] = field(default_factory=dict)
    prefix: str = ""
    window: str = ""
    padding_first: bool = False  # learned positions begin behind the padding id, and their number counts those rows
    ignored: str = r"rotary_emb\.inv_freq$"  # tensors that some files carry and no forward pass needs

    def expected(self, head: str) -> dict[str, Any]:
        """Every option that the family fixes for a head."""
        return {**PLAIN, **self.options, **self.head_options.get(head, {})}

    def module_of(self, ours: str) -> str:
        """What files call the whole of one of our modules: "embedding", or "head.output" over the vocabulary."""
        return next(row.theirs for row in (*self.rows, *self.head_rows.get("lm", ())) if row.ours == (ours,))


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


IDS = _same("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")
SIZES = _same("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings",
              "hidden_act")

# Llama and those that follow it --------------------------------------------------------------------------------------

LLAMA_KEYS = {**IDS, **SIZES, **_same("num_key_value_heads", "head_dim"), "norm_eps": "rms_norm_eps"}
LLAMA_DEFAULTS = {"tie_word_embeddings": False, "rms_norm_eps": 1e-6, "hidden_act": "silu"}
LLAMA_ROWS = (
    *rows("model.", "", embedding="embed_tokens", decoder__norm="norm"),
    *rows("model.layers.{}.", "decoder.layers.{}.", attention_norm="input_layernorm", mlp_norm="post_attention_layernorm"),
    *rows("model.layers.{}.self_attn.", "decoder.layers.{}.attention.", query="q_proj", key="k_proj", value="v_proj",
          output="o_proj", query_norm="q_norm", key_norm="k_norm"),
    *rows("model.layers.{}.mlp.", "decoder.layers.{}.mlp.", gate="gate_proj", up="up_proj", down="down_proj"),
)
LM_HEAD = {"lm": (Row("lm_head", ("head.output",)),)}
TOGETHER = tuple(f"decoder.layers.{{}}.attention.{part}" for part in ("query", "key", "value"))  # stored as one
BIAS_EVERYWHERE = (("attention_bias", "all"), ("mlp_bias", True))
LLAMA_BIASES = {"attention_bias": ((False, {"attention_bias": "none"}), (True, {"attention_bias": "all"})),
                "mlp_bias": ((False, {"mlp_bias": False}), (True, {"mlp_bias": True}))}

LLAMA = Family(
    "llama", "decoder", {"lm": "LlamaForCausalLM"}, LLAMA_KEYS, {}, LLAMA_ROWS, LM_HEAD,
    defaults={**LLAMA_DEFAULTS, "max_position_embeddings": 2048}, choices=LLAMA_BIASES, prefix="model.")
MISTRAL = Family(
    "mistral", "decoder", {"lm": "MistralForCausalLM"}, LLAMA_KEYS, {}, LLAMA_ROWS, LM_HEAD,
    defaults={**LLAMA_DEFAULTS, "max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096},
    prefix="model.", window="sliding_window")
QWEN2 = Family(
    "qwen2", "decoder", {"lm": "Qwen2ForCausalLM"}, LLAMA_KEYS, {"attention_bias": "qkv"}, LLAMA_ROWS, LM_HEAD,
    defaults={**LLAMA_DEFAULTS, "max_position_embeddings": 32_768, "num_key_value_heads": 32,
              "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28},
    prefix="model.", window="sliding_window")
QWEN3 = Family(
    "qwen3", "decoder", {"lm": "Qwen3ForCausalLM"}, LLAMA_KEYS, {"query_key_norm": True}, LLAMA_ROWS, LM_HEAD,
    defaults={**LLAMA_DEFAULTS, "max_position_embeddings": 32_768, "head_dim": 128, "num_key_value_heads": 32,
              "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28},
    choices={"attention_bias": LLAMA_BIASES["attention_bias"]}, prefix="model.", window="sliding_window")

# GPT-2 and GPT-NeoX --------------------------------------------------------------------------------------------------

GPT2 = Family(
    "gpt2", "decoder", {"lm": "GPT2LMHeadModel"},
    {**IDS, "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
     "intermediate_size": "n_inner", "max_position_embeddings": "n_positions", "norm_eps": "layer_norm_epsilon",
     "hidden_act": "activation_function"},
    {**dict(BIAS_EVERYWHERE), "positions": "learned", "norm": "layer", "gated_mlp": False},
    (*rows("transformer.", "", embedding="wte", decoder__positions="wpe", decoder__norm="ln_f"),
     *rows("transformer.h.{}.", "decoder.layers.{}.", attention_norm="ln_1", mlp_norm="ln_2"),
     Row("transformer.h.{}.attn.c_attn", TOGETHER, "columns"),
     Row("transformer.h.{}.attn.c_proj", ("decoder.layers.{}.attention.output",), "columns"),
     Row("transformer.h.{}.mlp.c_fc", ("decoder.layers.{}.mlp.up",), "columns"),
     Row("transformer.h.{}.mlp.c_proj", ("decoder.layers.{}.mlp.down",), "columns")),
    LM_HEAD,
    defaults={"vocab_size": 50_257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12,
              "tie_word_embeddings": True, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new"},
    fixed={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False,
           "add_cross_attention": False},
    prefix="transformer.", ignored=r"\.attn\.(masked_)?bias$")
GPT_NEOX = Family(
    "gpt_neox", "decoder", {"lm": "GPTNeoXForCausalLM"},
    {**IDS, **SIZES, "norm_eps": "layer_norm_eps", "rotary_fraction": "rotary_pct"},
    {"mlp_bias": True, "norm": "layer", "gated_mlp": False},
    (*rows("gpt_neox.", "", embedding="embed_in", decoder__norm="final_layer_norm"),
     *rows("gpt_neox.layers.{}.", "decoder.layers.{}.", attention_norm="input_layernorm",
           mlp_norm="post_attention_layernorm"),
     Row("gpt_neox.layers.{}.attention.query_key_value", TOGETHER, "heads"),
     *rows("gpt_neox.layers.{}.", "decoder.layers.{}.", attention__output="attention.dense", mlp__up="mlp.dense_h_to_4h",
           mlp__down="mlp.dense_4h_to_h")),
    {"lm": (Row("embed_out", ("head.output",)),)},
    defaults={"max_position_embeddings": 2048, "tie_word_embeddings": False, "layer_norm_eps": 1e-5, "hidden_act": "gelu",
              "rotary_pct": 0.25},
    choices={"use_parallel_residual": ((True, {"parallel_block": True}), (False, {"parallel_block": False})),
             "attention_bias": ((True, {"attention_bias": "all"}), (False, {"attention_bias": "none"}))},
    prefix="gpt_neox.", ignored=r"rotary_emb\.inv_freq$|\.attention\.(masked_)?bias$", modules={"embed_out": "lm_head"})

# BERT and those that follow it ---------------------------------------------------------------------------------------

BERT_OPTIONS = {**dict(BIAS_EVERYWHERE), "positions": "learned", "norm": "layer", "post_norm": True, "gated_mlp": False,
                "embedding_norm": True}
MASKED_HEAD = {"head_dense": True, "head_norm": True, "head_bias": True}
TIED = ("tie_word_embeddings", True)
POOLED = {"head_dense": True, "head_act": "tanh"}
TOKEN_HEADS = {"token": (Row("classifier", ("head.output",)),), "span": (Row("qa_outputs", ("head.output",)),)}


def _bert_rows(prefix: str) -> tuple[Row, ...]:
    return (
        *rows(f"{prefix}embeddings.", "encoder.", positions="position_embeddings", types="token_type_embeddings",
              embedding_norm="LayerNorm"),
        Row(f"{prefix}embeddings.word_embeddings", ("embedding",)),
        *rows(f"{prefix}encoder.layer.{{}}.attention.", "encoder.layers.{}.", attention__query="self.query",
              attention__key="self.key", attention__value="self.value", attention__output="output.dense",
              attention_norm="output.LayerNorm"),
        *rows(f"{prefix}encoder.layer.{{}}.", "encoder.layers.{}.", mlp__up="intermediate.dense",
              mlp__down="output.dense", mlp_norm="output.LayerNorm"))


BERT_KEYS = {**IDS, **SIZES, "norm_eps": "layer_norm_eps", "type_vocab_size": "type_vocab_size"}
BERT_DEFAULTS = {"vocab_size": 30_522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
                 "intermediate_size": 3072, "max_position_embeddings": 512, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
                 "type_vocab_size": 2, "tie_word_embeddings": True, "pad_token_id": 0}
BERT_FIXED = {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False}
BERT_IGNORED = r"embeddings\.position_ids$"

BERT = Family(
    "bert", "encoder",
    {"lm": "BertForMaskedLM", "sequence": "BertForSequenceClassification", "token": "BertForTokenClassification",
     "span": "BertForQuestionAnswering", "none": "BertModel"},
    BERT_KEYS, BERT_OPTIONS, _bert_rows("bert."),
    {"lm": (Row("cls.predictions.transform.dense", ("head.dense",)),
            Row("cls.predictions.transform.LayerNorm", ("head.norm",)),
            Row("cls.predictions.bias", ("head.output.bias",), when=TIED), Row("cls.predictions.decoder", ("head.output",))),
     "sequence": (Row("bert.pooler.dense", ("head.dense",)), Row("classifier", ("head.output",))),
     **TOKEN_HEADS, "none": (Row("bert.pooler.dense", ("head.dense",)),)},
    {"lm": MASKED_HEAD, "sequence": POOLED, "none": POOLED}, BERT_DEFAULTS, BERT_FIXED, prefix="bert.", ignored=BERT_IGNORED,
    also={"BertForPreTraining": "lm"}, twice={"cls.predictions.bias": "cls.predictions.decoder.bias"},
    aside=("cls.seq_relationship",))
ROBERTA = Family(
    "roberta", "encoder",
    {"lm": "RobertaForMaskedLM", "sequence": "RobertaForSequenceClassification", "token": "RobertaForTokenClassification",
     "span": "RobertaForQuestionAnswering", "none": "RobertaModel"},
    BERT_KEYS, BERT_OPTIONS, _bert_rows("roberta."),
    {"lm": (Row("lm_head.dense", ("head.dense",)), Row("lm_head.layer_norm", ("head.norm",)),
            Row("lm_head.bias", ("head.output.bias",), when=TIED), Row("lm_head.decoder", ("head.output",))),
     "sequence": (Row("classifier.dense", ("head.dense",)), Row("classifier.out_proj", ("head.output",))),
     **TOKEN_HEADS, "none": (Row("roberta.pooler.dense", ("head.dense",)),)},
    {"lm": {**MASKED_HEAD, "head_act": "gelu"}, "sequence": POOLED, "none": POOLED},
    {**BERT_DEFAULTS, "vocab_size": 50_265, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}, BERT_FIXED,
    prefix="roberta.", ignored=BERT_IGNORED, padding_first=True, twice={"lm_head.bias": "lm_head.decoder.bias"})
DISTILBERT = Family(
    "distilbert", "encoder",
    {"lm": "DistilBertForMaskedLM", "sequence": "DistilBertForSequenceClassification",
     "token": "DistilBertForTokenClassification", "span": "DistilBertForQuestionAnswering", "none": "DistilBertModel"},
    {**IDS, "hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
     "intermediate_size": "hidden_dim", "max_position_embeddings": "max_position_embeddings", "hidden_act": "activation"},
    {**BERT_OPTIONS, "norm_eps": 1e-12},
    (*rows("distilbert.embeddings.", "", embedding="word_embeddings", encoder__positions="position_embeddings",
           encoder__embedding_norm="LayerNorm"),
     *rows("distilbert.transformer.layer.{}.", "encoder.layers.{}.", attention__query="attention.q_lin",
           attention__key="attention.k_lin", attention__value="attention.v_lin", attention__output="attention.out_lin",
           attention_norm="sa_layer_norm", mlp__up="ffn.lin1", mlp__down="ffn.lin2", mlp_norm="output_layer_norm")),
    {"lm": rows("vocab_", "head.", dense="transform", norm="layer_norm", output="projector"),
     "sequence": (Row("pre_classifier", ("head.dense",)), Row("classifier", ("head.output",))), **TOKEN_HEADS},
    {"lm": MASKED_HEAD, "sequence": {"head_dense": True, "head_act": "relu"}},
    {"vocab_size": 30_522, "dim": 768, "n_layers": 6, "n_heads": 12, "hidden_dim": 3072, "max_position_embeddings": 512,
     "activation": "gelu", "tie_word_embeddings": True, "pad_token_id": 0},
    # sinusoids are stored like learned positions
    choices={"sinusoidal_pos_embds": ((False, {}), (True, {}))}, prefix="distilbert.", ignored=BERT_IGNORED)
MODERNBERT = Family(
    "modernbert", "encoder",
    {"lm": "ModernBertForMaskedLM", "sequence": "ModernBertForSequenceClassification",
     "token": "ModernBertForTokenClassification", "span": "ModernBertForQuestionAnswering", "none": "ModernBertModel"},
    {**IDS, **SIZES, "hidden_act": "hidden_activation", "norm_eps": "norm_eps", "head_act": "classifier_activation"},
    {"norm": "layer", "first_attention_norm": False, "embedding_norm": True, "head_dense_bias": False, "norm_bias": False},
    (*rows("model.", "", embedding="embeddings.tok_embeddings", encoder__embedding_norm="embeddings.norm",
           encoder__norm="final_norm"),
     *rows("model.layers.{}.", "encoder.layers.{}.", attention_norm="attn_norm", mlp_norm="mlp_norm",
           attention__output="attn.Wo", mlp__down="mlp.Wo"),
     Row("model.layers.{}.attn.Wqkv", tuple(name.replace("decoder", "encoder") for name in TOGETHER), "rows"),
     Row("model.layers.{}.mlp.Wi", ("encoder.layers.{}.mlp.gate", "encoder.layers.{}.mlp.up"), "rows")),
    {"lm": (Row("head.dense", ("head.dense",)), Row("head.norm", ("head.norm",)), Row("decoder", ("head.output",))),
     **dict.fromkeys(("sequence", "token", "span"),
                     rows("", "head.", dense="head.dense", norm="head.norm", output="classifier"))},
    {"lm": MASKED_HEAD, **{head: {"head_dense": True, "head_norm": True} for head in ("sequence", "token", "span")}},
    {"max_position_embeddings": 8192, "hidden_activation": "gelu", "classifier_activation": "gelu", "norm_eps": 1e-5,
     "tie_word_embeddings": True, "local_attention": 128, "global_attn_every_n_layers": 3, "global_rope_theta": 160_000.0,
     "local_rope_theta": 10_000.0},
    {"attention_bias": False, "mlp_bias": False, "norm_bias": False, "classifier_bias": False, "decoder_bias": True},
    choices={"classifier_pooling": (("cls", {"mean_pooling": False}), ("mean", {"mean_pooling": True}))},
    prefix="model.", window="local_attention")

# encoder–decoders ----------------------------------------------------------------------------------------------------


def _t5_rows() -> tuple[Row, ...]:
    found = [Row("shared", ("embedding",))]
    for stack, last in (("encoder", 1), ("decoder", 2)):
        block, layer = f"{stack}.block.{{}}.layer.", f"{stack}.layers.{{}}."
        found += [Row(f"{stack}.final_layer_norm", (f"{stack}.norm",)),
                  Row(f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias", (f"{stack}.relative.table",)),
                  *rows(f"{block}0.SelfAttention.", f"{layer}attention.", query="q", key="k", value="v", output="o"),
                  *rows(f"{block}1.EncDecAttention.", f"{layer}cross.", query="q", key="k", value="v", output="o"),
                  *rows(block, layer, attention_norm="0.layer_norm", cross_norm="1.layer_norm",
                        mlp_norm=f"{last}.layer_norm", mlp__down=f"{last}.DenseReluDense.wo")]
        for theirs, mlp, gated in (("wi", "up", False), ("wi_0", "gate", True), ("wi_1", "up", True)):
            found.append(Row(f"{block}{last}.DenseReluDense.{theirs}", (f"{layer}mlp.{mlp}",), when=("gated_mlp", gated)))
    return tuple(found)


def _bart_rows() -> tuple[Row, ...]:
    found = [Row("model.shared", ("embedding",))]
    for stack in ("encoder", "decoder"):
        layer, ours = f"model.{stack}.layers.{{}}.", f"{stack}.layers.{{}}."
        found += [Row(f"model.{stack}.embed_positions", (f"{stack}.positions",)),
                  Row(f"model.{stack}.layernorm_embedding", (f"{stack}.embedding_norm",)),
                  *rows(layer, ours, attention_norm="self_attn_layer_norm", cross_norm="encoder_attn_layer_norm",
                        mlp_norm="final_layer_norm", mlp__up="fc1", mlp__down="fc2")]
        for theirs, attention in (("self_attn", "attention"), ("encoder_attn", "cross")):
            found += rows(f"{layer}{theirs}.", f"{ours}{attention}.", query="q_proj", key="k_proj", value="v_proj",
                          output="out_proj")
    return tuple(found)


T5 = Family(
    "t5", "encoder-decoder", {"lm": "T5ForConditionalGeneration"},
    {**_same("vocab_size", "eos_token_id", "pad_token_id", "tie_word_embeddings"), "hidden_size": "d_model",
     "head_dim": "d_kv", "intermediate_size": "d_ff", "num_encoder_layers": "num_layers",
     "num_hidden_layers": "num_decoder_layers", "num_attention_heads": "num_heads", "norm_eps": "layer_norm_epsilon",
     "max_position_embeddings": "n_positions", **_same(
         "relative_attention_num_buckets", "relative_attention_max_distance", "decoder_start_token_id")},
    {"positions": "relative", "scale_attention": False}, _t5_rows(), LM_HEAD,
    defaults={"n_positions": 512, "layer_norm_epsilon": 1e-6, "tie_word_embeddings": True, "pad_token_id": 0,
              "eos_token_id": 1, "decoder_start_token_id": 0, "relative_attention_num_buckets": 32,
              "relative_attention_max_distance": 128},
    fixed={"is_encoder_decoder": True},
    # T5 1.1 neither ties nor scales, and once had one key for both
    follows={"num_decoder_layers": "num_layers", "scale_decoder_outputs": "tie_word_embeddings"},
    choices={"scale_decoder_outputs": ((True, {"scale_logits": True}), (False, {"scale_logits": False})),
             "feed_forward_proj": (
                 ("relu", {"hidden_act": "relu", "gated_mlp": False}),
                 ("gated-gelu", {"hidden_act": "gelu_new", "gated_mlp": True}),
                 ("gated-silu", {"hidden_act": "silu", "gated_mlp": True}),
                 ("gelu", {"hidden_act": "gelu", "gated_mlp": False}))},
    copies=("encoder.embed_tokens", "decoder.embed_tokens"),
    ignored=r"^decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias")
BART_KEYS = {
    **IDS, "hidden_size": "d_model", "num_encoder_layers": "encoder_layers", "num_hidden_layers": "decoder_layers",
    "encoder_attention_heads": "encoder_attention_heads", "num_attention_heads": "decoder_attention_heads",
    "encoder_intermediate_size": "encoder_ffn_dim", "intermediate_size": "decoder_ffn_dim",
    "hidden_act": "activation_function", **_same("max_position_embeddings", "decoder_start_token_id")}
BART_OPTIONS = {**dict(BIAS_EVERYWHERE), "norm": "layer", "post_norm": True, "gated_mlp": False, "head_bias": True,
                "norm_eps": 1e-5}
BART_HEAD = {"lm": (Row("final_logits_bias", ("head.output.bias",), "flat"), Row("lm_head", ("head.output",)))}
BART_DEFAULTS = {"max_position_embeddings": 1024, "activation_function": "gelu", "tie_word_embeddings": True,
                 "d_model": 1024, "encoder_layers": 12, "decoder_layers": 12, "encoder_attention_heads": 16,
                 "decoder_attention_heads": 16, "encoder_ffn_dim": 4096, "decoder_ffn_dim": 4096}
SCALED = {"scale_embedding": ((False, {"scale_embedding": False}), (True, {"scale_embedding": True}))}
COPIES = ("model.encoder.embed_tokens", "model.decoder.embed_tokens")
BART = Family(
    "bart", "encoder-decoder", {"lm": "BartForConditionalGeneration"}, BART_KEYS,
    {**BART_OPTIONS, "positions": "learned", "position_offset": 2, "embedding_norm": True}, _bart_rows(), BART_HEAD,
    defaults={**BART_DEFAULTS, "vocab_size": 50_265, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2,
              "decoder_start_token_id": 2},
    fixed={"is_encoder_decoder": True}, choices=SCALED, prefix="model.", also={"BartModel": "lm"}, copies=COPIES,
    optional=("final_logits_bias",))
MARIAN = Family(
    "marian", "encoder-decoder", {"lm": "MarianMTModel"}, BART_KEYS, {**BART_OPTIONS, "positions": "sinusoidal"},
    _bart_rows(), BART_HEAD,
    defaults={**BART_DEFAULTS, "vocab_size": 58_101, "pad_token_id": 58_100, "eos_token_id": 0,
              "decoder_start_token_id": 58_100},
    fixed={"is_encoder_decoder": True, "share_encoder_decoder_embeddings": True}, choices=SCALED,
    prefix="model.", copies=COPIES, optional=("final_logits_bias",),
    ignored=r"^(model\.)?(en|de)coder\.embed_positions\.weight$")

FAMILIES = {family.model_type: family for family in (
    QWEN3, LLAMA, MISTRAL, QWEN2, GPT2, GPT_NEOX, MODERNBERT, BERT, ROBERTA, DISTILBERT, T5, MARIAN, BART)}
