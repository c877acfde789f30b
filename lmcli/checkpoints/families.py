"""The table of checkpoint families, with the rows of Llama, Mistral, Qwen, GPT-2 and GPT-NeoX.

Encoders and encoder–decoders are in `encoder_families.py`; `family.py` explains the fields.
"""

from dataclasses import replace

from lmcli.checkpoints.encoder_families import ENCODER_FAMILIES
from lmcli.checkpoints.family import (
    ALL_BIASES,
    IDS,
    LM_HEAD,
    SHAPE_KEYS,
    Family,
    GgufArchitecture,
    LayerPattern,
    WindowRule,
    choice,
    same,
    tensors,
    values,
)

# Llama and families with its tensor names ---------------------------------------------------------

LLAMA_KEYS = {
    **IDS,
    **SHAPE_KEYS,
    **same("num_key_value_heads", "head_dim"),
    "norm_eps": "rms_norm_eps",
}
LLAMA_DEFAULTS = {"tie_word_embeddings": False, "rms_norm_eps": 1e-6, "hidden_act": "silu"}
LLAMA_MATRICES = tensors("""
    model.embed_tokens                              embedding
    model.layers.{}.self_attn.q_proj                decoder.layers.{}.attention.query
    model.layers.{}.self_attn.k_proj                decoder.layers.{}.attention.key
    model.layers.{}.self_attn.v_proj                decoder.layers.{}.attention.value
    model.layers.{}.self_attn.o_proj                decoder.layers.{}.attention.output
    model.layers.{}.mlp.gate_proj                   decoder.layers.{}.mlp.gate
    model.layers.{}.mlp.up_proj                     decoder.layers.{}.mlp.up
    model.layers.{}.mlp.down_proj                   decoder.layers.{}.mlp.down
""")
LLAMA_NORMS = tensors("""
    model.norm                                      decoder.norm
    model.layers.{}.input_layernorm                 decoder.layers.{}.attention_norm
    model.layers.{}.post_attention_layernorm        decoder.layers.{}.mlp_norm
    model.layers.{}.self_attn.q_norm                decoder.layers.{}.attention.query_norm
    model.layers.{}.self_attn.k_norm                decoder.layers.{}.attention.key_norm
""")
LLAMA_ATTENTION_BIAS = choice("attention_bias", "none", "all")

LLAMA = Family(
    model_type="llama",
    shape="decoder",
    heads={"lm": "LlamaForCausalLM"},
    keys=LLAMA_KEYS,
    defaults={**LLAMA_DEFAULTS, "max_position_embeddings": 2048},
    choices={"attention_bias": LLAMA_ATTENTION_BIAS, "mlp_bias": choice("mlp_bias")},
    prefix="model.",
    tensors=(*LLAMA_MATRICES, *LLAMA_NORMS),
    head_tensors=LM_HEAD,
    gguf=GgufArchitecture(
        "llama",
        {"attention_bias": ("none", "all"), "mlp_bias": (False, True)},
        paired=True,
        frequencies=True,
    ),
)
MISTRAL = replace(
    LLAMA,
    model_type="mistral",
    heads={"lm": "MistralForCausalLM"},
    defaults={
        **LLAMA_DEFAULTS,
        **values("max_position_embeddings=131072 num_key_value_heads=8 sliding_window=4096"),
    },
    choices={},
    window=WindowRule("sliding_window", written=("sliding_window",)),
)

