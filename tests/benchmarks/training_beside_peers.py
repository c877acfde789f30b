"""Training steps of lm beside those of other projects, in turns, so that what else the machine does slows all alike.

python tests/benchmarks/training_beside_peers.py --nanogpt CHECKOUT --litgpt CHECKOUT [--shapes R,S] [--rounds 7] [--json]
python tests/benchmarks/training_beside_peers.py --nanogpt CHECKOUT --device cuda --shapes base

Each contestant is a process of its own that sleeps until it is its turn. All train on random ids with AdamW and clipping,
models of the same width, depth and products (R: 6 × 384, context 256, vocabulary 4,096, batch 16 × 256; S: 4 × 128,
context 64, vocabulary 65, batch 12 × 64); one more row is lm with Muon. nanoGPT trains as its train.py does on a CPU
(float32, its own optimizer), and in autocast; litgpt's model as its pretraining does by default (bf16-mixed; embeddings
tied, one of its options) and with its weights in bfloat16, both with torch's fused AdamW. The share is that of the rate of
lm's own matrix products, measured in the same turns. --peer-python needs torch, and PyYAML for litgpt. Shape base is that of
the preset (12 × 768, context 1,024, vocabulary 32,768), 256 rows a step, for a GPU, where all are compiled; the peers take
32 rows at a time.
"""

import argparse
import contextlib
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import time
import types
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as lm sets it, for all alike

# layers, width, heads, vocabulary, context, rows, width inside a gated MLP
SHAPES = {"R": (6, 384, 6, 4096, 256, 16, 1024), "S": (4, 128, 4, 65, 64, 12, 344),
          "base": (12, 768, 12, 32768, 1024, 256, 2048)}
ROWS_AT_ONCE = 32  # of a peer's forward pass
STEPS = {"R": 1, "S": 20, "base": 2}  # of a turn: about as long for R and S
WARM_UP = {"R": 2, "S": 20, "base": 3}
# contestant → (whose code runs, its mode); the first is what ratios are told of
OURS = {"lm": ("lm", "auto adamw"), "lm float32": ("lm", "float32 adamw"), "lm muon": ("lm", "auto muon")}
PEERS = {"nanoGPT float32": ("nanogpt", "float32"), "nanoGPT autocast": ("nanogpt", "autocast"),
         "litgpt bf16-mixed": ("litgpt", "autocast"), "litgpt bf16-true": ("litgpt", "bfloat16")}
LIMITS = {"limit bfloat16": ("limit", "bfloat16"), "limit float32": ("limit", "float32")}


# --- what runs inside a worker ---------------------------------------------------------------------------------------

class Lm:
    """lm's own training step, by the code behind `lm bench`."""

    def __init__(self, shape: str, mode: str, threads: int, device: str):
        from lmcli.analysis import benchmark
        from lmcli.model import cost
        from lmcli.model.device import dtype_name, place

        precision, optimizer = mode.split()
        placement = place(device, precision, threads, training=True)
        self.workload = benchmark.TrainingWorkload(recipe(shape, optimizer), placement)
        self.facts = {"parameters": cost.parameters(self.workload.config).total,
                      "flops_per_token": self.workload.flops / self.workload.tokens,
                      "dtype": dtype_name(self.workload.placement.dtype)}

    def turn(self, steps: int) -> float:
        """Seconds of so many steps."""
        return clocked(lambda: [self.workload.step() for _ in range(steps)])


def recipe(shape: str, optimizer: str = "adamw"):
    """lm's recipe of a shape."""
    from lmcli import recipes
    from lmcli.analysis import benchmark

    if shape in benchmark.REFERENCES:
        return benchmark.reference(shape, [f"train.optimizer={optimizer}"])
    tokens = SHAPES[shape][4] * SHAPES[shape][5]
    return recipes.resolve(shape, [f"train.optimizer={optimizer}", f"train.batch_tokens={tokens}"])


def clocked(work) -> float:
    """Seconds of some work, a GPU's included."""
    import torch

    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


class Limit:
    """The matrix products of lm's training step, by the code behind `lm bench`."""

    def __init__(self, shape: str, mode: str, threads: int, device: str):
        from lmcli.analysis import benchmark
        from lmcli.model.device import place

        placement = place(device, mode, threads, training=True)
        workload = benchmark.TrainingWorkload(recipe(shape), placement)
        self.clock, self.facts = benchmark.ProductClock(workload.products, placement), {}

    def turn(self, steps: int) -> float:
        """FLOP/s of the products, the median of all turns so far."""
        self.clock.turn()
        return self.clock.rate()


