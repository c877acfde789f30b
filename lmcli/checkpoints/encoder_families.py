"""The rows of the checkpoint families with an encoder: BERT and its followers, T5, BART and Marian.

The meaning of each field is in `family.py`; the table `FAMILIES` and the decoders in `families.py`.
"""

from dataclasses import replace

from lmcli.checkpoints.family import (
    ALL_BIASES,
    IDS,
    LM_HEAD,
    SHAPE_KEYS,
    Family,
    LayerPattern,
    WindowRule,
    choice,
    same,
    tensors,
    values,
)


def _heads(name: str) -> dict[str, str]:
    return {
        "lm": f"{name}ForMaskedLM",
        "sequence": f"{name}ForSequenceClassification",
        "token": f"{name}ForTokenClassification",
        "span": f"{name}ForQuestionAnswering",
        "none": f"{name}Model",
    }


# BERT, RoBERTa, DistilBERT ------------------------------------------------------------------------

BERT_OPTIONS = {
    **ALL_BIASES,
    **values("positions=learned norm=layer post_norm=true gated_mlp=false embedding_norm=true"),
}
MLM_HEAD = {"head_dense": True, "head_norm": True, "head_bias": True}
POOLER = {"head_dense": True, "head_act": "tanh"}
TOKEN_HEADS = {
    "token": tensors("classifier head.output"),
    "span": tensors("qa_outputs head.output"),
}
BERT_TENSORS = """
    embeddings.position_embeddings                  encoder.positions
    embeddings.token_type_embeddings                encoder.types
    embeddings.LayerNorm                            encoder.embedding_norm
    embeddings.word_embeddings                      embedding
    encoder.layer.{}.attention.self.query           encoder.layers.{}.attention.query
    encoder.layer.{}.attention.self.key             encoder.layers.{}.attention.key
    encoder.layer.{}.attention.self.value           encoder.layers.{}.attention.value
    encoder.layer.{}.attention.output.dense         encoder.layers.{}.attention.output
    encoder.layer.{}.attention.output.LayerNorm     encoder.layers.{}.attention_norm
    encoder.layer.{}.intermediate.dense             encoder.layers.{}.mlp.up
    encoder.layer.{}.output.dense                   encoder.layers.{}.mlp.down
    encoder.layer.{}.output.LayerNorm               encoder.layers.{}.mlp_norm
"""
BERT_KEYS = {**IDS, **SHAPE_KEYS, "norm_eps": "layer_norm_eps", **same("type_vocab_size")}
BERT_DEFAULTS = values("""
    vocab_size=30522 hidden_size=768 num_hidden_layers=12 num_attention_heads=12
    intermediate_size=3072 max_position_embeddings=512 hidden_act=gelu layer_norm_eps=1e-12
    type_vocab_size=2 tie_word_embeddings=true pad_token_id=0
""")
BERT_FIXED = values("position_embedding_type=absolute is_decoder=false add_cross_attention=false")
BERT_IGNORED = r"embeddings\.position_ids$"