# the first `max_window_layers` layers have full attention, the others the window
QWEN_WINDOW = WindowRule(
    "sliding_window",
    written=("sliding_window", "use_sliding_window", "layer_types", "max_window_layers"),
    pattern=LayerPattern(
        "max_window_layers",
        low=0,
        is_full=lambda layer, number: layer < number,
        number=lambda layer_types, window: layer_types.count("full_attention"),
    ),
    switch="use_sliding_window",
)
QWEN_DEFAULTS = {
    **LLAMA_DEFAULTS,
    **values("""
        max_position_embeddings=32768 num_key_value_heads=32 use_sliding_window=false
        sliding_window=4096 max_window_layers=28
    """),
}
QWEN2 = replace(
    LLAMA,
    model_type="qwen2",
    heads={"lm": "Qwen2ForCausalLM"},
    options={"attention_bias": "qkv"},
    defaults=QWEN_DEFAULTS,
    choices={},
    window=QWEN_WINDOW,
    gguf=GgufArchitecture("qwen2", {"attention_bias": ("qkv",)}, square=True),
)
QWEN3 = replace(
    LLAMA,
    model_type="qwen3",
    heads={"lm": "Qwen3ForCausalLM"},
    options={"query_key_norm": True},
    defaults={**QWEN_DEFAULTS, "head_dim": 128},
    choices={"attention_bias": LLAMA_ATTENTION_BIAS},
    window=QWEN_WINDOW,
    gguf=GgufArchitecture("qwen3", {"query_key_norm": (True,)}),
)

GEMMA3_NORMS = tensors("""
    model.norm                                      decoder.norm                        less_one
    model.layers.{}.input_layernorm                 decoder.layers.{}.attention_norm    less_one
    model.layers.{}.post_attention_layernorm        decoder.layers.{}.attention_out_norm less_one
    model.layers.{}.pre_feedforward_layernorm       decoder.layers.{}.mlp_norm          less_one
    model.layers.{}.post_feedforward_layernorm      decoder.layers.{}.mlp_out_norm      less_one
    model.layers.{}.self_attn.q_norm                decoder.layers.{}.attention.query_norm  less_one
    model.layers.{}.self_attn.k_norm                decoder.layers.{}.attention.key_norm    less_one
""")
GEMMA3 = Family(
    model_type="gemma3_text",
    shape="decoder",
    heads={"lm": "Gemma3ForCausalLM"},
    keys={**LLAMA_KEYS, "hidden_act": "hidden_activation", **same("query_pre_attn_scalar")},
    options={"query_key_norm": True, "sandwich_norm": True, "scale_embedding": True},
    defaults=values("""
        vocab_size=262208 hidden_size=2304 intermediate_size=9216 num_hidden_layers=26
        num_attention_heads=8 num_key_value_heads=4 head_dim=256
        hidden_activation=gelu_pytorch_tanh max_position_embeddings=131072 rms_norm_eps=1e-6
        tie_word_embeddings=true query_pre_attn_scalar=256 sliding_window=4096
        sliding_window_pattern=6 rope_theta=1000000.0 rope_local_base_freq=10000.0 bos_token_id=2
        eos_token_id=1 pad_token_id=0
    """),
    fixed=values("""
        attention_bias=false final_logit_softcapping=null attn_logit_softcapping=null
        use_bidirectional_attention=false
    """),
    derived={"query_pre_attn_scalar": "head_dim"},
    window=WindowRule(
        "sliding_window",
        written=("sliding_window", "layer_types"),
        off=4096,
        pattern=LayerPattern(
            "sliding_window_pattern",
            low=1,
            is_full=lambda layer, number: (layer + 1) % number == 0,
            number=lambda layer_types, window: None,
        ),
    ),
    rope_keys=("rope_theta", "rope_local_base_freq"),
    scales_full_only=True,
    prefix="model.",
    tensors=(*LLAMA_MATRICES, *GEMMA3_NORMS),
    head_tensors=LM_HEAD,
    gguf=GgufArchitecture(
        "gemma3",
        {
            "query_key_norm": (True,),
            "sandwich_norm": (True,),
            "scale_embedding": (True,),
            "hidden_act": ("gelu_pytorch_tanh",),
            "query_pre_attn_scalar": (),
        },
        full_every=6,
    ),
)

# GPT-2 and GPT-NeoX -------------------------------------------------------------------------------

GELU_TANH = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
GGUF_PLAIN = {
    "norm": ("layer",),
    "gated_mlp": (False,),
    "mlp_bias": (True,),
    "attention_bias": ("all",),
    "hidden_act": GELU_TANH,
}

