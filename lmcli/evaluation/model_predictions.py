"""The predictions that a model makes for the records of a task."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from lmcli.api import Model
from lmcli.data.schema import MESSAGES, find_pair_schema, question_prompt, row_messages
from lmcli.distributed.work_queue import LOCAL_POOL, RemoteTask, WorkerPool
from lmcli.evaluation.predictions import EvalDataset, EvalRecord, Prediction
from lmcli.evaluation.preparation import EvaluationOptions
from lmcli.evaluation.tasks import EVALUATION_TASKS, Task
from lmcli.generation.prompts import PROMPTS_PER_BATCH
from lmcli.model.device import peak_memory
from lmcli.model.finite import BadResult
from lmcli.scoring.scorer import ScoringInput
from lmcli.text.chat_template import chat_template

# the batches of `lm generate`, so that both write the same
GENERATION_BATCH, OTHER_BATCH = PROMPTS_PER_BATCH, 512
PROBABILITIES_AT_ONCE = 1_000_000
Predictions = tuple[list[Prediction], int]  # for a batch; and how many records were truncated


@dataclass
class ModelPredictor:
    """A model that predicts the outputs of a task's records.

    Of the records so far, `truncated` counts those longer than the model's context; `seconds` is
    the time that all predictions took.
    """

    task: Task
    model: Model
    options: EvaluationOptions = field(default_factory=EvaluationOptions)
    truncated: int = field(default=0, init=False)
    seconds: float = field(default=0.0, init=False)
    records: int = field(default=0, init=False)

    def predict_all(
        self, dataset: EvalDataset, pool: WorkerPool = LOCAL_POOL, number: int = 0
    ) -> Iterator[tuple[EvalRecord, Prediction]]:
        """Each record with its prediction, in order.

        Other processes of the pool know the model by its `number`, see `remote_task`.
        """
        name = self.task.name
        task = RemoteTask(
            self.predict,
            lambda batch: (number, name, [(r.inputs, r.row, r.file, r.line) for r in batch]),
            size=len,
        )
        size = GENERATION_BATCH if self._method() == self._generate else OTHER_BATCH
        # a probability of each label of each record of a batch is held
        size = min(
            size, max(1, PROBABILITIES_AT_ONCE // max(1, len(self.model.model.config.labels)))
        )
        started = time.perf_counter()
        for batch, (predictions, truncated) in pool.map_in_order(dataset.batches(size), task):
            self.seconds += time.perf_counter() - started
            self.records += len(batch)
            self.truncated += truncated
            yield from zip(batch, map(tuple, predictions), strict=True)
            started = time.perf_counter()

    def predict(self, batch: Sequence[EvalRecord]) -> Predictions:
        """The predictions for some records, and how many of them were truncated."""
        return self._method()(batch)

    def _method(self) -> Callable[[Sequence[EvalRecord]], Predictions]:
        kind, span = self.task.schema.kind, self.model.model.config.head == "span"
        if kind == "labels":
            return self._classify
        if kind == "pairs":
            return self._compare_pairs
        return self._answer if kind == "answers" and span else self._generate

    def _classify(self, batch: Sequence[EvalRecord]) -> Predictions:
        texts = [record.inputs if len(record.inputs) == 2 else record.inputs[0] for record in batch]
        with _located(batch):
            results = self.model.classify(texts, batch=self.options.batch_tokens)
        return [tuple(each.labels) for each in results], sum(each.truncated for each in results)

    def _generate(self, batch: Sequence[EvalRecord]) -> Predictions:
        config = self.model.model.config
        options: dict[str, Any] = {
            "max_new_tokens": self.options.max_new_tokens,
            "num_beams": self.options.num_beams,
            "stop": self.options.stop,
            "seed": self.options.seed,
            "on_long": "slide" if config.shape == "decoder" else "truncate",  # they are counted
        }
        if config.shape == "decoder":
            options["temperature"] = 0.0
        template = None
        if config.shape == "decoder" and all(map(_is_chat, batch)):
            template = chat_template(self.model.tokenizer.settings)
        bos = False if template else None
        # a blank input has no prediction
        sources = {
            i: template.prompt(row_messages(record.row, MESSAGES[0])[:-1])
            if template
            else _source(record, config.shape == "decoder")
            for i, record in enumerate(batch)
            if any(map(str.strip, record.inputs))
        }
        truncated, texts = 0, {}
        if config.positions != "relative":
            lengths = [len(self.model.prompt(source, bos)) for source in sources.values()]
            truncated = sum(length > self.model.context for length in lengths)
        if sources:
            batch_tokens = self.options.batch_tokens
            with _located([batch[i] for i in sources]):
                results = self.model.generate(
                    list(sources.values()), bos=bos, batch=batch_tokens, **options
                )
            texts = {i: result.text.strip() for i, result in zip(sources, results)}
        return [(texts[i],) if texts.get(i) else () for i in range(len(batch))], truncated

    def _answer(self, batch: Sequence[EvalRecord]) -> Predictions:
        questions, contexts = ([record.inputs[k] for record in batch] for k in (0, 1))
        with _located(batch):
            answers = self.model.answer(questions, contexts, batch=self.options.batch_tokens)
        texts: list[Prediction] = [(each.text,) if each.text else () for each in answers]
        return texts, sum(each.truncated for each in answers)

    def _compare_pairs(self, batch: Sequence[EvalRecord]) -> Predictions:
        scorer = self.model.scorer(batch=self.options.batch_tokens)
        inputs = [ScoringInput(text) for record in batch for text in record.inputs]
        scores = scorer.score(inputs)
        for i, score in enumerate(scores):
            if score.problem:
                self.model.require_sound(score.problem, batch[i // 2].location)
        logprobs = [score.logprob for score in scores]
        predictions: list[Prediction] = []
        for first, second in zip(logprobs[::2], logprobs[1::2]):
            if first is None or second is None:
                predictions.append(())
            else:
                predictions.append(("true" if first > second else "false",))
        return predictions, 0

    def facts(self, memory_tracked: bool) -> dict[str, Any]:
        """What the model costs: parameters, bytes on disk, bytes of memory, records a second.

        `memory_bytes` is the peak since `track_peak_memory` (see model/device.py); None without it.
        """
        model, device = self.model, self.model.device_config.device
        files = model.folder.glob("*.safetensors") if model.folder else ()
        return {
            "parameters": sum(int(weight.numel()) for weight in model.model.parameters()),
            "disk_bytes": sum(file.stat().st_size for file in files),
            "memory_bytes": peak_memory(device) if memory_tracked else None,
            "records_per_second": self.records / self.seconds if self.seconds else None,
        }


@contextmanager
def _located(records: Sequence[EvalRecord]) -> Iterator[None]:
    """Lets the error of a result name the record that it is for."""
    try:
        yield
    except BadResult as error:
        raise error.at(records[error.index].location) from error


def remote_task(models: Sequence[str], load: Callable[[str, Task], ModelPredictor]) -> RemoteTask:
    """The task of a worker: predictions of the model that the leader names; `load` loads it."""
    loaded: dict[int, ModelPredictor] = {}

    def work(request: tuple[int, str, list[tuple]]) -> Predictions:
        number, task, records = request
        if number not in loaded:
            loaded.clear()  # before loading: there may be no memory for both
            loaded[number] = load(models[number], EVALUATION_TASKS[task])
        return loaded[number].predict(
            [EvalRecord(tuple(inputs), (), None, *place) for inputs, *place in records]
        )

    return RemoteTask(work)


def _is_chat(record: EvalRecord) -> bool:
    """True if the input is put together from messages, of which the last is the reference."""
    pair = find_pair_schema(record.row)
    if pair is None or pair.fields != MESSAGES:
        return False
    return (
        record.inputs == pair.texts(record.row)[:1]
        and len(row_messages(record.row, MESSAGES[0])) > 1
    )


def _source(record: EvalRecord, decoder: bool) -> str:
    """What a model reads to generate its prediction, as in training on such rows.

    A question comes with its context; for a decoder the separator of source and target follows.
    """
    inputs = record.inputs
    source = question_prompt(*inputs) if len(inputs) == 2 else inputs[0]
    if not decoder:
        return source
    pair = find_pair_schema(record.row)
    return source + (pair.separator if pair else "\n")
