"""lm evaluate: how good predictions, or the models that make them, are on labelled records."""

import sys
import time

import click

from lmcli.commands import options
from lmcli.errors import UsageError

TASKS = ("classify", "translate", "summarize", "qa", "pairs")


@click.command(epilog="""\b
Examples:
  lm evaluate -m sentiment reviews.jsonl
  lm evaluate -m runs/small -m runs/base --by domain reviews.jsonl
  lm evaluate --predictions labels.txt reviews.tsv
  lm classify -m sentiment --json reviews.jsonl | lm evaluate --format jsonl
  lm evaluate -m marian-en-de english-german.tsv
  lm evaluate --references german.txt --predictions a.txt --predictions b.txt --metric bleu
  lm evaluate -m bart-cnn --task summarize --stemmer articles.jsonl
  lm evaluate --predictions answers.jsonl squad.jsonl
  lm evaluate -m gpt2 -m runs/s --by phenomenon --pairs blimp.jsonl""")
@click.argument("files", nargs=-1, metavar="[FILE]...")
@click.option("-m", "--model", "models", multiple=True, envvar="LM_MODEL", type=click.Path(), metavar="DIR",
              show_envvar=True, help="Model that makes the predictions; several are compared with the first.")
@click.option("--predictions", multiple=True, metavar="FILE", help="Predictions, a line for each record; may be repeated.")
@click.option("--references", metavar="FILE", help="What is right, a line for each record, where FILE does not say it.")
@click.option("--task", type=click.Choice(["auto", *TASKS]), default="auto", show_default=True,
              help="auto goes by the fields of the first record.")
@click.option("--pairs", is_flag=True, help="The same as --task pairs: how often the first text is the likelier one.")
@click.option("--metric", "metrics", multiple=True, metavar="NAME", help="Only this figure; may be repeated.")
@click.option("--by", metavar="FIELD", help="Figures for each value of this field too.")
@click.option("--reference-field", metavar="NAME", help="Field of what is right.")
@click.option("--prediction-field", metavar="NAME", help="Field of the prediction.")
@click.option("--stemmer/--no-stemmer", default=False, help="Whether ROUGE compares stems of (English) words.")
@click.option("--bleu-tokenizer", type=click.Choice(["13a", "intl", "zh", "char", "none"]), default="13a",
              show_default=True, help="How sacrebleu parts words.")
@click.option("-n", "--max-new-tokens", type=click.IntRange(min=1), help="Tokens of a text at most.")
@click.option("--num-beams", type=click.IntRange(1, 1024), help="Beams of a text.  [default: the folder's]")
@click.option("--stop", multiple=True, metavar="TEXT", help="End a text before this.")
@click.option("--resamples", type=click.IntRange(min=0), default=1000, show_default=True,
              help="Bootstrap samples behind intervals, and trials behind p-values; 0 leaves both out.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True,
              help="Of these samples, and of texts where a model draws them.")