class Peer:
    """Another project's model in the loop that its training script has: forward, backward, clip, update, clear."""

    def __init__(self, shape: str, mode: str, threads: int, device: str):
        import torch

        if threads:
            torch.set_num_threads(threads)
        layers, width, _, vocabulary, context, rows, _ = SHAPES[shape]
        torch.manual_seed(0)
        with contextlib.redirect_stdout(io.StringIO()):  # what they say of themselves
            self.build(shape, mode, device)
        self.autocast, self.torch, self.device = mode == "autocast", torch, device
        self.batches = torch.randint(vocabulary, (2, rows, context), device=device).split(ROWS_AT_ONCE, dim=1)
        matrices = sum(m.weight.numel() for m in self.model.modules() if isinstance(m, torch.nn.Linear))
        self.facts = {"parameters": sum(p.numel() for p in self.model.parameters()),
                      "flops_per_token": 6 * matrices + 12 * layers * width * context,
                      "dtype": "float32" if mode == "float32" else "bfloat16"}
        assert "lmcli" not in sys.modules

    def turn(self, steps: int) -> float:
        """Seconds of so many steps."""
        return clocked(lambda: [self.step() for _ in range(steps)])

    def step(self) -> None:
        """One step of the optimizer."""
        for ids, targets in self.batches:
            with self.torch.autocast(self.device, self.torch.bfloat16, enabled=self.autocast):
                loss = self.loss(ids, targets) / len(self.batches)
            loss.backward()
        self.torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class NanoGPT(Peer):
    """nanoGPT's GPT and its optimizer."""

    def build(self, shape: str, mode: str, device: str) -> None:
        import torch
        from model import GPT, GPTConfig

        layers, width, heads, vocabulary, context, _, _ = SHAPES[shape]
        self.model = GPT(GPTConfig(block_size=context, vocab_size=vocabulary, n_layer=layers, n_head=heads, n_embd=width,
                                   dropout=0.0, bias=False)).to(device)
        self.optimizer = self.model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), device)
        self.forward = torch.compile(self.model) if device == "cuda" else self.model

    def loss(self, ids, targets):
        return self.forward(ids, targets)[1]


class LitGPT(Peer):
    """litgpt's GPT with a Llama block (RMSNorm, rotary positions, gated MLP), embeddings tied as by `tie_embeddings`."""

    def build(self, shape: str, mode: str, device: str) -> None:
        import torch

        import_only_litgpts_model()
        from litgpt.config import Config
        from litgpt.model import GPT

        layers, width, heads, vocabulary, context, _, inner = SHAPES[shape]
        self.model = GPT(Config(
            n_layer=layers, n_embd=width, n_head=heads, block_size=context, padded_vocab_size=vocabulary,
            vocab_size=vocabulary, norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", intermediate_size=inner, bias=False,
            rotary_percentage=1.0, parallel_residual=False))
        self.model.apply(self.model._init_weights)
        self.model.transformer.wte.weight = self.model.lm_head.weight
        self.model.to(device, torch.bfloat16 if mode == "bfloat16" else torch.float32)
        self.forward = torch.compile(self.model) if device == "cuda" else self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def loss(self, ids, targets):
        logits = self.forward(ids)
        return self.torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))


def import_only_litgpts_model() -> None:
    """Lets litgpt.config and litgpt.model be imported without the rest of litgpt, which needs a dozen more packages."""
    folder = next(Path(place) / "litgpt" for place in sys.path if (Path(place) / "litgpt" / "model.py").is_file())
    package, scripts, converter = map(types.ModuleType, (
        "litgpt", "litgpt.scripts", "litgpt.scripts.convert_hf_checkpoint"))
    package.__path__, scripts.__path__ = [str(folder)], []
    converter.qkv_reassemble = None  # for old checkpoints only
    sys.modules.update({module.__name__: module for module in (package, scripts, converter)})


def work(kind: str, shape: str, mode: str, threads: int, device: str) -> None:
    """Writes what was built as a line of JSON, then for each number of steps read the answer of a turn, and the memory."""
    contestant = {"lm": Lm, "limit": Limit, "nanogpt": NanoGPT, "litgpt": LitGPT}[kind](shape, mode, threads, device)
    contestant.turn(WARM_UP[shape])
    print(json.dumps(contestant.facts), flush=True)
    for line in sys.stdin:
        contestant.turn(1)  # not timed: what the system and the other processes took of caches and memory comes back
        answer = contestant.turn(int(line))
        print(json.dumps([answer, peak_memory(device)]), flush=True)


def peak_memory(device: str) -> int:
    """Bytes, of a GPU's memory there."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# --- what runs in the driver -----------------------------------------------------------------------------------------

class Worker:
    """A contestant's process, asleep but in its turns."""

    def __init__(self, python: str, kind: str, mode: str, shape: str, options: argparse.Namespace,
                 checkout: str | None):
        environment = dict(os.environ)
        if checkout:
            environment["PYTHONPATH"] = checkout
        self.process = subprocess.Popen(
            [python, __file__, "--worker", kind, "--mode", mode, "--shapes", shape, "--threads",
             str(options.threads), "--device", options.device],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        self.facts = self._answer()

    def turn(self, steps: int) -> tuple[float, int]:
        """(seconds of the steps, or FLOP/s of a limit; peak memory so far in bytes)."""
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait()

    def _answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(self.process.args)} ended with {self.process.wait()}; see above")
        return json.loads(line)


