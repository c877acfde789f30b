"""Names of the files in a model folder; importing this loads no torch."""

WEIGHTS_FILE = "model.safetensors"
WEIGHTS_INDEX = f"{WEIGHTS_FILE}.index.json"
# a folder with one of these files has a tokenizer of its own
TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "source.spm",
)
# further files of a tokenizer
TOKENIZER_PARTS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "target.spm",
    "target_vocab.json",
    "chat_template.jinja",
)
MORE_TEMPLATES = "additional_chat_templates"  # a folder of .jinja files
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
