"""The objectives that learn from rows: completion, sequence to sequence, classification."""

from dataclasses import dataclass, replace

import numpy as np

from lmcli.config import ModelConfig, TrainConfig
from lmcli.data import diagnostics
from lmcli.data import examples as data_examples
from lmcli.data.batches import Batch, ExampleCollator, ExampleRows
from lmcli.data.byte_ranges import Documents
from lmcli.data.documents import DocumentFormat, location
from lmcli.data.examples import Examples
from lmcli.data.rows import display_name
from lmcli.data.schema import (
    MESSAGES,
    PROMPT_COMPLETION,
    SOURCE_TARGET,
    TEXT_FIELDS,
    TEXT_LABEL_FIELDS,
    find_pair_schema,
    pair_schema,
)
from lmcli.errors import UsageError, UserError
from lmcli.model.transformer import Transformer
from lmcli.text.chat_template import ChatTemplate, chat_template, default_template
from lmcli.training.datasets import FirstRows
from lmcli.training.language_modeling import random_packed
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

BENCHMARK_EXAMPLES = 1024


@dataclass(frozen=True, kw_only=True)
class ExampleData(TrainingData):
    """Examples to train and to validate on; `collator` turns them into batches."""

    examples: Examples
    validation: Examples
    collator: ExampleCollator

    def batches(self, train: TrainConfig, model: ModelConfig) -> ExampleRows:
        """The training examples, batched by length."""
        return self._rows(self.examples, model, train.seed)

    def _rows(self, examples: Examples, model: ModelConfig, seed: int = 0) -> ExampleRows:
        collator = replace(self.collator, decoder_start=model.decoder_start_token_id or 0)
        lengths = collator.lengths(examples)
        return ExampleRows(lengths, lambda chosen: collator.batch(examples, chosen), seed)

    def evaluation(
        self, model: Transformer, train: TrainConfig, perplexity: PerplexityEvaluation
    ) -> Evaluation:
        """Loss and accuracy on the validation examples."""
        rows = self._rows(self.validation, model.config)
        figures = self._figures(train.metric)
        return evaluation_on(
            self.objective, model, lambda: rows.in_order(EVALUATION_BATCH_TOKENS), figures
        )

    def example_ids(self) -> list[int]:
        """The first text or source of the validation set."""
        return self.validation.sources[0].tolist()

    @property
    def most_frequent(self) -> tuple[str, float] | None:
        """The most frequent label of the validation set, if each text has one, and its share."""
        labels = self.validation.labels
        if labels is None or self.multi_label or not len(labels):
            return None
        counts = np.bincount(labels)
        return self.labels[int(counts.argmax())], float(counts.max() / len(labels))

    def _figures(self, metric: str) -> TargetFigures:
        return TargetFigures(self.objective.target, metric=metric)


class PairData(ExampleData):
    """Sources with their targets."""

    def _figures(self, metric: str) -> TargetFigures:
        end, size = self.collator.eos, self.validation.bytes
        return TargetFigures(self.objective.target, end=end, bytes=size, metric=metric)

    def sample_prompt(self, step: int, model: ModelConfig) -> SamplePrompt:
        """A source of the validation set, another one at every step."""
        ids = self.validation.sources[step % len(self.validation)]
        prompt = self.collator.source(ids).tolist()
        if self.collator.joined:
            prompt = [*self.collator.prefix, *ids.tolist()]
        eos = [] if model.eos_token_id is None else [model.eos_token_id]
        return SamplePrompt(prompt, eos, greedy=True, text=self.tokenizer.decode(ids.tolist()))


class ChatData(PairData):
    """Conversations, of which the assistant's part is learned."""

    def example_ids(self) -> list[int]:
        """None: a conversation is written by the chat template."""
        return []

    def sample_prompt(self, step: int, model: ModelConfig) -> SamplePrompt:
        """A conversation of the validation set up to the assistant's last message."""
        assert self.validation.masks is not None
        number = step % len(self.validation)
        ids, mask = self.validation.sources[number], self.validation.masks[number]
        # the last token is the assistant's
        others = np.flatnonzero(mask == 0)
        prompt = ids[: others[-1] + 1 if len(others) else 1].tolist()
        eos = [] if model.eos_token_id is None else [model.eos_token_id]
        return SamplePrompt(prompt, eos, greedy=True, text=self.tokenizer.decode(prompt))


