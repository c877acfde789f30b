"""The objectives that learn from plain text in packed rows: causal and masked language modeling."""

from dataclasses import dataclass, replace

import numpy as np

from lmcli.config import ModelConfig, TrainConfig
from lmcli.data import corpus as corpora
from lmcli.data import diagnostics
from lmcli.data.batches import Batch, MaskedRows, PackedRows, TokenMasking
from lmcli.data.corpus import Corpus, EncodedDocument, Mixture
from lmcli.data.documents import DocumentFormat
from lmcli.data.rows import display_name
from lmcli.data.schema import SOURCE_TARGET, TEXT_FIELDS, TEXT_LABEL_FIELDS, first_present
from lmcli.errors import UsageError, UserError
from lmcli.model.transformer import Transformer
from lmcli.training.datasets import MIN_TOKENS, FirstRows
from lmcli.training.objective import (
    EVALUATION_BATCH_TOKENS,
    GENERATION_EXAMPLE,
    CardText,
    EncodingInput,
    Evaluation,
    Objective,
    PerplexityEvaluation,
    Predictions,
    SamplePrompt,
    TargetFigures,
    TrainingData,
    batch_tensors,
    evaluation_on,
    predictions_at_targets,
    target_table,
    vocabulary_size,
)

EXAMPLE_TOKENS = 24
MIN_BENCHMARK_TOKENS = 65_536
SPECIAL_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


@dataclass(frozen=True, kw_only=True)
class PackedData(TrainingData):
    """A corpus that rows are cut from, and the validation documents."""

    corpus: Corpus | Mixture
    validation: list[EncodedDocument]

    def example_ids(self) -> list[int]:
        """The beginning of the validation text."""
        return self.validation[0].ids[:EXAMPLE_TOKENS].tolist()


class CausalData(PackedData):
    """Text in which every next token is predicted."""

    def batches(self, train: TrainConfig, model: ModelConfig) -> PackedRows:
        """Rows of the context's length; with `document_masks` documents do not see each other."""
        prefix = self.tokenizer.prefix
        bos = prefix[0] if len(prefix) == 1 else None
        eos = self.tokenizer.special_id("eos_token") if train.document_masks else None
        return PackedRows(self.corpus.ids, self.context, bos, train.seed, eos)

    def evaluation(
        self, model: Transformer, train: TrainConfig, perplexity: PerplexityEvaluation
    ) -> Evaluation:
        """Perplexity of the validation documents, as `lm perplexity` measures it."""
        return perplexity(model, self.tokenizer, self.validation)

    def training_ids(self, count: int) -> np.ndarray:
        """The first `count` ids, of a mixture from each text in proportion to its weight."""
        return self.corpus.first_ids(count)

    @property
    def validation_ids(self) -> list[np.ndarray]:
        """The ids of each document of the validation set."""
        return [document.ids for document in self.validation]

    def sample_prompt(self, step: int, model: ModelConfig) -> SamplePrompt:
        """The token that begins every context, else the first one of the validation text."""
        return SamplePrompt(self.tokenizer.prefix or self.validation[0].ids[:1].tolist(), [])


class MaskedData(PackedData):
    """Text in which masked tokens are predicted."""

    def batches(self, train: TrainConfig, model: ModelConfig) -> MaskedRows:
        """Rows of the context's length with masked tokens.

        Raises UserError if the tokenizer has no mask token.
        """
        special_id = self.tokenizer.special_id
        mask = special_id("mask_token")
        if mask is None:
            raise UserError(
                "the tokenizer has no mask token",
                hint="use an encoder's tokenizer, or leave --tokenizer out to learn one",
            )
        special = {special_id(f"{name}_token") for name in SPECIAL_TOKENS}
        unmasked = tuple(i for i in special if i is not None)
        masking = TokenMasking(mask, self.tokenizer.size, unmasked, train.mask_share)
        template = (self.tokenizer.prefix, self.tokenizer.suffix)
        return MaskedRows(self.corpus.ids, self.context, template, masking, train.seed)

    def evaluation(
        self, model: Transformer, train: TrainConfig, perplexity: PerplexityEvaluation
    ) -> Evaluation:
        """Loss and accuracy on validation rows whose masks never change."""
        rows = self.batches(train, model.config)
        ids = np.concatenate([document.ids for document in self.validation])

        figures = TargetFigures(self.objective.target, metric=train.metric)
        return evaluation_on(
            self.objective, model, lambda: rows.in_order(ids, EVALUATION_BATCH_TOKENS), figures
        )


def predict_causal(model: Transformer, batch: Batch) -> Predictions:
    """Every next token of packed rows."""
    tensors = batch_tensors(model, batch)
    hidden = model.hidden(tensors.ids, document_start=tensors.document_start)
    return Predictions(hidden.flatten(0, 1), model.head, tensors.targets.flatten())


def predict_masked(model: Transformer, batch: Batch) -> Predictions:
    """The masked tokens (Devlin et al. 2019); the head runs on them alone."""
    tensors = batch_tensors(model, batch)
    hidden = model.hidden(tensors.ids, tensors.mask)
    return predictions_at_targets(model, hidden, tensors.targets)


def encode_causal(request: EncodingInput) -> CausalData:
    """Text whose documents each end with the eos token."""
    request, corpus, validation = _encoded(request, "eos_token")
    return CausalData(
        **request.common(corpus),
        bytes_per_token=corpus.bytes_per_token,
        context_prefix="".join(request.tokenizer.pieces(request.tokenizer.prefix)),
        corpus=corpus,
        validation=validation,
    )


def encode_masked(request: EncodingInput) -> MaskedData:
    """Text whose documents each end with the sep token."""
    request, corpus, validation = _encoded(request, "sep_token")
    return MaskedData(**request.common(corpus), corpus=corpus, validation=validation)


