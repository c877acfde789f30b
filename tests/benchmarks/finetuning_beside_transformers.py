"""Compares the speed of fine-tuning a text classifier with a plain loop around transformers.

python tests/benchmarks/finetuning_beside_transformers.py ENCODER TRAIN.jsonl --val DEV.jsonl
    [--batch 32] [--rounds 6] [--contestants "lm float32,transformers float32"] [--rate 1e-4]
    [--threads N]

ENCODER is a model folder of BERT's family; rows have `text` and `label`. Each contestant is a
process that sleeps until its turn. All read the training rows once, in as many turns as there are
rounds, with AdamW (fused, betas 0.9 and 0.95, no decay), the same linear schedule, clipping at 1
and dropout 0.1.

transformers draws --batch texts per step and pads them to the longest (DataCollatorWithPadding), in
float32, in autocast, or with weights in bfloat16; its dropout, as in its BERT, is also on
embeddings and attention weights. lm fills a step with the number of tokens that gives --batch texts
on average, texts of similar lengths together.

Prints medians of the rounds and of their ratios of texts per second (at equal texts per step, also
the ratios of steps), then the accuracy on DEV after the last round, which shows that speed does not
cost quality.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as lm sets it, for all contestants

CONTESTANTS = (
    "lm float32",
    "transformers float32",
    "lm bfloat16",
    "transformers autocast",
    "transformers bfloat16",
)
BETAS, WARMUP, DROPOUT, CLIP = (0.9, 0.95), 0.1, 0.1, 1.0
MAX_TOKENS = 256  # per text
WARM_UP_STEPS = 2  # before the first turn
NEVER = 10**9


class Turn(NamedTuple):
    """One turn of a contestant; `tokens` are without padding."""

    seconds: float
    steps: int
    texts: int
    tokens: int


class Lm:
    """The steps of `lm train ROWS --from ENCODER`."""

    def __init__(self, mode: str, options: argparse.Namespace):
        from lmcli import recipes
        from lmcli.data.documents import DocumentFormat
        from lmcli.runs import start
        from lmcli.training.train_step import Step

        self.folder, self.Step = tempfile.TemporaryDirectory(), Step
        settings = [
            f"train.learning_rate={options.rate}",
            f"train.warmup={WARMUP}",
            f"train.dropout={DROPOUT}",
            f"train.gradient_clip={CLIP}",
            "train.optimizer=adamw",
            "train.weight_decay=0",
            f"train.context={MAX_TOKENS}",
            f"train.eval_every={NEVER}",
            f"train.save_every={NEVER}",
            f"train.sample_every={NEVER}",
            f"train.batch_tokens={options.tokens}",
        ]
        budget = {"epochs": 1.0, "precision": mode, "seed": 0}
        request = start.Request(
            recipe=recipes.resolve("encoder-small", settings, budget),
            data=(str(options.train),),
            output=f"{self.folder.name}/run",
            val=(str(options.val),),
            include=None,
            doc_format=DocumentFormat(),
            origin=str(options.encoder),
            tokenizer=None,
            overwrite=False,
            device="cpu",
            threads=options.threads,
        )
        self.run = start.start(request, time.monotonic(), lambda text: None)
        self.events = self.run.trainer.events()

    def turn(self, texts: int) -> Turn:
        """Trains until `texts` texts have been read in all, or the epoch is over."""
        counters, started = self.run.trainer.counters, time.perf_counter()
        before = counters.step, counters.rows, counters.tokens
        while counters.rows < texts and isinstance(next(self.events), self.Step):
            pass
        seconds = time.perf_counter() - started
        after = counters.step, counters.rows, counters.tokens
        return Turn(seconds, *(new - old for new, old in zip(after, before)))

    def accuracy(self) -> float:
        """Accuracy on the validation rows."""
        self.run.model.eval()
        return self.run.trainer.evaluation.measure().metrics()["val_accuracy"]


class Transformers:
    """The usual loop around AutoModelForSequenceClassification."""

    def __init__(self, mode: str, options: argparse.Namespace):
        import torch
        import transformers

        if options.threads:
            torch.set_num_threads(options.threads)
        torch.manual_seed(0)
        self.torch, self.mode = torch, mode
        # model
        rows = read_rows(options.train)
        names = sorted({row["label"] for row in rows})
        self.model = transformers.AutoModelForSequenceClassification.from_pretrained(
            options.encoder,
            num_labels=len(names),
            hidden_dropout_prob=DROPOUT,
            attention_probs_dropout_prob=DROPOUT,
            dtype=torch.bfloat16 if mode == "bfloat16" else torch.float32,
        ).train()

        # data
        tokenizer = transformers.AutoTokenizer.from_pretrained(options.encoder)
        collator = transformers.DataCollatorWithPadding(tokenizer)

        def loader(rows: list[dict], shuffle: bool) -> Any:
            features: Any = [
                {
                    **tokenizer(row["text"], truncation=True, max_length=MAX_TOKENS),
                    "labels": names.index(row["label"]),
                }
                for row in rows
            ]
            return torch.utils.data.DataLoader(
                features, options.batch, shuffle, collate_fn=collator
            )

        self.batches = loader(rows, True)
        self.validation = loader(read_rows(options.val), False)
        # optimizer
        steps = len(self.batches)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), options.rate, BETAS, weight_decay=0.0, fused=True
        )
        self.schedule = transformers.get_linear_schedule_with_warmup(
            self.optimizer, int(WARMUP * steps), steps
        )
        self.remaining, self.texts_read = iter(self.batches), 0

    def turn(self, texts: int) -> Turn:
        """Trains until `texts` texts have been read in all, or the epoch is over."""
        started, before, steps, tokens = time.perf_counter(), self.texts_read, 0, 0
        while self.texts_read < texts and (batch := next(self.remaining, None)):
            with self.torch.autocast("cpu", self.torch.bfloat16, enabled=self.mode == "autocast"):
                loss = self.model(**batch).loss
            loss.backward()
            self.torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            self.texts_read, steps = self.texts_read + len(batch["labels"]), steps + 1
            tokens += int(batch["attention_mask"].sum())
        return Turn(time.perf_counter() - started, steps, self.texts_read - before, tokens)

    def accuracy(self) -> float:
        """Accuracy on the validation rows."""
        self.model.eval()
        with self.torch.inference_mode():
            correct = [
                self.model(**batch).logits.argmax(-1) == batch["labels"]
                for batch in self.validation
            ]
        return float(self.torch.cat(correct).float().mean())


def read_rows(file: Path) -> list[dict]:
    """The rows of a JSON Lines file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def batch_tokens(options: argparse.Namespace) -> int:
    """The padded tokens per step with which `lm train` has --batch texts per step on average."""
    import numpy as np

    from lmcli.data.batches import Batch, ExampleRows
    from lmcli.text import tokenizer as tokenizers

    tokenizer = tokenizers.load(options.encoder)
    texts = [row["text"] for row in read_rows(options.train)]
    special = len(tokenizer.prefix) + len(tokenizer.suffix)
    lengths = np.array([len(ids) + special for ids in tokenizer.encode_batch(texts)])

    def texts_per_step(tokens: int) -> float:
        rows = ExampleRows(lengths, lambda chosen: Batch(chosen[:, None], chosen), 0)
        position = steps = 0
        while position < len(lengths):
            position += rows.step(position, tokens, tokens)[0].rows
            steps += 1
        return len(lengths) / steps

    return min(
        range(4 * options.batch, 64 * options.batch, options.batch // 4 or 1),
        key=lambda tokens: abs(texts_per_step(tokens) - options.batch),
    )


def serve(pipe: Connection, name: str, options: argparse.Namespace) -> None:
    """A contestant's process: calls (method, *arguments) from the pipe until it is terminated."""
    kind, mode = name.split()
    contestants: dict[str, Any] = {"lm": Lm, "transformers": Transformers}
    contestant = contestants[kind](mode, options)
    while True:
        method, *arguments = pipe.recv()
        pipe.send(getattr(contestant, method)(*arguments))


def call(pipe: Connection, method: str, *arguments: object) -> Any:
    """The result of a contestant's method."""
    pipe.send((method, *arguments))
    return pipe.recv()


def show(turns: dict[str, list[Turn]], accuracies: dict[str, float]) -> None:
    """Prints the table; ratios are to lm in the same precision, autocast counted as bfloat16."""
    print(
        f"{'':24}{'steps/s':>9}{'texts/s':>9}{'tokens/s':>10}{'texts/step':>12}"
        f"{'lm is × as fast':>24}{'accuracy':>10}"
    )
    for name, rounds in turns.items():
        steps = statistics.median(turn.steps / turn.seconds for turn in rounds)
        texts = statistics.median(turn.texts / turn.seconds for turn in rounds)
        tokens = statistics.median(turn.tokens / turn.seconds for turn in rounds)
        texts_per_step = sum(turn.texts for turn in rounds) / sum(turn.steps for turn in rounds)
        lm_rounds = turns.get("lm float32" if name.endswith("float32") else "lm bfloat16", [])
        ratios = [
            (lm.texts / lm.seconds) / (turn.texts / turn.seconds)
            for lm, turn in zip(lm_rounds, rounds)
        ]
        span = ""
        if ratios:
            span = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} – {max(ratios):.2f})"
        print(
            f"{name:24}{steps:>9.2f}{texts:>9.1f}{tokens:>10,.0f}{texts_per_step:>12.1f}"
            f"{span:>24}{accuracies[name]:>10.1%}",
            flush=True,
        )


def main() -> None:
    """Runs the rounds and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("encoder", type=Path)
    parser.add_argument("train", type=Path)
    parser.add_argument("--val", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--contestants", default=",".join(CONTESTANTS))
    options = parser.parse_args()
    options.tokens = batch_tokens(options)
    rows, warm_up = len(read_rows(options.train)), WARM_UP_STEPS * options.batch
    if rows - warm_up < 2 * options.batch * options.rounds:
        parser.error(f"{rows} rows are too few for {options.rounds} rounds of two steps or more")
    # start and warm up
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    for name in options.contestants.split(","):
        pipes[name], other = context.Pipe()
        context.Process(target=serve, args=(other, name, options), daemon=True).start()
        call(pipes[name], "turn", warm_up)
    # take turns
    turns: dict[str, list[Turn]] = {name: [] for name in pipes}
    for i in range(1, options.rounds + 1):
        for name, pipe in pipes.items():
            until = warm_up + (rows - warm_up) * i // options.rounds
            turns[name].append(call(pipe, "turn", until))
    show(turns, {name: call(pipe, "accuracy") for name, pipe in pipes.items()})


if __name__ == "__main__":
    main()