def predict_completion(model: Transformer, batch: Batch) -> Predictions:
    """Every token of the target and its end, given the source before it."""
    tensors = batch_tensors(model, batch)
    # no mask: padding comes last, where no token of a causal model attends
    return predictions_at_targets(model, model.hidden(tensors.ids), tensors.targets)


def predict_seq2seq(model: Transformer, batch: Batch) -> Predictions:
    """Every token of the target and its end, given the source (teacher forcing)."""
    tensors = batch_tensors(model, batch)
    assert tensors.decoder_ids is not None
    encoded = model.encode(tensors.ids, tensors.mask)
    # no mask for the decoder: a later token cannot change an earlier one
    hidden = model.hidden(tensors.decoder_ids, encoder_output=encoded)
    return predictions_at_targets(model, hidden, tensors.targets)


def predict_labels(model: Transformer, batch: Batch) -> Predictions:
    """The label of each text, or with several labels (N, labels) targets of 0 and 1."""
    tensors = batch_tensors(model, batch)
    hidden = model.hidden(tensors.ids, tensors.mask, token_type_ids=tensors.types)
    return Predictions(model.pooled(hidden, tensors.mask), model.head, tensors.targets)


def encode_labels(request: EncodingInput) -> TrainingData:
    """Texts with the numbers of their labels: those given, else all of the training set.

    Raises UserError if all rows have the same label.
    """
    split, source = request.split, request.split.source
    labels = request.labels or data_examples.label_names(split.training, source.doc_format)
    if len(labels) < 2 and not source.doc_format.multi_label:
        raise UserError(
            f"all rows have the same label {labels[0]!r}",
            where=display_name(source.files[0]),
            hint=f"are labels in {source.doc_format.label!r}? --fields TEXT,LABEL names others",
        )
    collator = _collator(request)
    training, validation = _encoded(request, labels, collator)
    return ExampleData(
        **request.common(training),
        labels=labels,
        multi_label=source.doc_format.multi_label,
        collator=collator,
        examples=training,
        validation=validation,
    )


# the training set comes first, so a label that only the validation set has is in neither
UNKNOWN_LABELS = (
    "--set train.new_head=true takes the labels of the training data instead",
    "add rows with it to the training data, or take it out of --val",
)


def encode_completion(request: EncodingInput) -> PairData:
    """Sources and targets, encoded as one text; or conversations, written by a chat template.

    A model that has none gets a plain one. Raises UserError if that cannot end a message.
    """
    if not request.split.source.doc_format.chat:
        return _encode_pairs(request, joined=True)
    tokenizer, note = request.tokenizer, request.note
    template = chat_template(tokenizer.settings)
    if template is None:
        if tokenizer.special_id("eos_token") is None:
            raise UserError(
                "the tokenizer has no eos_token, which would end what the assistant says",
                hint="name one in tokenizer_config.json, or add a chat_template",
            )
        template = default_template(tokenizer.settings)
        tokenizer.settings["chat_template"] = template.source
        note("the model has no chat template: it gets a plain one, saved as chat_template.jinja")
    return _encode_pairs(request, joined=True, template=template)


def encode_seq2seq(request: EncodingInput) -> PairData:
    """Sources and targets, encoded separately."""
    return _encode_pairs(request, joined=False)


def _encode_pairs(
    request: EncodingInput, joined: bool, template: ChatTemplate | None = None
) -> PairData:
    eos = request.tokenizer.special_id("eos_token")
    collator = replace(_collator(request), eos=eos, joined=joined)
    training, validation = _encoded(request, (), collator, template)
    return (ChatData if template else PairData)(
        **request.common(training), collator=collator, examples=training, validation=validation
    )


def _collator(request: EncodingInput) -> ExampleCollator:
    tokenizer, padding = request.tokenizer, request.tokenizer.special_id("pad_token") or 0
    prefix, suffix = tokenizer.prefix, tokenizer.suffix
    return ExampleCollator(
        prefix, suffix, request.context, padding, join_pair=tokenizer.with_template
    )