def compare(shape: str, options: argparse.Namespace) -> list[dict]:
    """A row a contestant, after `rounds` turns of each."""
    checkouts = {"nanogpt": options.nanogpt, "litgpt": options.litgpt}
    chosen = {**OURS, **{name: peer for name, peer in PEERS.items() if checkouts[peer[0]]}, **LIMITS}
    workers = {}
    for name, (kind, mode) in chosen.items():
        python = options.peer_python if kind in checkouts else sys.executable
        workers[name] = Worker(python, kind, mode, shape, options, checkouts.get(kind))
    seconds = {name: [] for name in chosen}
    peaks = {}
    for _ in range(options.rounds):
        for name, worker in workers.items():
            answer, peaks[name] = worker.turn(STEPS[shape])
            seconds[name].append(answer)
    for worker in workers.values():
        worker.close()
    return [row(shape, name, workers[name].facts, seconds, peaks[name]) for name in chosen if name not in LIMITS]


def row(shape: str, name: str, facts: dict, seconds: dict[str, list[float]], peak: int) -> dict:
    """What is told of one contestant; `ratio` is the speed of lm over its own, median, least and most of the rounds."""
    tokens = STEPS[shape] * SHAPES[shape][4] * SHAPES[shape][5]
    ratios = [theirs / ours for ours, theirs in zip(seconds["lm"], seconds[name])]
    speed = tokens / statistics.median(seconds[name])
    limit = seconds[f"limit {facts['dtype']}"][-1]
    return {"shape": shape, "name": name, "tokens_per_second": speed, "ratio": statistics.median(ratios),
            "ratio_min": min(ratios), "ratio_max": max(ratios), "achieved": speed * facts["flops_per_token"], "limit": limit,
            "share": speed * facts["flops_per_token"] / limit, "peak_memory_bytes": peak, **facts}


def show(rows: list[dict]) -> None:
    """A table of one shape."""
    print(f"{'shape ' + rows[0]['shape']:20}{'tokens/s':>10}{'lm is × as fast':>24}{'GFLOP/s':>10}{'of products':>13}"
          f"{'peak MB':>9}{'parameters':>13}{'MFLOP/token':>13}")
    for told in rows:
        span = f"{told['ratio']:.2f} ({told['ratio_min']:.2f} – {told['ratio_max']:.2f})"
        print(f"{told['name']:20}{told['tokens_per_second']:>10,.0f}{span:>24}{told['achieved'] / 1e9:>10.1f}"
              f"{told['share']:>13.0%}{told['peak_memory_bytes'] / 1e6:>9,.0f}{told['parameters']:>13,}"
              f"{told['flops_per_token'] / 1e6:>13.2f}")
    limits = {told["dtype"]: told["limit"] for told in rows}
    print("the products alone: " + ", ".join(f"{dtype} {limit / 1e9:.0f} GFLOP/s" for dtype, limit in limits.items()))
    print(f"parameters agree within {spread(rows, 'parameters'):.2%}, FLOPs a token within "
          f"{spread(rows, 'flops_per_token'):.2%}\n", flush=True)


def spread(rows: list[dict], key: str) -> float:
    """How far the largest is above the smallest."""
    values = [told[key] for told in rows]
    return max(values) / min(values) - 1


def main() -> int:
    """Runs a worker, or the comparison; 1 when the models are not of one size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", metavar="CHECKOUT", help="folder with nanoGPT's model.py")
    parser.add_argument("--litgpt", metavar="CHECKOUT", help="folder with litgpt/model.py")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that runs the peers")
    parser.add_argument("--shapes", default="R,S")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0, help="of each contestant; 0: all cores")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--mode", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.shapes, options.mode, options.threads, options.device)
        return 0
    for checkout, file in ((options.nanogpt, "model.py"), (options.litgpt, "litgpt/model.py")):
        if checkout and not (Path(checkout) / file).is_file():
            parser.error(f"{checkout} holds no {file}: give the folder of a checkout")
    if unknown := set(options.shapes.split(",")) - set(SHAPES):
        parser.error(f"no shape {', '.join(sorted(unknown))}: there are {', '.join(SHAPES)}")
    same = True
    for shape in options.shapes.split(","):
        rows = compare(shape, options)
        same = same and spread(rows, "parameters") <= 0.01 and spread(rows, "flops_per_token") <= 0.01
        if options.json:
            for told in rows:
                print(json.dumps(told), flush=True)
        else:
            show(rows)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
