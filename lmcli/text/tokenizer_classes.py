"""Which tokenizer class a folder means, by the rules of `AutoTokenizer` and in its order.

A class decides how text is split, so a class that lm does not know is never replaced by another:
its tokenizer.json is used as it is, and without one the folder is refused.
"""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmcli.errors import UserError

GENERIC_CLASS = "PreTrainedTokenizerFast"  # uses tokenizer.json as it is
MARIAN_CLASS = "MarianTokenizer"
# names of the generic class; the base class of tokenizers in Python counts as one
GENERIC_NAMES = ("PreTrainedTokenizer", "TokenizersBackend", "PythonBackend", GENERIC_CLASS)
# a class → the model types whose folders mean it if they name no class
MODEL_TYPES = {
    GENERIC_CLASS: """
        EvollaModel arctic aria beam bigbird_pegasus camembertv2-base canary chatlm cohere_asr
        ernie4_5 ernie4_5_moe flex_olmo fuyu glm glm4 glm4_moe glm4_moe_lite glm4v glm4v_moe
        glm_image glmasr got_ocr2 gpt_bigcode gradium_phonon_tts granite granitemoe
        granitemoehybrid granitemoeshared h2ovl_chat hyperclovax hyperclovax_vlm internlm2
        internlm3 iquestcoder jamba kimi_k25 kimi_linear kosmos-2 llava llava_next mimo_v2_flash
        minicpm3 minicpm_ocr minicpmv minicpmv4_6 minicpmv4_7 minimax_m2 ministral ministral3
        mistral mistral3 mistral_large4 mixtral modernbert modernbert-decoder molmo molmo2
        nemo_speechlm nemotron nvfp4 nystromformer olmo2 olmo3 olmo_hybrid opencua openvla
        paddleocr_vl pegasus_x persimmon phi3 phi3_v phimoe pix2struct pixtral pocket_tts smolvlm
        stablelm step3_vl umt5 vipllava voxtral voxtral_realtime xlm-roberta-xl""",
    "BertTokenizer": """
        align bark bert blip bros chinese_clip convbert distilbert electra ernie flava git
        grounding-dino layoutlm lxmert megatron-bert mm-grounding-dino mobilebert nezha nomic_bert
        qdqbert realm retribert squeezebert tvp vilt visual_bert""",
    "GPT2Tokenizer": """
        blip-2 codegen dbrx emu3 gpt2 gpt_neo gptj hyperclovax_vision_v2 instructblip
        instructblipvideo jais2 opt phi starcoder2""",
    "GPTNeoXTokenizer": "falcon_mamba gpt_neox mamba mamba2 mpt olmo olmoe rwkv xlstm",
    "LlamaTokenizer": "idefics idefics2",
    MARIAN_CLASS: "marian",
    "Qwen2Tokenizer": """
        audioflamingo3 colqwen2 cosmos3_omni dots3_note fun_asr_nano hunyuan_vl internvl
        lighton_ocr moss_transcribe_diarize ovis2 qianfan_ocr qwen2 qwen2_5_omni qwen2_5_vl
        qwen2_audio qwen2_moe qwen2_vl qwen3 qwen3_asr qwen3_moe qwen3_next qwen3_omni_moe
        qwen3_vl qwen3_vl_moe vibevoice""",
    "RobertaTokenizer": """
        bart bridgetower clap data2vec-text florence2 ibert led lilt longformer mega mra mvp
        roberta roberta-prelayernorm""",
    "T5Tokenizer": "mt5 musicgen musicgen_melody switch_transformers t5",
}
CLASS_OF_MODEL_TYPE = {
    model_type: name for name, types in MODEL_TYPES.items() for model_type in types.split()
}
# model types (or none) without a class of their own: without a name, the files decide
UNREGISTERED = ("llama", None)
# model types whose folders name wrong classes, so that the name counts for nothing; those of the
# generic class need no mention
DECLARATION_IGNORED = ("qwen2", "hyperclovax_vision_v2")
# other names of classes that lm knows
ALIASES = {
    **dict.fromkeys(("BartTokenizer", "LEDTokenizer", "MvpTokenizer"), "RobertaTokenizer"),
    **dict.fromkeys(
        ("LxmertTokenizer", "MobileBertTokenizer", "SqueezeBertTokenizer"), "BertTokenizer"
    ),
}
# what a folder that names neither a class nor a model type is taken for
CLASS_OF_FILE = {
    "vocab.txt": "BertTokenizer",
    "merges.txt": "GPT2Tokenizer",
    "spiece.model": "T5Tokenizer",
    "source.spm": MARIAN_CLASS,
}
# classes that are Python code and never read a tokenizer.json, beside those of speech
PYTHON_CLASSES = frozenset(
    """
    BartphoTokenizer BertGenerationTokenizer BertJapaneseTokenizer BertweetTokenizer
    BioGptTokenizer BlenderbotSmallTokenizer ByT5Tokenizer CTRLTokenizer CanineTokenizer
    ClvpTokenizer CpmAntTokenizer CpmTokenizer DiaTokenizer EsmTokenizer FSMTTokenizer
    FastSpeech2ConformerTokenizer FlaubertTokenizer GPTNeoXJapaneseTokenizer GPTSw3Tokenizer
    M2M100Tokenizer MgpstrTokenizer MyT5Tokenizer PLBartTokenizer PerceiverTokenizer
    PhobertTokenizer Pop2PianoTokenizer ProphetNetTokenizer RagTokenizer RoCBertTokenizer
    SiglipTokenizer Speech2TextTokenizer SpeechT5Tokenizer TapasTokenizer VitsTokenizer
    Wav2Vec2CTCTokenizer Wav2Vec2PhonemeCTCTokenizer XLMTokenizer
    """.split()
)