GPT2 = Family(
    model_type="gpt2",
    shape="decoder",
    heads={"lm": "GPT2LMHeadModel"},
    keys={
        **IDS,
        **values("""
            hidden_size=n_embd num_hidden_layers=n_layer num_attention_heads=n_head
            intermediate_size=n_inner max_position_embeddings=n_positions
            norm_eps=layer_norm_epsilon hidden_act=activation_function
        """),
    },
    options={**ALL_BIASES, "positions": "learned", "norm": "layer", "gated_mlp": False},
    defaults=values("""
        vocab_size=50257 n_positions=1024 n_embd=768 n_layer=12 n_head=12 tie_word_embeddings=true
        layer_norm_epsilon=1e-5 activation_function=gelu_new
    """),
    aliases=values("""
        hidden_size=n_embd num_hidden_layers=n_layer num_attention_heads=n_head
        max_position_embeddings=n_positions
    """),
    fixed=values("""
        scale_attn_weights=true scale_attn_by_inverse_layer_idx=false
        reorder_and_upcast_attn=false add_cross_attention=false
    """),
    prefix="transformer.",
    tensors=tensors("""
        transformer.wte                     embedding
        transformer.wpe                     decoder.positions
        transformer.ln_f                    decoder.norm
        transformer.h.{}.ln_1               decoder.layers.{}.attention_norm
        transformer.h.{}.ln_2               decoder.layers.{}.mlp_norm
        transformer.h.{}.attn.c_attn        decoder.layers.{}.attention.[query,key,value]   columns
        transformer.h.{}.attn.c_proj        decoder.layers.{}.attention.output              columns
        transformer.h.{}.mlp.c_fc           decoder.layers.{}.mlp.up                        columns
        transformer.h.{}.mlp.c_proj         decoder.layers.{}.mlp.down                      columns
    """),
    head_tensors=LM_HEAD,
    ignored=r"\.attn\.(masked_)?bias$",
    gguf=GgufArchitecture("gpt2", {**GGUF_PLAIN, "positions": ("learned",)}, joined=True),
)
GPT_NEOX = Family(
    model_type="gpt_neox",
    shape="decoder",
    heads={"lm": "GPTNeoXForCausalLM"},
    keys={**IDS, **SHAPE_KEYS, "norm_eps": "layer_norm_eps", "rotary_fraction": "rotary_pct"},
    options={"mlp_bias": True, "norm": "layer", "gated_mlp": False},
    defaults=values("""
        max_position_embeddings=2048 tie_word_embeddings=false layer_norm_eps=1e-5 hidden_act=gelu
        rotary_pct=0.25
    """),
    rope_base_key="rotary_emb_base",
    choices={
        "use_parallel_residual": choice("parallel_block", default=True),
        "attention_bias": choice("attention_bias", "none", "all", default=True),
    },
    prefix="gpt_neox.",
    tensors=tensors(
        """
        embed_in                                embedding
        final_layer_norm                        decoder.norm
        layers.{}.input_layernorm               decoder.layers.{}.attention_norm
        layers.{}.post_attention_layernorm      decoder.layers.{}.mlp_norm
        layers.{}.attention.query_key_value     decoder.layers.{}.attention.[query,key,value] heads
        layers.{}.attention.dense               decoder.layers.{}.attention.output
        layers.{}.mlp.dense_h_to_4h             decoder.layers.{}.mlp.up
        layers.{}.mlp.dense_4h_to_h             decoder.layers.{}.mlp.down
        """,
        "gpt_neox.",
    ),
    head_tensors={"lm": tensors("embed_out head.output")},
    peft_names={"embed_out": "lm_head"},
    ignored=r"rotary_emb\.inv_freq$|\.attention\.(masked_)?bias$",
    gguf=GgufArchitecture(
        "gptneox",
        {
            **GGUF_PLAIN,
            "hidden_act": ("gelu", *GELU_TANH),
            "rotary_fraction": (),
            "parallel_block": (),
        },
        joined=True,
        own_head=True,
        parallel_key=True,
    ),
)

# a model without a `model_type` is saved as the first family that has all its options
DECODERS = (QWEN3, LLAMA, MISTRAL, QWEN2, GEMMA3, GPT2, GPT_NEOX)
FAMILIES = {family.model_type: family for family in (*DECODERS, *ENCODER_FAMILIES)}
