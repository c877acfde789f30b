"""A training run under way: what happens between its first step and its finished folder."""

import dataclasses
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lmcli.analysis import remembering
from lmcli.analysis.card import model_card
from lmcli.analysis.loss_curve import draw
from lmcli.checkpoints import adapter_base
from lmcli.checkpoints import folder as checkpoints
from lmcli.checkpoints.config_json import family_of
from lmcli.config import Recipe
from lmcli.errors import UserError
from lmcli.inference.decoding import Decoder
from lmcli.inference.ordering import batch_tokens
from lmcli.inference.perplexity import measured
from lmcli.inference.scoring import Scorer
from lmcli.model import kernels
from lmcli.model.device import Placement
from lmcli.model.transformer import Transformer
from lmcli.recipes import BUDGETS
from lmcli.storage import copy_file, sha256_of, write_text
from lmcli.text.examples import unigram_entropy
from lmcli.training import changes, data, loop, memory_room, mixing, optimizers, run_folder, state
from lmcli.training.divergence import Diverged
from lmcli.training.evaluation import Figures, evaluate
from lmcli.training.objectives import OBJECTIVES
from lmcli.training.parallel import ALONE, Team
from lmcli.training.span_evaluation import Asked

SAMPLE_TOKENS = 60
EVALUATION_BATCH_TOKENS = 16_384
LOGGED = ("step", "tokens", "elapsed", "loss", "learning_rate", "gradient_norm", "tokens_per_second")


def tokenizer_files(folder: Path) -> dict[str, str]:
    """The SHA-256 of the files that make a run's tokenizer."""
    files = (folder / name for name in (*checkpoints.TOKENIZERS, "target.spm", "tokenizer_config.json"))
    return {file.name: sha256_of(file) for file in files if file.is_file()}


