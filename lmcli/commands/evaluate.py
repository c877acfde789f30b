"""lm evaluate: metrics of predictions, or of the models that make them, on labeled records."""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import click

from lmcli.commands import options
from lmcli.errors import UsageError
from lmcli.terminal import progress

if TYPE_CHECKING:
    from lmcli.evaluation.model_predictions import ModelPredictor
    from lmcli.evaluation.predictions import EvalDataset
    from lmcli.evaluation.preparation import EvaluationOptions
    from lmcli.evaluation.systems import System, SystemResult
    from lmcli.evaluation.tasks import Task
    from lmcli.output.evaluate import EvaluationFormat

TASKS = ("classify", "translate", "summarize", "qa", "pairs")


@options.command(
    """
  lm evaluate -m sentiment reviews.jsonl
  lm evaluate -m runs/small -m runs/base --by domain reviews.jsonl
  lm evaluate --predictions labels.txt reviews.tsv
  lm classify -m sentiment --json reviews.jsonl | lm evaluate --format jsonl
  lm evaluate -m marian-en-de english-german.tsv
  lm evaluate --references de.txt --predictions a.txt --predictions b.txt
  lm evaluate -m bart-cnn --task summarize --stemmer articles.jsonl
  lm evaluate --predictions answers.jsonl squad.jsonl
  lm evaluate -m gpt2 -m runs/s --by phenomenon --pairs blimp.jsonl
""",
    guide="evaluating",
)
@options.files
@options.models("Model to evaluate; several are compared with the first.")
@options.choice(
    "--task",
    values=["auto", *TASKS],
    default="auto",
    metavar="TASK",
    help="What is measured; auto: by the first record's fields.",
)
@options.repeated("--metric", "metrics", metavar="NAME", help="Only this metric; may be repeated.")
@click.option("--by", metavar="FIELD", help="Also evaluate each value of this field.")
@options.rare(
    options.flag("--pairs", help="Same as --task pairs: how often the first text is likelier."),
    options.flag(
        "--stemmer/--no-stemmer", default=False, help="ROUGE compares stems of English words."
    ),
    options.choice(
        "--bleu-tokenizer",
        values=["13a", "intl", "zh", "char", "none"],
        default="13a",
        help="Tokenizer of sacreBLEU.",
    ),
    options.number(
        "--resamples",
        at_least=0,
        default=1000,
        help="Bootstrap samples for intervals and permutations for p-values; 0: neither.",
    ),
    options.number("--seed", at_least=0, default=0, help="Seed of resampling and generation."),
)
@options.section(
    "Data",
    options.repeated(
        "--predictions", metavar="FILE", help="Predictions, a line a record; may be repeated."
    ),
    click.option(
        "--references", metavar="FILE", help="References, a line a record, if FILE has none."
    ),
    options.rare(
        click.option("--reference-field", metavar="NAME", help="Field of the reference or label."),
        click.option("--prediction-field", metavar="NAME", help="Field of the prediction."),
    ),
)
@options.rare(options.generation_limits)
@options.json_output
@options.input_format
@options.hardware
@options.batch_tokens
@options.quiet
@options.verbose
@options.multiprocess
def evaluate(args: options.Arguments) -> None:
    """Metrics of a task on labeled records, each with a 95 % interval; compares several systems.

    Rows have text and label (classify), source and target (translate, summarize), question, context
    and answers (qa), or two texts (pairs). Predictions come from models (-m), from files, or from a
    field `prediction` of the rows. Classify: accuracy, precision, recall, F1, Matthews correlation;
    translate: BLEU, chrF; summarize: ROUGE; qa: exact match and token F1 of SQuAD.
    What each number means: lm help numbers.
    """
    # LM_MODEL only counts if predictions have to be made
    source = click.get_current_context().get_parameter_source("models")
    model_by_default = source is click.core.ParameterSource.ENVIRONMENT
    if args.predictions and model_by_default:
        args.models = ()
    options.distinct_models(args.models, needed=False)
    request = _request(args)
    if not args.pool.is_leader:
        from lmcli.evaluation.model_predictions import remote_task

        task_of = remote_task(args.models, lambda name, task: _predictor(name, task, request, args))
        return args.pool.serve(task_of)
    files: list[str] = []
    if args.files or not args.references:
        files = options.input_files(args.files, args.include, args.quiet)
    from lmcli.catalog.abilities import abilities
    from lmcli.data.files import display_name
    from lmcli.display import note
    from lmcli.evaluation import preparation, systems, tasks
    from lmcli.output import evaluate as output

    # check everything before the work
    configs = preparation.model_configs(args.models)
    dataset, task = preparation.open_dataset(request, files, configs)
    if model_by_default and next(iter(dataset)).predicted is not None:
        args.models, configs = (), {}
    figures = tasks.select_figures(task, args.metrics)
    for name, config in configs.items():
        tasks.require_ability(task, name, config, abilities(config)[0])
    survey = preparation.survey_dataset(task, dataset, configs)

    def new_system(name: str) -> "System":
        return systems.System(name, preparation.new_counts(request, dataset, figures, survey))

    new_system("")  # a missing library is an error before the work
    evaluation = EvaluationRun(args, request, task, dataset, survey.records, survey.texts)
    source_name = display_name((files or [args.references])[0])
    measured = evaluation.measure(new_system, source_name)
    results = systems.evaluate_systems(measured, survey.groups, figures, args.resamples, args.seed)
    if survey.empty_references and not args.quiet:
        note(f"{survey.empty_references:,} of {survey.records:,} references are empty")
    style = output.EvaluationFormat(
        task, len(measured) > 1, bool(args.by), args.resamples, args.seed
    )
    printed = _print(results, style, args.as_json)
    for text in () if args.quiet else output.remarks(printed):
        note(text)