def _encoded(
    request: EncodingInput,
    labels: tuple[str, ...],
    collator: ExampleCollator,
    template: ChatTemplate | None = None,
) -> tuple[Examples, Examples]:
    """(training, validation) examples that fit the context; notes what is worth knowing of them."""
    split, tokenizer = request.split, request.tokenizer
    doc_format = split.source.doc_format
    training, validation = (
        data_examples.build(
            documents,
            split.source.hashes,
            doc_format,
            tokenizer,
            labels,
            collator.joined,
            unknown,
            template,
        )
        for documents, unknown in zip((split.training, split.measured), UNKNOWN_LABELS)
    )
    for text in diagnostics.findings(training, validation, labels):
        request.note(text)
    training = _limit_lengths(training, split.training, "training", collator, request)
    return training, _limit_lengths(validation, split.measured, "validation", collator, request)


def _limit_lengths(
    examples: Examples,
    documents: Documents,
    kind: str,
    collator: ExampleCollator,
    request: EncodingInput,
) -> Examples:
    """The examples that fit the context, by --on-long: truncate, skip or error.

    Raises UserError with "error" (it names the first long example), and if none is left.
    """
    context, on_long = request.context, request.split.source.on_long
    lost = collator.truncated_tokens(examples)
    long = np.flatnonzero(lost)
    if not len(long):
        return examples
    if on_long == "error":
        first = documents[int(long[0])]
        raise UserError(
            f"longer than the context of {context} tokens, and so are {len(long) - 1:,} others",
            where=location(first.file, first.start),
            hint="--on-long truncate or skip, or a larger --set train.context",
        )
    count, too_long = f"{len(long):,} of {len(examples):,}", f"longer than the context of {context}"
    if on_long == "truncate":
        share = lost.sum() / (lost.sum() + collator.lengths(examples).sum())
        if kind == "training":
            request.note(
                f"{count} examples are {too_long} tokens: {int(lost.sum()):,} tokens ({share:.1%}) "
                "are cut off; --on-long skip or error, or a larger train.context"
            )
        return examples
    request.note(f"{count} {kind} examples are {too_long} tokens: left out")
    if len(long) == len(examples):
        hint = "a larger --set train.context"
        raise UserError("no example is left", where="--on-long skip", hint=hint)
    return examples.select(np.flatnonzero(lost == 0))


def is_pair(first: FirstRows) -> bool:
    """True if the fields are a source and a target, or one is named for them."""
    if first.named:
        return bool(set(SOURCE_TARGET) & first.named.keys())
    return set(SOURCE_TARGET) <= set(first.names) and TEXT_FIELDS[0][0] not in first.names


def is_completion(first: FirstRows) -> bool:
    """True if the fields are a pair for a decoder, or some are named for one."""
    if first.named:
        return is_pair(first) or bool(set(PROMPT_COMPLETION) & first.named.keys())
    if first.doc_format.fields:
        return first.doc_format.fields == PROMPT_COMPLETION
    pair = None if TEXT_FIELDS[0][0] in first.row else find_pair_schema(first.row)
    return pair is not None and pair.fields != SOURCE_TARGET


def has_label(first: FirstRows) -> bool:
    """True if the fields are a text and a label, or one is named for a label."""
    text, label = TEXT_LABEL_FIELDS
    if first.doc_format.fields and not first.named:
        return label in first.names and len(first.names) > 1
    return label in first.names and (text in first.names or bool(first.named))


def pair_format(first: FirstRows) -> DocumentFormat:
    """Rows with two texts. Raises UsageError if the rows have none."""
    given, known = first.doc_format.fields, None
    if not first.named and first.rows:
        known = pair_schema(given) if given else find_pair_schema(first.row)
        if TEXT_FIELDS[0][0] in first.row and not given:
            known = None
    if known:
        fields = known.fields
        first.require(fields)
    else:
        completion = set(PROMPT_COMPLETION) & first.named.keys()
        fields = first.fields(PROMPT_COMPLETION if completion else SOURCE_TARGET)
    return replace(first.doc_format, fields=fields, paired=True)