def _encoded(
    request: EncodingInput, closing: str
) -> tuple[EncodingInput, Corpus | Mixture, list[EncodedDocument]]:
    """(the request in a context that the text fills, the corpus, the validation documents).

    A special token closes each document of the corpus. Raises UserError if a corpus has fewer than
    MIN_TOKENS tokens.
    """
    split, source, tokenizer = request.split, request.split.source, request.tokenizer
    closing_id, doc_format, note = tokenizer.special_id(closing), source.doc_format, request.note
    built = [
        corpora.build(documents, source.hashes, doc_format, tokenizer, closing_id, note)
        for documents in split.per_source or [split.training]
    ]
    names = [share.name for share in source.shares] or [display_name(source.files[0])]
    for each, name in zip(built, names):
        if each.tokens < MIN_TOKENS:
            raise UserError(
                f"only {each.tokens} tokens to train on",
                where=name,
                hint=f"at least {MIN_TOKENS} are needed: give more text",
            )
    weights = [share.weight for share in source.shares]
    corpus = Mixture(built, weights) if weights else built[0]
    if corpus.tokens < request.context:
        note(f"context shrinks from {request.context} to {corpus.tokens} tokens, all there are")
        request = replace(request, context=corpus.tokens)
    validation = list(corpora.encode_documents(split.measured, doc_format, tokenizer))
    return request, corpus, validation


def text_format(first: FirstRows) -> DocumentFormat:
    """Rows give the text of their fields, plain text itself; notes what is not read."""
    given = first.doc_format.fields
    if not first.rows:
        advice = diagnostics.hidden_rows(first.file)
        if given:
            raise UsageError(
                "this is plain text, which has no fields",
                where=first.location,
                hint=f"it {advice}" if advice else "leave --fields out; --format names a format",
            )
        if advice:
            first.note(f"{first.location} is read as plain text, and {advice}")
        return first.doc_format
    if given:
        names = first.fields(TEXT_LABEL_FIELDS[:1], many_first=True)
        first.note_unread(names)
        return replace(first.doc_format, fields=names)
    names = first_present(first.row, TEXT_FIELDS)
    if not names:
        raise first.missing(TEXT_LABEL_FIELDS[:1])
    if set(SOURCE_TARGET) <= first.row.keys() and names == SOURCE_TARGET[:1]:
        first.note(
            "the rows have source and target, and only source is read; "
            "--preset translate or --set train.objective=completion learns from both"
        )
    else:
        first.note_unread(names)
    return first.doc_format


def random_ids(model: ModelConfig, train: TrainConfig) -> np.ndarray:
    """A corpus of random token ids."""
    size = max(MIN_BENCHMARK_TOKENS, 2 * train.batch_tokens)
    return np.random.default_rng(train.seed).integers(model.vocab_size, size=size)


def random_packed(model: ModelConfig, train: TrainConfig) -> PackedRows:
    """Full rows of random ids for a decoder."""
    return PackedRows(random_ids(model, train), train.context, 0, train.seed)


def random_masked(model: ModelConfig, train: TrainConfig) -> MaskedRows:
    """Full rows of random ids for an encoder."""
    masking = TokenMasking(model.vocab_size - 1, model.vocab_size, (), train.mask_share)
    return MaskedRows(random_ids(model, train), train.context, ([0], [0]), masking, train.seed)


def perplexity_table(result: dict, train: TrainConfig) -> str:
    """The card's figures of a causal language model."""
    counts = f"{result['val_bytes']:,} bytes, {result['val_tokens']:,} tokens scored"
    return f"""On the held-out text that `recipe.yaml` names ({counts}),
with the weights of step {result["best_step"]:,}, in float32, windows of {result["context"]} tokens
every {result["stride"]}; `lm perplexity -m DIR --validation` measures the same again.

| figure | value |
| --- | --- |
| bits per byte | {result["val_bits_per_byte"]:.4f} |
| bits per character | {result["val_bits_per_character"]:.4f} |
| perplexity per token | {result["val_perplexity"]:.3f} |"""


CAUSAL = Objective(
    "causal",
    shape="decoder",
    head="lm",
    target="token",
    learns="a language model learns from text",
    recognizes=lambda first: False,
    document_format=text_format,
    encode=encode_causal,
    predict=predict_causal,
    choices=vocabulary_size,
    card=CardText(
        "text-generation",
        "lm generate -m DIR PROMPT\necho PROMPT | lm score -m DIR --color",
        "AutoModelForCausalLM",
        GENERATION_EXAMPLE,
        perplexity_table,
        "lm perplexity -m DIR --validation measures the same",
    ),
    accuracy="",
    mixable=True,
    evaluation_passes=2.0,  # windows overlap by half
    auto_sizes=True,
    random_rows=random_packed,
)

MASK_EXAMPLE = """
inputs = tokenizer(f"Paris is the {tokenizer.mask_token} of France.", return_tensors="pt")
at = inputs.input_ids[0].tolist().index(tokenizer.mask_token_id)
print(tokenizer.decode(model(**inputs).logits[0, at].argmax()))
"""
MASKED = Objective(
    "masked",
    shape="encoder",
    head="lm",
    target="masked token",
    learns="a language model learns from text",
    recognizes=lambda first: False,
    document_format=text_format,
    encode=encode_masked,
    predict=predict_masked,
    choices=vocabulary_size,
    card=CardText(
        "fill-mask",
        "lm generate -m DIR 'Paris is the [MASK] of France.'",
        "AutoModelForMaskedLM",
        MASK_EXAMPLE,
        target_table("masked tokens ({share} of all)"),
    ),
    mixable=True,
    preset="encoder-small",
    random_rows=random_masked,
)