def class_name(
    model_type: Any, declared: str | None, is_byte_level: Callable[[], bool]
) -> str | None:
    """The class that AutoTokenizer uses, without "Fast" in its name; None if nothing names one.

    `declared` is the class that the folder names; `is_byte_level` tells whether its tokenizer.json
    is a byte-level one.
    """
    registered = CLASS_OF_MODEL_TYPE.get(model_type) if isinstance(model_type, str) else None
    if declared is None or registered == GENERIC_CLASS or model_type in DECLARATION_IGNORED:
        return registered
    if declared in GENERIC_NAMES:
        return GENERIC_CLASS
    name = declared.removesuffix("Fast")
    name = ALIASES.get(name, name)
    if name == "LlamaTokenizer" and is_byte_level():
        return GENERIC_CLASS  # Llama 3, declared as if it were Llama 2
    return name


def class_of_files(folder: Path, saved: Path, model_type: Any, known: tuple[str, ...]) -> str:
    """The class of a folder that names none; files tell it where nothing else could.

    Raises UserError if there is no tokenizer, or if the files may be those of several classes.
    """
    if saved.is_file() or (folder / "tokenizer.model").is_file():
        return GENERIC_CLASS
    files = [name for name in CLASS_OF_FILE if (folder / name).is_file()]
    if files and model_type is None:
        return CLASS_OF_FILE[files[0]]
    if not files:
        raise UserError(
            "holds no tokenizer",
            where=str(folder),
            hint="a folder needs tokenizer.json, vocab.txt, vocab.json and merges.txt, "
            "spiece.model, tokenizer.model, or Marian's source.spm, target.spm and vocab.json",
        )
    raise UserError(
        f"holds {files[0]}, but names no tokenizer class",
        where=str(folder),
        hint=f"set tokenizer_class in tokenizer_config.json, to one of {', '.join(known)}",
    )


def declared_class(config: dict[str, Any], settings: dict[str, Any], folder: Path) -> str | None:
    """The class that tokenizer_config.json names, or else config.json.

    Raises UserError if the name is no text.
    """
    for file, document in (("tokenizer_config.json", settings), ("config.json", config)):
        name = document.get("tokenizer_class")
        if name and not isinstance(name, str):
            raise UserError(f"tokenizer_class {name!r} is no name", where=str(folder / file))
        if name:
            return name
    return None


def own_code(settings: dict[str, Any]) -> str | None:
    """The code that a tokenizer_config.json names for its tokenizer (`auto_map`), or None."""
    code = settings.get("auto_map")
    code = code.get("AutoTokenizer") if isinstance(code, dict) else code
    names = code if isinstance(code, list) else [code]
    return next((str(name) for name in reversed(names) if name), None)


def check_known(
    name: str | None, code: str | None, known: tuple[str, ...], model_type: Any, saved: Path
) -> None:
    """Raises UserError unless `name` is a `known` class, or any class with its tokenizer.json.

    Classes that are Python code never read that file, and `code` is code that a folder brings.
    """
    if name in known or (name == GENERIC_CLASS and (saved.is_file() or not code)):
        return
    where = str(saved.parent)
    if code:
        raise UserError(
            f"has a tokenizer that comes with its own code ({code}), which lm never runs",
            where=where,
            hint="if tokenizer.json says the same, delete auto_map from tokenizer_config.json and "
            f"set its tokenizer_class to {GENERIC_CLASS}",
        )
    if name in PYTHON_CLASSES:
        raise UserError(
            f"tokenizer class {name} is not supported",
            where=where,
            hint=f"lm knows {', '.join(known)}, and classes that use a tokenizer.json",
        )
    if saved.is_file():
        return
    folder = repr(where)
    convert = f"from transformers import AutoTokenizer as T; T.from_pretrained({folder})"
    raise UserError(
        f"tokenizer class {name} is not supported without a tokenizer.json"
        if name
        else f"names no tokenizer class, and lm knows none for model_type {model_type!r}",
        where=where,
        hint=f"transformers writes one: python -c "
        f"{shlex.quote(f'{convert}.save_pretrained({folder})')}"
        if name
        else f"set tokenizer_class in tokenizer_config.json to one of {', '.join(known)}",
    )