def completion_format(first: FirstRows) -> DocumentFormat:
    """As `pair_format`; notes that only the second text, or the assistant's, is learned."""
    doc_format = pair_format(first)
    if doc_format.fields == MESSAGES:
        first.note("the loss is on what the assistant says alone")
        return replace(doc_format, chat=True)
    first.note(
        f"the loss is on what follows {doc_format.fields[0]!r} alone; "
        "--set train.objective=causal learns both"
    )
    return doc_format


def label_format(first: FirstRows) -> DocumentFormat:
    """Rows with one or two texts and a label, or several labels if the first row has a list.

    Raises UsageError if the rows have none, or no value of theirs is a label.
    """
    names = first.fields(TEXT_LABEL_FIELDS, many_first=True)
    if set(names) == set(TEXT_LABEL_FIELDS):
        names = TEXT_LABEL_FIELDS
    *fields, label = names
    doc_format = replace(
        first.doc_format,
        fields=tuple(fields),
        label=label,
        multi_label=first.multi_label or isinstance(first.row.get(label), list),
    )
    problems = []
    for row in first.rows:
        try:
            doc_format.labels(row)
        except ValueError as error:
            problems.append(error)
    if len(problems) == len(first.rows):
        text = diagnostics.guess_fields(first.rows, TEXT_LABEL_FIELDS[:1])["text"]
        raise UsageError(
            str(problems[0]),
            where=first.location,
            hint="name the field of the labels with --fields text=NAME,label=NAME, or train a "
            f"language model: --fields text={text}",
        )
    return doc_format


def random_pairs(model: ModelConfig, train: TrainConfig) -> ExampleRows:
    """Full examples of random ids for an encoder–decoder."""
    generator = np.random.default_rng(train.seed)

    def make(chosen: np.ndarray) -> Batch:
        source, target, decoder_ids = generator.integers(
            model.vocab_size, size=(3, len(chosen), train.context)
        )
        return Batch(source, target, decoder_ids=decoder_ids)

    # as in training, an example counts for its source and its target
    return ExampleRows(np.full(BENCHMARK_EXAMPLES, 2 * train.context), make, train.seed)


COMPLETION = Objective(
    "completion",
    shape="decoder",
    head="lm",
    target="token",
    learns="completions are learned from rows with prompt and completion, or source and target",
    recognizes=is_completion,
    document_format=completion_format,
    encode=encode_completion,
    predict=predict_completion,
    choices=vocabulary_size,
    card=CardText(
        "text-generation",
        "lm generate -m DIR PROMPT",
        "AutoModelForCausalLM",
        GENERATION_EXAMPLE,
        target_table("tokens of completions, each given the ones before it"),
    ),
    random_rows=random_packed,
)

SEQ2SEQ = Objective(
    "seq2seq",
    shape="encoder-decoder",
    head="lm",
    target="target token",
    learns="an encoder–decoder learns from rows with source and target (or with --target FILE)",
    recognizes=is_pair,
    document_format=pair_format,
    encode=encode_seq2seq,
    predict=predict_seq2seq,
    choices=vocabulary_size,
    card=CardText(
        "",  # transformers has no pipeline for it any more
        "lm generate -m DIR PROMPT",
        "AutoModelForSeq2SeqLM",
        GENERATION_EXAMPLE,
        target_table("target tokens, each given the ones before it"),
    ),
    preset="translate",
    random_rows=random_pairs,
)

CLASSIFICATION_EXAMPLE = """
logits = model(**tokenizer("A text.", return_tensors="pt")).logits
print(model.config.id2label[int(logits.argmax())])
"""
CLASSIFICATION = Objective(
    "classification",
    shape="encoder",
    head="sequence",
    target="text",
    learns="a classifier learns from rows with text and label",
    recognizes=has_label,
    document_format=label_format,
    encode=encode_labels,
    predict=predict_labels,
    choices=lambda model, train: len(model.labels),
    card=CardText(
        "text-classification",
        "echo PROMPT | lm classify -m DIR",
        "AutoModelForSequenceClassification",
        CLASSIFICATION_EXAMPLE,
        target_table("texts"),
    ),
    preset="classify",
    finetune_preset="finetune-classify",
)