class TrainingRun:
    """A run under way. Iterate `events()` inside `signals()`; `stopped` tells whether a signal ended it."""

    def __init__(self, place_of_run: run_folder.RunFolder, recipe: Recipe, prepared: data.TrainingData,
                 source: data.Source, model: Transformer, placement: Placement, began: float, team: Team = ALONE):
        self.place, self.recipe, self.prepared, self.source = place_of_run, recipe, prepared, source
        # a model that is to be shared out may be too large for one device
        self.model, self.placement = (model if team.shards else model.to(placement.device)).train(), placement
        self.result: dict = {}
        self.chosen: list[str] = []
        self.base: dict[str, str] = {}  # of adapters: `model`, which names what they are for, and `weights`, its fingerprint
        self.remembered: list[dict] = []
        self.headline = ""
        self.best_sha256 = ""  # of the weights of the best model so far, as the folder has them
        torch.manual_seed(recipe.train.seed)
        self.objective = OBJECTIVES[recipe.train.objective]
        rows = data.training_rows(prepared, self.objective, model.config.decoder_start_token_id, recipe.train)
        measure, read = self._measure(rows)
        self.loop = loop.Run(model, rows, recipe.train, placement, measure, began, read, objective=self.objective)

    def _measure(self, rows) -> tuple[Callable[[], object], int]:
        """How the model is measured on its validation part, and how many tokens that reads."""
        prepared, tokenizer = self.prepared, self.prepared.tokenizer
        if self.objective.name == "causal":
            # a model that is to be shared out is on its device only later
            scorer = Scorer(self.model, tokenizer, tokenizer.prefix, batch=batch_tokens(self.placement.device))
            read = sum(len(document.ids) for document in prepared.validation) * scorer.context // scorer.stride
            return lambda: measured(scorer, prepared.validation), read
        if self.objective.name == "span":
            held = Asked(data.windows(prepared, prepared.validation, self.recipe.train.doc_stride), prepared.posed,
                         EVALUATION_BATCH_TOKENS, self.recipe.train.metric)
            return lambda: held.measure(self.model), held.tokens
        known = Figures(self.objective.target, by=self.recipe.train.metric)
        if self.objective.name == "masked":
            ids = data.validation_ids(prepared)
            def batches():
                return rows.in_order(ids, EVALUATION_BATCH_TOKENS)
        else:
            held_out = data.example_rows(prepared.validation, data.template(
                prepared, self.model.config.decoder_start_token_id))
            def batches():
                return held_out.in_order(EVALUATION_BATCH_TOKENS)
            if self.objective.name in ("seq2seq", "completion"):
                known = dataclasses.replace(known, end=tokenizer.special("eos_token"), bytes=prepared.validation.bytes)
        entropy = unigram_entropy(batch.targets for batch in batches())
        known = dataclasses.replace(known, entropy=entropy)
        read = sum(batch.tokens for batch in batches())
        return lambda: evaluate(self.objective, self.model, batches(), dataclasses.replace(known)), read

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.place.path

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.loop.counters.step

    @property
    def stopped(self) -> bool:
        """Whether the run was told to stop before its budget was used and the result measured."""
        return self.loop.stop and self.loop.counters.looked < 1.0

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of training text that the loss of a token stands for; 0 where the loss is not one of plain tokens."""
        plain = self.objective.name == "causal"
        return self.prepared.corpus.bytes_per_token if plain else 0.0

    def description(self) -> str:
        """One line: the model, the data, where it runs."""
        config = self.model.config
        total, trained = (sum(p.numel() for p in self.model.parameters() if p.requires_grad or every) for every in (1, 0))
        part = f", {trained:,} of them ({100 * trained / total:.1f} %) trained" if trained < total else ""
        depth = f"{config.num_encoder_layers} + " if config.shape == "encoder-decoder" else ""
        return (f"{total:,} parameters{part} ({depth}{config.num_hidden_layers} × {config.hidden_size}), context "
                f"{self.prepared.context}, vocabulary {config.vocab_size:,}, {self.prepared.corpus.tokens:,} tokens; "
                f"{self.objective.name} objective; on {self.placement}; into {self.folder}")

    def learn_at(self, rate: float) -> None:
        """Makes this the learning rate. To be called before there are moments."""
        self.recipe = dataclasses.replace(self.recipe, train=dataclasses.replace(self.recipe.train, learning_rate=rate))
        self.loop.config = self.recipe.train
        self.loop.optimizer = optimizers.build(self.model, self.recipe.train, self.loop.team)

    def create(self) -> None:
        """Writes the model folder with the weights as they are, empty metrics, the state before the first step, and, last,
        the recipe: a folder that has one can be resumed."""
        self.place.begin()
        checkpoints.save(self.folder, self.model, self.prepared.tokenizer, self.recipe.generate,
                         self.base.get("model", ""))
        self.place.open_metrics(0)
        self._save()
        self.write_recipe()

    def go_on_from(self, saved: state.Saved, facts: dict, note: Callable[[str], None]) -> None:
        """Puts a state back, and with it what of the folder belongs to it: an evaluation after it is yet to be made."""
        self.loop.counters = saved.restore(self.model, self.loop.optimizer)
        before = saved.beside.recipe.get("train")
        if before and any(before[budget] != getattr(self.recipe.train, budget) for budget in BUDGETS):
            self.loop.budget_has_changed()
        result = facts.get("result") or {}
        self.remembered = result.pop("remembered", [])
        self.result = saved.beside.result or result  # none yet: then the model stays the one that a stop left
        self.headline = saved.beside.headline
        self._put_back_best(saved)
        if not self.place.open_metrics(self.step, saved.beside.metrics_bytes):
            note(f"{self.folder}/metrics.jsonl is not what it was when the state was saved: lines may be missing")
        before, now = facts.get("versions") or {}, self._where()
        if moved := [f"{before[key]} → {now[key]}" for key in now if before.get(key, now[key]) != now[key]]:
            note(f"goes on elsewhere, so not the same to the bit: {'; '.join(moved)}")
        memory_room.fit(self.loop, note, self.loop.team)
        self.write_recipe()

    def _put_back_best(self, saved: state.Saved) -> None:
        file, self.best_sha256 = self._weights_file(), saved.beside.best_sha256
        if file.is_file() and (not self.best_sha256 or sha256_of(file) == self.best_sha256):
            return
        if saved.best:
            copy_file(saved.best, file)
        else:
            self._save_weights()

    def _save_weights(self) -> None:
        checkpoints.save_weights(self.folder, self.loop.team.whole(self.model))

    def _weights_file(self) -> Path:
        return self.folder / (adapter_base.WEIGHTS if self.recipe.train.lora_rank else checkpoints.WEIGHTS)

    def _save(self) -> None:
        """Writes a resumable state. Raises UserError that tells how to go on when the disk refuses."""
        counters, recipe = self.loop.counters, changes.plain(self.recipe)
        own = counters.best_step == counters.step and not counters.averaged  # the best weights are the state's
        best = self._weights_file() if counters.best_step and not own else None
        beside = state.Beside(self.result, self.headline, self.place.flush_metrics(), recipe, self.best_sha256, best)
        try:
            state.save(self.place.states, counters, self.model, self.loop.optimizer, beside)
        except UserError as error:
            onward = f"free some room; what was saved before is intact, and lm train --resume {self.folder} goes on from it"
            raise UserError(error.what, error.where, onward if counters.step else error.hint) from error

    def events(self) -> Iterator[tuple[str, object]]:
        """("step" | "validation" | "sample" | "note", record) as they happen; what is to be saved has been saved by then.

        Raises UserError, and leaves nothing behind, when the time was over before the first step; and when the loss
        explodes or is no number, which leaves the best model and the states from before. At the end, however it comes, other
        processes may have the folder.
        """
        try:
            yield from self._events()
        finally:
            self.place.release()

    def _events(self) -> Iterator[tuple[str, object]]:
        for event in self._checked(self.loop.events()):
            if isinstance(event, loop.Note):
                yield "note", event
            elif isinstance(event, loop.Step):
                self.place.log({key: value for key, value in dataclasses.asdict(event).items() if key in LOGGED})
                yield "step", event
            elif not self.step and not self.loop.stop and not (isinstance(event, loop.Validation) and not event.final):
                self.place.abandon()
                raise UserError(f"the {self.recipe.train.time:g} s were over before the first step", where="--time",
                                hint=f"it could begin after {self.loop.elapsed():.0f} s: give more time")
            elif isinstance(event, loop.Validation):
                self._validated(event)
                yield "validation", event
            elif event.what == "sample":
                if not self.loop.team.shards and (sample := self._sample()):
                    yield "sample", sample
            else:
                self._save()
        yield from self._finish()

    def _checked(self, events: Iterator[object]) -> Iterator[object]:
        """The events; where the run diverges, what is kept is told and broken states are dropped."""
        try:
            yield from events
        except Diverged as error:
            best, kept = self.loop.counters.best_step, state.forget(self.place.states, error.since - 1)
            model = f"the best model, of step {best:,}" if best else "the weights it began with"
            onward = f"the state of step {kept:,}: lm train --resume {self.folder} {error.remedy}" if kept else \
                f"no state to go back to: start again with --overwrite {error.remedy}"
            raise UserError(error.what, where=error.where, hint=f"{self.folder} keeps {model}, and {onward}") from error

    def _validated(self, event: loop.Validation) -> None:
        figures, counters = event.figures, self.loop.counters
        self.place.log({"step": event.step, "tokens": counters.tokens, "elapsed": self.loop.elapsed(),
                        **figures.metrics()})
        if event.best:
            self._save_weights()
            self.best_sha256 = sha256_of(self._weights_file())
            self.result = {"best_step": event.step, **figures.facts()}
            self.headline = figures.headline()
            self.write_recipe()

    def _sample(self) -> str:
        if self.objective.name in ("seq2seq", "completion"):
            return self._continued()
        if self.objective.name != "causal":
            return ""
        tokenizer = self.prepared.tokenizer
        prompt = tokenizer.prefix or self.prepared.validation[0].ids[:1].tolist()
        decoder = Decoder(self.model.eval(), tokenizer, tokenizer.prefix, [],
                          dataclasses.replace(self.recipe.generate, max_new_tokens=SAMPLE_TOKENS, num_beams=1))
        text = decoder.generate([prompt], [self.step])[0].text
        self.model.train()
        return text

    def _continued(self) -> str:
        """A source of the validation part, another one each time, and the target that the model gives it."""
        held_out, tokenizer = self.prepared.validation, self.prepared.tokenizer
        ids = held_out.sources[self.step % len(held_out)]
        config = dataclasses.replace(self.recipe.generate, max_new_tokens=SAMPLE_TOKENS, num_beams=1, temperature=0.0)
        decoder = Decoder(self.model.eval(), tokenizer, tokenizer.prefix, [self.model.config.eos_token_id], config)
        around = data.template(self.prepared, self.model.config.decoder_start_token_id)
        source = [*around.before, *ids.tolist()] if around.joined else around.source(ids).tolist()
        text = decoder.generate([source], [self.step])[0].text
        self.model.train()
        return f"{tokenizer.decode(ids.tolist())} → {text}"

    def _finish(self) -> Iterator[tuple[str, object]]:
        counters = self.loop.counters
        self.result |= {"steps": counters.step, "tokens": counters.tokens, "seconds": round(counters.seconds, 1),
                        "epochs": round(counters.rows / self.loop.rows.rows_per_epoch, 3), "stopped": self.stopped}
        if self.source.shares:
            self.result["drawn"] = mixing.drawn(self.source.shares, self.loop.rows.ring, counters.rows)
        self.write_recipe()
        write_text(self.folder / "loss.svg", draw(self.place.metrics(), self.objective.target))
        write_text(self.folder / "README.md", model_card(
            self.folder.resolve().name, self.model.config, self.recipe.train,
            sum(p.numel() for p in self.model.parameters()), family_of(self.model.config).heads[self.model.config.head],
            self.source.files, self.result, self._beginning(), self.base.get("model", "")))
        if self.remembered and not self.stopped:
            best = checkpoints.load(self.folder, "cpu" if self.loop.team.shards else self.placement.device)  # it is whole
            for one in self.remembered:
                yield "note", loop.Note(self.step, remembering.begun(one["file"]))
                one["after"] = remembering.bits_per_byte(best.model, best.tokenizer, one["file"])
            self.write_recipe()

    def _beginning(self) -> str:
        tokenizer = self.prepared.tokenizer
        return "".join(tokenizer.pieces(tokenizer.prefix)) if self.objective.name == "causal" else ""

    def write_recipe(self) -> None:
        """Writes recipe.yaml with what is known by now."""
        self.place.write_recipe(
            self.recipe,
            versions=changes.versions_here() | self._where(),
            data=self.source.facts() | {"tokenizer": self.prepared.tokenizer.hash, "tokens": self.prepared.corpus.tokens,
                                        "bytes": self.prepared.corpus.bytes,
                                        "tokenizer_files": tokenizer_files(self.folder)},
            validation=data.ranges(self.prepared.measured),
            result=self.result | ({"remembered": self.remembered} if self.remembered else {}),
            **({"choice": self.chosen} if self.chosen else {}), **({"base": self.base} if self.base else {}))

    def _where(self) -> dict[str, str]:
        """What else than versions decides about the last bits: device, threads, precision, and, on a CPU, the kernels."""
        kind = {"kernels": "torch's kernels" if kernels.problem() else "compiled kernels"}
        return {"device": str(self.placement)} | (kind if self.placement.device.type == "cpu" else {})

    def summary(self) -> str:
        """One line: the figures of the model that was kept."""
        result = self.result
        again = f"; lm perplexity -m {self.folder} --validation measures the same" if self.objective.name == "causal" else ""
        best, steps = (f"{result[key]:,}" for key in ("best_step", "steps"))
        when = f"at step {best} of {steps}" if result["best_step"] else f"before the first of {steps} steps"
        return f"validation {self.headline or 'as before'}, {when} ({result['seconds']:.0f} s){again}"

    def shares(self, done: bool = False) -> list[str]:
        """A line for each of several sources drawn by weight: its part of the rows, and how many epochs of it the run is to
        read or, when it is `done`, has read."""
        if not self.source.shares:
            return []
        rows = self.loop.counters.rows if done else mixing.rows_planned(self.recipe.train, self.loop.rows.rows_per_epoch)
        return list(mixing.told(self.source.shares, self.loop.rows.ring, self.prepared.corpus, rows))

    def memories(self) -> list[str]:
        """A line for each text of which is measured whether it is forgotten."""
        return [remembering.told(**one) for one in self.remembered]

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Lets Ctrl-C and SIGTERM end the run after the step being made; a second one ends it at once."""
        def stop(number: int, frame: object) -> None:
            if self.loop.stop:
                raise KeyboardInterrupt
            self.loop.stop = True

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
