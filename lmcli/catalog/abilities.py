"""What kinds of models there are, and which commands can use each."""

from lmcli.config import ModelConfig

# (shape, head) → what such a model is, and {command that can use it: what it does}
ABILITIES = {
    ("decoder", "lm"): (
        "a language model (decoder)",
        {"generate": "continues text", "score": "log-probabilities", "perplexity": "bits per byte"},
    ),
    ("encoder", "lm"): (
        "a masked language model (encoder)",
        {"generate": "fills masks", "score": "pseudo-log-likelihoods"},
    ),
    ("encoder-decoder", "lm"): (
        "an encoder–decoder",
        {"generate": "turns a source into a target", "score": "log-probabilities of a target"},
    ),
    ("encoder", "sequence"): ("a classifier of texts (encoder)", {"classify": "labels texts"}),
    ("encoder", "token"): ("a classifier of tokens (encoder)", {"classify": "labels tokens"}),
    ("encoder", "span"): (
        "a question-answering model (encoder)",
        {"classify": "finds answers in a context"},
    ),
    ("encoder", "none"): ("an encoder without a head", {}),
}


def abilities(config: ModelConfig) -> tuple[str, dict[str, str]]:
    """(what a model is, {command that can use it: what it does})."""
    return ABILITIES[config.shape, config.head]
