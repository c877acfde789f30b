"""The options of the small runs that several files here train."""


def sets(*values: str) -> tuple[str, ...]:
    """--set before each value."""
    return tuple(word for value in values for word in ("--set", value))


SMALL = (
    "--preset",
    "tiny",
    *sets(
        "model.hidden_size=32",
        "model.num_hidden_layers=1",
        "tokenizer.vocab_size=300",
        "train.context=32",
        "train.batch_tokens=128",
        "train.sample_every=1000000",
    ),
)
