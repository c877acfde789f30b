"""How fast an encoder is fine-tuned to tell the labels of texts, beside a plain loop around transformers.

python tests/benchmarks/finetuning_beside_transformers.py ENCODER TRAIN.jsonl --val DEV.jsonl [--batch 32] [--rounds 6]
    [--contestants "lm float32,transformers float32"] [--rate 1e-4] [--threads N]

ENCODER is a model folder of BERT's family, rows have `text` and `label`. Each contestant is a process of its own that sleeps
until it is its turn; all read the training rows once, in as many turns as there are rounds, with AdamW (fused in both, betas
0.9 and 0.95, no decay), the same linear schedule, clipping at 1 and dropout 0.1. transformers draws --batch texts for a step
and pads them to the longest, as DataCollatorWithPadding does, in float32, in autocast, or with weights in bfloat16; its
dropout, as its BERT has it, is also on embeddings and attention weights. lm fills a step with as many tokens as give --batch
texts on average, texts of like length together. Printed are medians of the rounds, and of their ratios of texts a second,
which at equal texts a step are those of steps; then the accuracy on DEV after the last round, by which speed is not bought.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as lm sets it, for all alike

CONTESTANTS = ("lm float32", "transformers float32", "lm bfloat16", "transformers autocast", "transformers bfloat16")
BETAS, WARMUP, DROPOUT, CLIP = (0.9, 0.95), 0.1, 0.1, 1.0
UNTIMED = 2  # steps before the first turn


class Lm:
    """The steps of `lm train ROWS --from ENCODER`."""

    def __init__(self, mode: str, options: argparse.Namespace):
        from lmcli import recipes, runs
        from lmcli.text.documents import Layout
        from lmcli.training import loop

        self.room, self.Step = tempfile.TemporaryDirectory(), loop.Step
        never, rate = 10 ** 9, options.rate
        sets = [f"train.{setting}" for setting in (
            f"learning_rate={rate}", f"warmup={WARMUP}", f"dropout={DROPOUT}", f"gradient_clip={CLIP}", "optimizer=adamw",
            "weight_decay=0", "context=256", f"eval_every={never}", f"save_every={never}", f"sample_every={never}",
            f"batch_tokens={options.tokens}")]
        recipe = recipes.resolve("encoder-small", sets, {"epochs": 1.0, "precision": mode, "seed": 0})
        layout = Layout("file", "auto", (), "stop")
        self.run = runs.start(runs.Request(recipe, (str(options.train),), f"{self.room.name}/run", (str(options.val),), None,
                                           layout, str(options.encoder), None, False, "cpu", options.threads),
                              time.monotonic(), lambda text: None)
        self.events = self.run.loop.events()

    def turn(self, texts: int) -> tuple[float, int, int, int]:
        """(seconds, steps, texts, real tokens) of steps until so many texts were read in all, or the epoch is over."""
        counters, started = self.run.loop.counters, time.perf_counter()
        before = counters.step, counters.rows, counters.tokens
        while counters.rows < texts and isinstance(next(self.events), self.Step):
            pass
        seconds = time.perf_counter() - started
        return seconds, counters.step - before[0], counters.rows - before[1], counters.tokens - before[2]

    def accuracy(self) -> float:
        """Share of the validation rows whose label is found."""
        self.run.model.eval()
        return self.run.loop.evaluate().accuracy


class Transformers:
    """A loop as people write it around AutoModelForSequenceClassification."""

    def __init__(self, mode: str, options: argparse.Namespace):
        import torch
        import transformers

        if options.threads:
            torch.set_num_threads(options.threads)
        torch.manual_seed(0)
        self.torch, self.mode = torch, mode
        rows = read(options.train)
        names = sorted({row["label"] for row in rows})
        self.model = transformers.AutoModelForSequenceClassification.from_pretrained(
            options.encoder, num_labels=len(names), hidden_dropout_prob=DROPOUT, attention_probs_dropout_prob=DROPOUT,
            dtype=torch.bfloat16 if mode == "bfloat16" else torch.float32).train()
        tokenizer = transformers.AutoTokenizer.from_pretrained(options.encoder)

        def loader(rows: list[dict], shuffle: bool):
            found = [{**tokenizer(row["text"], truncation=True, max_length=256), "labels": names.index(row["label"])}
                     for row in rows]
            return torch.utils.data.DataLoader(found, options.batch, shuffle,
                                               collate_fn=transformers.DataCollatorWithPadding(tokenizer))
        self.batches, self.held_out = loader(rows, True), loader(read(options.val), False)
        steps = len(self.batches)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), options.rate, BETAS, weight_decay=0.0, fused=True)
        self.schedule = transformers.get_linear_schedule_with_warmup(self.optimizer, int(WARMUP * steps), steps)
        self.left, self.read = iter(self.batches), 0

    def turn(self, texts: int) -> tuple[float, int, int, int]:
        """(seconds, steps, texts, real tokens) of steps until so many texts were read in all, or the epoch is over."""
        started, before, steps, tokens = time.perf_counter(), self.read, 0, 0
        while self.read < texts and (batch := next(self.left, None)):
            with self.torch.autocast("cpu", self.torch.bfloat16, enabled=self.mode == "autocast"):
                loss = self.model(**batch).loss
            loss.backward()
            self.torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            self.read, steps = self.read + len(batch["labels"]), steps + 1
            tokens += int(batch["attention_mask"].sum())
        return time.perf_counter() - started, steps, self.read - before, tokens

    def accuracy(self) -> float:
        """Share of the validation rows whose label is found."""
        self.model.eval()
        with self.torch.inference_mode():
            right = [self.model(**batch).logits.argmax(-1) == batch["labels"] for batch in self.held_out]
        return float(self.torch.cat(right).float().mean())


def read(file: Path) -> list[dict]:
    """The rows of a file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def batch_tokens(options: argparse.Namespace) -> int:
    """The padded tokens of a step by which `lm train` has --batch texts in a step, on average of an epoch."""
    import numpy as np

    from lmcli.text import tokenizer as tokenizers
    from lmcli.text.batches import Batch, ExampleRows

    tokenizer = tokenizers.load(options.encoder)
    texts = [row["text"] for row in read(options.train)]
    around = len(tokenizer.prefix) + len(tokenizer.suffix)
    lengths = np.array([len(ids) + around for ids in tokenizer.encode_batch(texts)])

    def texts_a_step(tokens: int) -> float:
        rows, at, steps = ExampleRows(lengths, lambda chosen: Batch(chosen[:, None], chosen), 0), 0, 0
        while at < len(lengths):
            at, steps = at + rows.step(at, tokens, tokens)[0].rows, steps + 1
        return len(lengths) / steps
    return min(range(4 * options.batch, 64 * options.batch, options.batch // 4 or 1),
               key=lambda tokens: abs(texts_a_step(tokens) - options.batch))


def serve(pipe, name: str, options: argparse.Namespace) -> None:
    """A contestant's process: answers (method, arguments) until it is ended."""
    kind, mode = name.split()
    contestant = {"lm": Lm, "transformers": Transformers}[kind](mode, options)
    while True:
        method, *given = pipe.recv()
        pipe.send(getattr(contestant, method)(*given))


def asked(pipe, *question: object) -> object:
    """A contestant's answer."""
    pipe.send(question)
    return pipe.recv()


def show(turns: dict[str, list[tuple]], accuracies: dict[str, float]) -> None:
    """The table; ratios are those of lm in the same precision, autocast taken as bfloat16."""
    print(f"{'':24}{'steps/s':>9}{'texts/s':>9}{'tokens/s':>10}{'texts/step':>12}{'lm is × as fast':>24}{'accuracy':>10}")
    for name, found in turns.items():
        seconds, steps, texts, tokens = zip(*found)
        step, text, token = (statistics.median(n / s for n, s in zip(part, seconds)) for part in (steps, texts, tokens))
        ours = turns.get("lm float32" if name.endswith("float32") else "lm bfloat16", ())
        ratios = [mine[2] / mine[0] / (n / s) for mine, n, s in zip(ours, texts, seconds)]
        span = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} – {max(ratios):.2f})" if ratios else ""
        print(f"{name:24}{step:>9.2f}{text:>9.1f}{token:>10,.0f}{sum(texts) / sum(steps):>12.1f}{span:>24}"
              f"{accuracies[name]:>10.1%}", flush=True)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    rows, before = len(read(options.train)), UNTIMED * options.batch
    if rows - before < 2 * options.batch * options.rounds:
        parser.error(f"{rows} rows are too few for {options.rounds} turns of two steps or more")
    context, pipes = multiprocessing.get_context("spawn"), {}
    for name in options.contestants.split(","):
        pipes[name], other = context.Pipe()
        context.Process(target=serve, args=(other, name, options), daemon=True).start()
        asked(pipes[name], "turn", before)
    turns: dict[str, list[tuple]] = {name: [] for name in pipes}
    for part in range(1, options.rounds + 1):
        for name, pipe in pipes.items():
            turns[name].append(asked(pipe, "turn", before + (rows - before) * part // options.rounds))
    show(turns, {name: asked(pipe, "accuracy") for name, pipe in pipes.items()})


if __name__ == "__main__":
    main()