BERT = Family(
    model_type="bert",
    shape="encoder",
    heads=_heads("Bert"),
    keys=BERT_KEYS,
    options=BERT_OPTIONS,
    head_options={"lm": MLM_HEAD, "sequence": POOLER, "none": POOLER},
    defaults=BERT_DEFAULTS,
    fixed=BERT_FIXED,
    architectures={"BertForPreTraining": "lm"},
    prefix="bert.",
    tensors=tensors(BERT_TENSORS, "bert."),
    head_tensors={
        "lm": tensors("""
            cls.predictions.transform.dense         head.dense
            cls.predictions.transform.LayerNorm     head.norm
            cls.predictions.bias                    head.output.bias        if=tie_word_embeddings
            cls.predictions.decoder                 head.output
        """),
        "sequence": tensors("""
            bert.pooler.dense       head.dense
            classifier              head.output
        """),
        **TOKEN_HEADS,
        "none": tensors("bert.pooler.dense head.dense"),
    },
    duplicates={"cls.predictions.bias": "cls.predictions.decoder.bias"},
    other_heads=("cls.seq_relationship",),
    ignored=BERT_IGNORED,
)
ROBERTA = Family(
    model_type="roberta",
    shape="encoder",
    heads=_heads("Roberta"),
    keys=BERT_KEYS,
    options=BERT_OPTIONS,
    head_options={"lm": {**MLM_HEAD, "head_act": "gelu"}, "sequence": POOLER, "none": POOLER},
    defaults={
        **BERT_DEFAULTS,
        **values("vocab_size=50265 pad_token_id=1 bos_token_id=0 eos_token_id=2"),
    },
    fixed=BERT_FIXED,
    padding_first=True,
    prefix="roberta.",
    tensors=tensors(BERT_TENSORS, "roberta."),
    head_tensors={
        "lm": tensors("""
            lm_head.dense           head.dense
            lm_head.layer_norm      head.norm
            lm_head.bias            head.output.bias        if=tie_word_embeddings
            lm_head.decoder         head.output
        """),
        "sequence": tensors("""
            classifier.dense        head.dense
            classifier.out_proj     head.output
        """),
        **TOKEN_HEADS,
        "none": tensors("roberta.pooler.dense head.dense"),
    },
    duplicates={"lm_head.bias": "lm_head.decoder.bias"},
    ignored=BERT_IGNORED,
)
DISTILBERT = Family(
    model_type="distilbert",
    shape="encoder",
    heads=_heads("DistilBert"),
    keys={
        **IDS,
        **values("""
            hidden_size=dim num_hidden_layers=n_layers num_attention_heads=n_heads
            intermediate_size=hidden_dim max_position_embeddings=max_position_embeddings
            hidden_act=activation
        """),
    },
    options={**BERT_OPTIONS, "norm_eps": 1e-12},
    head_options={"lm": MLM_HEAD, "sequence": {"head_dense": True, "head_act": "relu"}},
    defaults=values("""
        vocab_size=30522 dim=768 n_layers=6 n_heads=12 hidden_dim=3072 max_position_embeddings=512
        activation=gelu tie_word_embeddings=true pad_token_id=0
    """),
    aliases=values("hidden_size=dim num_hidden_layers=n_layers num_attention_heads=n_heads"),
    # sinusoids are stored like learned positions
    choices={"sinusoidal_pos_embds": ((False, {}), (True, {}))},
    prefix="distilbert.",
    tensors=tensors(
        """
        embeddings.word_embeddings              embedding
        embeddings.position_embeddings          encoder.positions
        embeddings.LayerNorm                    encoder.embedding_norm
        transformer.layer.{}.attention.q_lin    encoder.layers.{}.attention.query
        transformer.layer.{}.attention.k_lin    encoder.layers.{}.attention.key
        transformer.layer.{}.attention.v_lin    encoder.layers.{}.attention.value
        transformer.layer.{}.attention.out_lin  encoder.layers.{}.attention.output
        transformer.layer.{}.sa_layer_norm      encoder.layers.{}.attention_norm
        transformer.layer.{}.ffn.lin1           encoder.layers.{}.mlp.up
        transformer.layer.{}.ffn.lin2           encoder.layers.{}.mlp.down
        transformer.layer.{}.output_layer_norm  encoder.layers.{}.mlp_norm
        """,
        "distilbert.",
    ),
    head_tensors={
        "lm": tensors("""
            vocab_transform     head.dense
            vocab_layer_norm    head.norm
            vocab_projector     head.output
        """),
        "sequence": tensors("""
            pre_classifier      head.dense
            classifier          head.output
        """),
        **TOKEN_HEADS,
    },
    ignored=BERT_IGNORED,
)

# ModernBERT ---------------------------------------------------------------------------------------

LABEL_HEADS = ("sequence", "token", "span")
MODERNBERT = Family(
    model_type="modernbert",
    shape="encoder",
    heads=_heads("ModernBert"),
    keys={
        **IDS,
        **SHAPE_KEYS,
        **values("hidden_act=hidden_activation norm_eps=norm_eps head_act=classifier_activation"),
    },
    options=values("""
        norm=layer first_attention_norm=false embedding_norm=true head_dense_bias=false
        norm_bias=false
    """),
    head_options={
        "lm": MLM_HEAD,
        **{head: {"head_dense": True, "head_norm": True} for head in LABEL_HEADS},
    },
    defaults=values("""
        max_position_embeddings=8192 hidden_activation=gelu classifier_activation=gelu
        norm_eps=1e-5 tie_word_embeddings=true local_attention=128 global_attn_every_n_layers=3
        global_rope_theta=160000.0 local_rope_theta=10000.0
    """),
    fixed=values("""
        attention_bias=false mlp_bias=false norm_bias=false classifier_bias=false
        decoder_bias=true
    """),
    choices={
        "classifier_pooling": (("cls", {"mean_pooling": False}), ("mean", {"mean_pooling": True}))
    },
    window=WindowRule(
        "local_attention",
        written=("layer_types", "local_attention", "global_attn_every_n_layers"),
        sides=2,
        off=128,
        one_side_key="sliding_window",
        pattern=LayerPattern(
            "global_attn_every_n_layers",
            low=1,
            is_full=lambda layer, number: layer % number == 0,
            number=lambda layer_types, window: None if window else 1,
        ),
    ),
    rope_keys=("global_rope_theta", "local_rope_theta"),
    prefix="model.",
    tensors=tensors("""
        model.embeddings.tok_embeddings     embedding
        model.embeddings.norm               encoder.embedding_norm
        model.final_norm                    encoder.norm
        model.layers.{}.attn_norm           encoder.layers.{}.attention_norm
        model.layers.{}.mlp_norm            encoder.layers.{}.mlp_norm
        model.layers.{}.attn.Wo             encoder.layers.{}.attention.output
        model.layers.{}.mlp.Wo              encoder.layers.{}.mlp.down
        model.layers.{}.attn.Wqkv           encoder.layers.{}.attention.[query,key,value]   rows
        model.layers.{}.mlp.Wi              encoder.layers.{}.mlp.[gate,up]                 rows
    """),
    head_tensors={
        "lm": tensors("""
            head.dense      head.dense
            head.norm       head.norm
            decoder         head.output
        """),
        **dict.fromkeys(
            LABEL_HEADS,
            tensors("""
            head.dense      head.dense
            head.norm       head.norm
            classifier      head.output
            """),
        ),
    },
)

