"""lm train: from text files to a model folder."""

import sys

import click

from lmcli.commands import BEGAN, options
from lmcli.errors import Interrupted, UsageError


@click.command(epilog="""\b
Examples:
  lm train notes.txt                              a model of notes.txt in runs/notes
  lm train book.txt -o runs/book --preset small --time 10m
  lm train a.txt b.jsonl --weights 3,1            three rows of a.txt to one of b.jsonl
  lm train chat.jsonl --field message --set model.hidden_size=192
  lm train pairs.jsonl --preset seq2seq-small     rows with source and target
  lm train reviews.tsv --preset encoder-small     columns text and label
  lm train squad.jsonl --preset qa --from bert    rows with context, question, answers
  lm train more.txt --from runs/book -o runs/more
  lm train more.txt --from runs/book --lora 8     trains an adapter of rank 8 beside it
  lm train --resume runs/book
  lm train notes.txt --check-resume               whether a run on this text can be resumed to the same bit""")
@click.argument("data", nargs=-1, metavar="DATA...")
@click.option("-o", "--output", metavar="DIR", help="Run folder.  [default: runs/NAME, the next free number]")
@click.option("--preset", default="auto", show_default=True, metavar="NAME|FILE",
              help="Recipe: auto (chooses by text, time and machine), tiny, small, base; encoder-small, classify, qa; "
                   "seq2seq-small, translate, summarize, transformer-2017; finetune; or a .yaml file.")
@click.option("--set", "sets", multiple=True, metavar="SECTION.KEY=VALUE", help="Override one value of the preset.")
@click.option("--from", "origin", metavar="MODEL", help="Go on training this model folder, with its tokenizer.")
@click.option("--lora", type=click.IntRange(min=1), metavar="RANK",
              help="With --from: train adapters of this rank (LoRA), not the model's own weights.")
@click.option("--freeze", type=click.IntRange(min=1), metavar="N",
              help="With --from: leave the embedding and the N blocks next to it as they are.")
@click.option("--remember", multiple=True, metavar="FILE",
              help="With --from: bits per byte of this text before and after, to see what is forgotten.")
@click.option("--tokenizer", "tokenizer_folder", metavar="DIR", help="Use this tokenizer instead of learning one.")
@options.budgets
@click.option("--weights", type=options.Weights(), default=(), metavar="W,W...",
              help="One for each DATA: draw the rows from them in this proportion, whatever their sizes.")
@click.option("--val", multiple=True, metavar="FILE", help="Validate on this, instead of on a held-out tenth.")
@click.option("--target", "targets", multiple=True, metavar="FILE",
              help="Line by line what DATA is to be turned into: two files that belong together.")
@click.option("--val-target", "val_targets", multiple=True, metavar="FILE", help="The same for --val.")
@click.option("--on-long", type=click.Choice(["truncate", "skip", "error"]), default="truncate", show_default=True,
              help="An example longer than the context: cut its end off, leave it out, or stop.")
@click.option("--documents", type=click.Choice(["file", "line", "blank"]), default="file", show_default=True,
              help="What a document is: the whole file (<|endoftext|> parts it), a line, or a paragraph.")
@click.option("--seed", type=click.IntRange(min=0), help="Of weights, data order, dropout, samples.")
@click.option("--resume", metavar="DIR",
              help="Go on with an interrupted run, to the same bit; needs nothing else, takes --set train.learning_rate.")
@click.option("--allow-changes", is_flag=True,
              help="With --resume: go on though data, tokenizer, recipe or versions have changed, and say what has.")
@click.option("--check-resume", is_flag=True,
              help="Train nothing, but prove in under a minute that runs on this data can be resumed to the same bit here.")
@click.option("--overwrite", is_flag=True, help="Replace the run that the folder -o holds.")
@options.nproc
@click.option("--shard/--no-shard", default=None,
              help="Let processes share out the model, or each hold all of it.  [default: as one could hold it]")