def _request(args: options.Arguments) -> "EvaluationOptions":
    """The options of the evaluation; UsageError for those that exclude each other."""
    from lmcli.evaluation.preparation import EvaluationOptions

    if args.pairs and args.task not in ("auto", "pairs"):
        raise UsageError(
            f"--pairs and --task {args.task} exclude each other", hint="leave one of them out"
        )
    if not args.files and "-" in args.predictions and not args.references:
        raise UsageError(
            "standard input has the predictions, so there are no references",
            where="--predictions",
            hint="give a FILE or --references",
        )
    names = {field.name for field in dataclasses.fields(EvaluationOptions)}
    values = {name: value for name, value in vars(args).items() if name in names}
    values |= {"format": args.format_, "batch_tokens": args.batch_tokens or 0}
    return EvaluationOptions(**values | ({"task": "pairs"} if args.pairs else {}))


def _predictor(
    name: str, task: "Task", request: "EvaluationOptions", args: options.Arguments
) -> "ModelPredictor":
    from lmcli.evaluation.model_predictions import ModelPredictor

    return ModelPredictor(task, options.load_model(name, args), request)


def _print(
    results: "Iterable[SystemResult]", style: "EvaluationFormat", as_json: bool
) -> "list[SystemResult]":
    """Prints the results as they come, on a terminal all at the end; returns them."""
    from lmcli.display import print_rows
    from lmcli.terminal.tables import table

    printed: list[SystemResult] = []
    if as_json or not sys.stdout.isatty():
        print_rows(style.rows(results, as_json, printed), style.columns, as_json)
        return printed
    printed += results
    click.echo("\n".join(table(*drawn) for drawn in style.tables(printed)), nl=False)
    return printed


@dataclasses.dataclass(frozen=True)
class EvaluationRun:
    """One evaluation: the command's options, its task, its `records` records, their first texts."""

    args: options.Arguments
    request: "EvaluationOptions"
    task: "Task"
    dataset: "EvalDataset"
    records: int
    texts: list[str]

    def measure(self, new_system: Callable[[str], "System"], source: str) -> list["System"]:
        """The models and files of predictions, each with all its predictions.

        Without either, the predictions are those in the rows, and the system is called `source`.
        """
        from lmcli.evaluation.predictions import with_predictions

        systems = []
        for number, name in enumerate(self.args.models):
            systems.append(new_system(name))
            self.predict(systems[-1], number)
        rows = () if self.args.models else (None,)
        for file in self.args.predictions or rows:
            systems.append(new_system(file or source))
            for _ in systems[-1].add(with_predictions(self.dataset, file)):
                pass
        return systems

    def predict(self, system: "System", number: int) -> None:
        """Adds the predictions of model number `number`; in a pipe prints how many there are."""
        from lmcli.display import SECONDS_BETWEEN_LINES, note
        from lmcli.model.device import track_peak_memory

        tracked, noted = track_peak_memory(), time.monotonic()
        predictor = _predictor(system.name, self.task, self.request, self.args)
        tokenizers = {system.name: predictor.model.tokenizer}
        options.remark_foreign_text(self.texts, tokenizers, self.args)
        predictions = predictor.predict_all(self.dataset, self.args.pool, number)
        silent = self.args.quiet or progress.is_watched()
        with progress.stage(system.name, self.records):
            for done in system.add(predictions):
                if time.monotonic() - noted >= SECONDS_BETWEEN_LINES and not silent:
                    noted, rate = time.monotonic(), predictor.records / predictor.seconds
                    so_far = f"{done:,} of {self.records:,} records"
                    note(f"{system.name}: {so_far}, {rate:.3g} a second")
        system.facts = predictor.facts(tracked)
        if predictor.truncated and not self.args.quiet:
            note(
                f"{system.name}: {predictor.truncated:,} of {self.records:,} records are longer "
                f"than the context of {predictor.model.context} tokens and were truncated"
            )