# T5, BART and Marian ------------------------------------------------------------------------------

T5_STACK = """
    decoder.final_layer_norm                                        decoder.norm
    decoder.block.0.layer.0.SelfAttention.relative_attention_bias   decoder.relative.table
    decoder.block.{}.layer.0.SelfAttention.q            decoder.layers.{}.attention.query
    decoder.block.{}.layer.0.SelfAttention.k            decoder.layers.{}.attention.key
    decoder.block.{}.layer.0.SelfAttention.v            decoder.layers.{}.attention.value
    decoder.block.{}.layer.0.SelfAttention.o            decoder.layers.{}.attention.output
    decoder.block.{}.layer.0.layer_norm                 decoder.layers.{}.attention_norm
    decoder.block.{}.layer.2.layer_norm                 decoder.layers.{}.mlp_norm
    decoder.block.{}.layer.2.DenseReluDense.wo          decoder.layers.{}.mlp.down
    decoder.block.{}.layer.2.DenseReluDense.wi          decoder.layers.{}.mlp.up   unless=gated_mlp
    decoder.block.{}.layer.2.DenseReluDense.wi_0        decoder.layers.{}.mlp.gate if=gated_mlp
    decoder.block.{}.layer.2.DenseReluDense.wi_1        decoder.layers.{}.mlp.up   if=gated_mlp
"""
T5_TENSORS = (
    *tensors("shared embedding"),
    *tensors(T5_STACK.replace("decoder", "encoder").replace("layer.2", "layer.1")),
    *tensors(T5_STACK),
    *tensors("""
    decoder.block.{}.layer.1.EncDecAttention.q          decoder.layers.{}.cross.query
    decoder.block.{}.layer.1.EncDecAttention.k          decoder.layers.{}.cross.key
    decoder.block.{}.layer.1.EncDecAttention.v          decoder.layers.{}.cross.value
    decoder.block.{}.layer.1.EncDecAttention.o          decoder.layers.{}.cross.output
    decoder.block.{}.layer.1.layer_norm                 decoder.layers.{}.cross_norm
    """),
)
T5 = Family(
    model_type="t5",
    shape="encoder-decoder",
    heads={"lm": "T5ForConditionalGeneration"},
    keys={
        **same("vocab_size", "eos_token_id", "pad_token_id", "tie_word_embeddings"),
        **values("""
            hidden_size=d_model head_dim=d_kv intermediate_size=d_ff num_encoder_layers=num_layers
            num_hidden_layers=num_decoder_layers num_attention_heads=num_heads
            norm_eps=layer_norm_epsilon max_position_embeddings=n_positions
        """),
        **same(
            "relative_attention_num_buckets",
            "relative_attention_max_distance",
            "decoder_start_token_id",
        ),
    },
    options={"positions": "relative", "scale_attention": False},
    defaults=values("""
        n_positions=512 layer_norm_epsilon=1e-6 tie_word_embeddings=true pad_token_id=0
        eos_token_id=1 decoder_start_token_id=0 relative_attention_num_buckets=32
        relative_attention_max_distance=128
    """),
    fixed={"is_encoder_decoder": True},
    # T5 1.1 neither ties nor scales; T5 1.0 had one key for both
    fallbacks={"num_decoder_layers": "num_layers", "scale_decoder_outputs": "tie_word_embeddings"},
    aliases=values("""
        hidden_size=d_model num_hidden_layers=num_layers num_attention_heads=num_heads
        head_dim=d_kv
    """),
    repeated={"dense_act_fn": "hidden_act", "is_gated_act": "gated_mlp"},
    choices={
        "scale_decoder_outputs": choice("scale_logits", default=True),
        "feed_forward_proj": (
            ("relu", {"hidden_act": "relu", "gated_mlp": False}),
            ("gated-gelu", {"hidden_act": "gelu_new", "gated_mlp": True}),
            ("gated-silu", {"hidden_act": "silu", "gated_mlp": True}),
            ("gelu", {"hidden_act": "gelu", "gated_mlp": False}),
        ),
    },
    tensors=T5_TENSORS,
    head_tensors=LM_HEAD,
    embedding_copies=("encoder.embed_tokens", "decoder.embed_tokens"),
    ignored=r"^decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias",
)