@options.reading
@options.hardware
@options.quiet
@options.verbose
def train(data, output, preset, sets, origin, lora, freeze, remember, tokenizer_folder, time_, steps, tokens, epochs,
          weights, val, targets, val_targets, on_long, documents, seed, resume, allow_changes, check_resume, overwrite,
          nproc, shard, format_, fields, include, on_error, device, dtype, threads, quiet, verbose):
    """Trains a model on text files (or a directory, or standard input) and prints the folder it lies in.

    A decoder learns from text; an encoder from text (masked words), from rows with text and label, or from rows with
    context, question and answers; an encoder–decoder from rows with source and target. Without --tokenizer a byte-level
    BPE is learnt first, on the training part only.
    The first budget reached of --time, --steps, --tokens and --epochs ends the run; any of them replaces the preset's.
    Ctrl-C saves and tells how to resume.
    """
    if dtype == "float16":
        raise UsageError("float16 training needs loss scaling, which lm does not have", hint="--dtype bfloat16 or float32")
    if origin and any(setting.lstrip().startswith(("model.", "tokenizer.")) for setting in sets):
        raise UsageError("--from brings its model and tokenizer: leave --set model.… and tokenizer.… out")
    if resume:
        _refuse_beside_resume(sets, allow_changes)
    elif allow_changes:
        raise UsageError("--allow-changes goes with --resume")
    elif weights and targets:
        raise UsageError("--weights mixes texts, --target pairs the lines of two", hint="leave one of them out")
    elif not data and sys.stdin.isatty():
        raise UsageError("nothing to train on: give DATA, or pipe text in", hint="lm train --help")
    from lmcli import display, launch

    note = (lambda text: None) if quiet else display.note
    if nproc > 1 and not launch.is_member():
        click.get_current_context().exit(launch.together(nproc, sys.argv[1:], note))
    from lmcli import recipes, runs
    from lmcli.text.documents import Layout
    from lmcli.training import parallel

    team = parallel.join()
    if not team.leads:
        return _follow(team, device, threads)
    if team.size > 1:
        output, resume, overwrite = launch.again(output, resume, overwrite)
    if resume:
        run = runs.resume(resume, device, threads or 0, BEGAN, note, sets, allow_changes, team, shard)
    else:
        def resolve(below, preset=preset):
            return recipes.resolve(preset, sets, {
                "time": time_, "steps": steps, "tokens": tokens, "epochs": epochs, "seed": seed,
                "precision": None if dtype == "auto" else dtype, "lora_rank": lora, "frozen_layers": freeze}, below)

        request = runs.Request(
            resolve({}), data, output, val, include, Layout(documents, format_, fields, on_error), origin, tokenizer_folder,
            overwrite, device, threads or 0, resolve if preset == "auto" else None, on_long, (targets, val_targets),
            remember, weights, shard)
        if check_resume:
            from lmcli import resume_check

            click.echo(resume_check.check(request, note))
            return
        run = runs.start(request, BEGAN, note, team)
    with run.signals(), display.TrainingView(quiet, run.bytes_per_token, run.objective.target) as view:
        for kind, event in run.events():
            {"step": view.step, "validation": view.validation, "sample": view.sample, "note": view.note}[kind](event)
    if run.stopped:
        raise Interrupted(f"stopped after step {run.step:,}, and saved; go on with: lm train --resume {run.folder}")
    for text in (run.summary(), *run.shares(done=True), *run.memories()):
        note(text)
    click.echo(run.folder)


def _follow(team, device, threads):
    """The part of a process that does not lead. It has nothing to say; that the leader has gone is not its to tell."""
    import signal

    from lmcli import runs
    from lmcli.errors import EXIT_FAILED, Lost

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the leader answers these
    try:
        runs.follow(team, device, threads or 0)
    except Lost:
        click.get_current_context().exit(EXIT_FAILED)


def _refuse_beside_resume(sets, allow_changes):
    """--resume needs nothing else; whatever would make it another run is refused."""
    context = click.get_current_context()
    from lmcli.training.changes import CHANGEABLE

    allowed = {"resume", "allow_changes", "nproc", "shard", "sets", "device", "threads", "quiet", "verbose"}
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name)
        if source == click.core.ParameterSource.COMMANDLINE and parameter.name not in allowed:
            raise UsageError(f"--resume needs nothing else: leave {parameter.opts[0]} out",
                             hint="to go on with other data or settings, start a new run with --from")
    for setting in sets:
        key = setting.partition("=")[0].strip()
        if key not in {f"train.{key}" for key in CHANGEABLE} and not (allow_changes and key.startswith("train.")):
            raise UsageError(f"--resume goes on with the settings of its run, {setting} is another: leave --set out",
                             hint=f"only these of train may change: {', '.join(CHANGEABLE)}; --allow-changes lets others")
