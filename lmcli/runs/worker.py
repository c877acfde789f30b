"""What a worker process of a run does: it makes the leader's steps."""

from contextlib import suppress
from pathlib import Path

from lmcli.distributed.data_parallel import ReplicaGroup
from lmcli.distributed.sharding import ShardedGroup
from lmcli.errors import ProcessLost, UserError
from lmcli.model.device import select_device
from lmcli.recipes import with_budget
from lmcli.runs import parallelism, run_folder
from lmcli.runs.resume import rebuild
from lmcli.runs.run import make_trainer
from lmcli.training import datasets, resume_state
from lmcli.training.divergence import Diverged


def work(replicas: ReplicaGroup, device: str, threads: int) -> None:
    """Joins the run that the leader announces and makes its steps to the end.

    All processes see the same files. Raises ProcessLost if the leader disappears, or fails for a
    reason that this process has met as well.
    """
    announced = replicas.receive()
    if announced["shards"]:
        replicas = ShardedGroup(replicas.rank, replicas.size)
    # the leader's run, rebuilt from its folder; its precision, since "auto" is measured
    folder, recipe, facts = run_folder.reopen(Path(announced["folder"]))
    recipe = with_budget(recipe, announced["budget"])
    source = datasets.source_from_facts(facts["data"])
    split = datasets.split(source, recipe.train.validation_bytes, _ignore)
    device_config = select_device(device, announced["precision"], threads, training=True)
    data, train_step = rebuild(folder.path, recipe, split, device_config, replicas.sharded, _ignore)
    train_step = parallelism.join(train_step, replicas, announced["resumed"])
    if announced["resumed"]:
        saved = resume_state.newest(folder.states, _ignore)
        saved.restore(train_step.model, train_step.optimizer)
    trainer = make_trainer(train_step, data, 0.0)
    try:
        for _, path in trainer.follow():
            # if a disk refuses, the leader hears of it and reports it
            with suppress(UserError):
                resume_state.write_shard(Path(path), train_step.model, train_step.optimizer)
    except UserError as error:
        # memory that ran out in this process only
        if replicas.sharded and not isinstance(error, Diverged):
            raise
        raise ProcessLost(
            error.what, hint="the leader has the same error and reports it"
        ) from error


def _ignore(text: str) -> None:
    """Drops a note: the leader prints the same one."""