BART_KEYS = {
    **IDS,
    **values("""
        hidden_size=d_model num_encoder_layers=encoder_layers num_hidden_layers=decoder_layers
        encoder_attention_heads=encoder_attention_heads
        num_attention_heads=decoder_attention_heads encoder_intermediate_size=encoder_ffn_dim
        intermediate_size=decoder_ffn_dim hidden_act=activation_function
    """),
    **same("max_position_embeddings", "decoder_start_token_id"),
}
BART_OPTIONS = {
    **ALL_BIASES,
    **values("norm=layer post_norm=true gated_mlp=false head_bias=true norm_eps=1e-5"),
}
BART_DEFAULTS = values("""
    max_position_embeddings=1024 activation_function=gelu tie_word_embeddings=true d_model=1024
    encoder_layers=12 decoder_layers=12 encoder_attention_heads=16 decoder_attention_heads=16
    encoder_ffn_dim=4096 decoder_ffn_dim=4096
""")
BART_STACK = """
    model.decoder.embed_positions                   decoder.positions
    model.decoder.layernorm_embedding               decoder.embedding_norm
    model.decoder.layers.{}.self_attn_layer_norm    decoder.layers.{}.attention_norm
    model.decoder.layers.{}.final_layer_norm        decoder.layers.{}.mlp_norm
    model.decoder.layers.{}.fc1                     decoder.layers.{}.mlp.up
    model.decoder.layers.{}.fc2                     decoder.layers.{}.mlp.down
    model.decoder.layers.{}.self_attn.q_proj        decoder.layers.{}.attention.query
    model.decoder.layers.{}.self_attn.k_proj        decoder.layers.{}.attention.key
    model.decoder.layers.{}.self_attn.v_proj        decoder.layers.{}.attention.value
    model.decoder.layers.{}.self_attn.out_proj      decoder.layers.{}.attention.output
"""
BART_TENSORS = (
    *tensors("model.shared embedding"),
    *tensors(BART_STACK.replace("decoder", "encoder")),
    *tensors(BART_STACK),
    *tensors("""
    model.decoder.layers.{}.encoder_attn_layer_norm decoder.layers.{}.cross_norm
    model.decoder.layers.{}.encoder_attn.q_proj     decoder.layers.{}.cross.query
    model.decoder.layers.{}.encoder_attn.k_proj     decoder.layers.{}.cross.key
    model.decoder.layers.{}.encoder_attn.v_proj     decoder.layers.{}.cross.value
    model.decoder.layers.{}.encoder_attn.out_proj   decoder.layers.{}.cross.output
    """),
)
BART = Family(
    model_type="bart",
    shape="encoder-decoder",
    heads={"lm": "BartForConditionalGeneration"},
    keys=BART_KEYS,
    options={**BART_OPTIONS, "positions": "learned", "position_offset": 2, "embedding_norm": True},
    defaults={
        **BART_DEFAULTS,
        **values("""
            vocab_size=50265 bos_token_id=0 pad_token_id=1 eos_token_id=2 decoder_start_token_id=2
        """),
    },
    fixed={"is_encoder_decoder": True},
    aliases=values("""
        hidden_size=d_model num_hidden_layers=encoder_layers
        num_attention_heads=encoder_attention_heads
    """),
    choices={"scale_embedding": choice("scale_embedding")},
    architectures={"BartModel": "lm"},
    prefix="model.",
    tensors=BART_TENSORS,
    head_tensors={
        "lm": tensors("""
            final_logits_bias       head.output.bias    flat
            lm_head                 head.output
        """)
    },
    embedding_copies=("model.encoder.embed_tokens", "model.decoder.embed_tokens"),
    optional=("final_logits_bias",),
)
MARIAN = replace(
    BART,
    model_type="marian",
    heads={"lm": "MarianMTModel"},
    options={**BART_OPTIONS, "positions": "sinusoidal"},
    defaults={
        **BART_DEFAULTS,
        **values("vocab_size=58101 pad_token_id=58100 eos_token_id=0 decoder_start_token_id=58100"),
    },
    fixed={"is_encoder_decoder": True, "share_encoder_decoder_embeddings": True},
    architectures={},
    ignored=r"^(model\.)?(en|de)coder\.embed_positions\.weight$",
)

ENCODER_FAMILIES = (MODERNBERT, BERT, ROBERTA, DISTILBERT, T5, MARIAN, BART)