@options.json_output
@options.layout
@options.hardware
@options.batch_tokens
@options.quiet
@options.verbose
@options.several
def evaluate(files, models, predictions, references, task, pairs, metrics, by, as_json, resamples, seed, quiet, crew,
             **given):
    """Figures of a task from labelled records, each with a 95 % interval; of several systems how far they lie apart.

    Rows have text and label (classify), source and target (translate, summarize), question, context and answers (qa), or
    two texts (pairs). Predictions come from models (-m), from files, or from a field `prediction` of the rows. Classify:
    accuracy, precision, recall, F1, Matthews' correlation; translate: BLEU, chrF; summarize: ROUGE; qa: exact match and
    token F1 as SQuAD has them.
    """
    source = click.get_current_context().get_parameter_source("models")
    by_default = source is click.core.ParameterSource.ENVIRONMENT  # LM_MODEL is for where predictions are to be made
    models = () if predictions and by_default else models
    if pairs and task not in ("auto", "pairs"):
        raise UsageError(f"--pairs and --task {task} exclude each other")
    if not files and "-" in predictions and not references:
        raise UsageError("standard input has the predictions: give a FILE or --references", where="--predictions")
    if not crew.leads:
        from lmcli.analysis.tasks import errand

        return crew.follow(errand(models, lambda name, task: _runner(name, task, seed, given)))
    names = options.input_files(files, given["include"], quiet) if files or not references else []
    from lmcli import api
    from lmcli.analysis import system_rows, systems, tasks, text_metrics
    from lmcli.display import note
    from lmcli.text import labelled

    configs = tasks.configurations(models)
    data, chosen = tasks.prepared("pairs" if pairs else task, names, references, by, metrics, configs, given)
    if by_default and next(iter(data)).predicted is not None:
        models, configs = (), {}
    figures = tasks.picked(chosen, metrics)
    for name, config in configs.items():
        tasks.require(chosen, name, config, api.abilities(config)[0])
    found = tasks.survey(chosen, data, configs)

    def counts():
        if data.form.kind == "labels":
            return systems.LabelCounts(data.several)
        return systems.TextCounts(text_metrics.chosen(figures, given["bleu_tokenizer"], given["stemmer"],
                                                      2 if found.unanswerable else 1))
    counts()  # a library that is not there is told before the work
    measured = []
    for place, name in enumerate(models):
        measured.append(system := systems.System(name, counts()))
        _run(system, chosen, data, found.records, quiet, seed, given, crew, place)
    for file in predictions or (() if models else (None,)):
        measured.append(system := systems.System(file or data.name_of((names or [references])[0]), counts()))
        for _ in system.take(labelled.predicted(data, file)):
            pass
    rows = systems.measure(measured, found.groups, figures, resamples, seed)
    if found.blank and not quiet:
        note(f"{found.blank:,} of {found.records:,} references are empty")
    kept = _print(rows, chosen, as_json, len(measured) > 1, bool(by), resamples, seed)
    for text in () if quiet else system_rows.remarks(kept):
        note(text)


def _runner(name, task, seed, given):
    from lmcli.analysis.tasks import Runner

    loaded = options.load_model(name, given["device"], given["dtype"], given["threads"], given["verbose"])
    writing = {"max_new_tokens": given["max_new_tokens"], "num_beams": given["num_beams"], "stop": given["stop"],
               "seed": seed}
    return Runner(task, loaded, writing, given["batch_tokens"] or 0)


def _run(system, task, data, records, quiet, seed, given, crew, place):
    """Has a model make its predictions; says every ten seconds how far it is."""
    from lmcli.display import SECONDS_BETWEEN_LINES, note
    from lmcli.model.device import follow_memory

    followed, told = follow_memory(), time.monotonic()
    runner = _runner(system.name, task, seed, given)
    for done in system.take(runner.predictions(data, crew, place)):
        if time.monotonic() - told >= SECONDS_BETWEEN_LINES and not quiet:
            told = time.monotonic()
            note(f"{system.name}: {done:,} of {records:,} records, {runner.records / runner.seconds:.3g} a second")
    system.facts = runner.facts(followed)
    if runner.cut and not quiet:
        note(f"{system.name}: {runner.cut:,} of {records:,} records are longer than the context of {runner.model.context} "
             "tokens and were not read whole")


def _print(rows, task, as_json, several, grouped, resamples, seed):
    """Writes the rows as they come, on a terminal when all are there; returns them."""
    from lmcli.analysis import system_rows
    from lmcli.display import print_rows, table

    kept = []

    def each():
        for row in rows:
            kept.append(row)
            if as_json:
                yield system_rows.document(row, task.name, several, grouped, resamples, seed)
            else:
                yield from system_rows.lines(row)

    if as_json or not sys.stdout.isatty():
        print_rows(each(), system_rows.columns(task.form.kind == "labels", several, grouped), as_json)
        return kept
    kept += rows
    click.echo("\n".join(table(*drawn) for drawn in system_rows.tables(kept, several, grouped)), nl=False)
    return kept
