"""Compares the speed of lm's training steps with nanoGPT and litgpt.

python tests/benchmarks/training_beside_peers.py --nanogpt CHECKOUT --litgpt CHECKOUT
    [--shapes R,S] [--rounds 7] [--peer-python PYTHON] [--threads N] [--json]
python tests/benchmarks/training_beside_peers.py --nanogpt CHECKOUT --device cuda --shapes base

Each contestant is a process that sleeps until its turn, so other load slows all alike. All train on
random ids with AdamW and clipping; the models have the same width, depth and matrix products:

- R: 6 × 384, context 256, vocabulary 4,096, batch 16 × 256;
- S: 4 × 128, context 64, vocabulary 65, batch 12 × 64;
- base, for a GPU: as the preset (12 × 768, context 1,024, vocabulary 32,768), 256 rows per step;
  all are compiled, and the peers take 32 rows at a time.

nanoGPT trains as its train.py does on a CPU (float32, its own optimizer), and in autocast. litgpt's
model trains as in its pretraining by default (bf16-mixed; tied embeddings, one of its options), and
with weights in bfloat16; both with torch's fused AdamW. One more row is lm with Muon.

"of products" is the speed relative to lm's matrix products alone, measured in the same rounds.
--peer-python needs torch, and PyYAML for litgpt. Exits with 1 unless parameters and FLOPs per token
of all contestants agree within 1 %.
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
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as lm sets it, for all contestants

# layers, width, heads, vocabulary, context, rows, inner width of a gated MLP
SHAPES = {
    "R": (6, 384, 6, 4096, 256, 16, 1024),
    "S": (4, 128, 4, 65, 64, 12, 344),
    "base": (12, 768, 12, 32768, 1024, 256, 2048),
}
PEER_ROWS = 32  # of a peer's forward pass
STEPS = {"R": 1, "S": 20, "base": 2}  # per turn, which is about as long for R as for S
WARM_UP = {"R": 2, "S": 20, "base": 3}
# contestant → (project, mode); ratios are to the first
OURS = {
    "lm": ("lm", "auto adamw"),
    "lm float32": ("lm", "float32 adamw"),
    "lm muon": ("lm", "auto muon"),
}
PEERS = {
    "nanoGPT float32": ("nanogpt", "float32"),
    "nanoGPT autocast": ("nanogpt", "autocast"),
    "litgpt bf16-mixed": ("litgpt", "autocast"),
    "litgpt bf16-true": ("litgpt", "bfloat16"),
}
LIMITS = {"limit bfloat16": ("limit", "bfloat16"), "limit float32": ("limit", "float32")}


# -- in a contestant's process


class Lm:
    """lm's training step, by the code behind `lm bench`."""

    def __init__(self, shape: str, mode: str, threads: int, device: str):
        from lmcli.model import flops
        from lmcli.model.device import dtype_name, select_device
        from lmcli.planning import benchmark

        precision, optimizer = mode.split()
        device_config = select_device(device, precision, threads, training=True)
        self.workload = benchmark.TrainingWorkload(recipe(shape, optimizer), device_config)
        self.facts = {
            "parameters": flops.parameters(self.workload.config).total,
            "flops_per_token": self.workload.flops / self.workload.tokens,
            "dtype": dtype_name(device_config.dtype),
        }

    def turn(self, steps: int) -> float:
        """Seconds of this number of steps."""
        return timed(self.workload.step, steps)


def recipe(shape: str, optimizer: str = "adamw") -> Any:
    """lm's recipe for a shape."""
    from lmcli import recipes
    from lmcli.planning import benchmark

    if shape in benchmark.REFERENCES:
        return benchmark.reference(shape, [f"train.optimizer={optimizer}"])
    tokens = SHAPES[shape][4] * SHAPES[shape][5]
    return recipes.resolve(shape, [f"train.optimizer={optimizer}", f"train.batch_tokens={tokens}"])


def timed(step: Callable[[], object], steps: int) -> float:
    """Seconds of this number of steps, until the GPU, if any, has done them."""
    import torch

    started = time.perf_counter()
    for _ in range(steps):
        step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


class Limit:
    """The matrix products of lm's training step, by the code behind `lm bench`."""

    def __init__(self, shape: str, mode: str, threads: int, device: str):
        from lmcli.model.device import select_device
        from lmcli.planning import benchmark

        device_config = select_device(device, mode, threads, training=True)
        workload = benchmark.TrainingWorkload(recipe(shape), device_config)
        self.clock = benchmark.ProductClock(workload.products, device_config)
        self.facts: dict[str, Any] = {}

    def turn(self, steps: int) -> float:
        """FLOP/s of the products, the median of all turns so far."""
        self.clock.measure()
        return self.clock.rate()


class Peer(ABC):
    """Another project's model in the loop of its training script.

    The loop: forward, backward, clip, update, clear the gradients.
    """

    model: Any
    optimizer: Any
    forward: Callable[..., Any]

    def __init__(self, shape: str, mode: str, threads: int, device: str):
        import torch

        if threads:
            torch.set_num_threads(threads)
        layers, width, _, vocabulary, context, rows, _ = SHAPES[shape]
        torch.manual_seed(0)
        with contextlib.redirect_stdout(io.StringIO()):  # their messages
            self.build(shape, mode, device)
        self.autocast, self.torch, self.device = mode == "autocast", torch, device
        ids = torch.randint(vocabulary, (2, rows, context), device=device)
        self.batches = ids.split(PEER_ROWS, dim=1)
        linear = [m for m in self.model.modules() if isinstance(m, torch.nn.Linear)]
        matrices = sum(module.weight.numel() for module in linear)
        self.facts = {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "flops_per_token": 6 * matrices + 12 * layers * width * context,
            "dtype": "float32" if mode == "float32" else "bfloat16",
        }
        assert "lmcli" not in sys.modules

    @abstractmethod
    def build(self, shape: str, mode: str, device: str) -> None:
        """Sets `model`, `forward` and `optimizer`."""

    @abstractmethod
    def loss(self, ids: Any, targets: Any) -> Any:
        """The mean loss of a batch."""

    def turn(self, steps: int) -> float:
        """Seconds of this number of steps."""
        return timed(self.step, steps)

    def step(self) -> None:
        """One optimizer step."""
        for ids, targets in self.batches:
            with self.torch.autocast(self.device, self.torch.bfloat16, enabled=self.autocast):
                loss = self.loss(ids, targets) / len(self.batches)
            loss.backward()
        self.torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class NanoGPT(Peer):
    """nanoGPT's GPT with its optimizer."""

    def build(self, shape: str, mode: str, device: str) -> None:
        import torch
        from model import GPT, GPTConfig

        layers, width, heads, vocabulary, context, _, _ = SHAPES[shape]
        self.model = GPT(
            GPTConfig(
                block_size=context,
                vocab_size=vocabulary,
                n_layer=layers,
                n_head=heads,
                n_embd=width,
                dropout=0.0,
                bias=False,
            )
        ).to(device)
        self.optimizer = self.model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), device)
        self.forward = torch.compile(self.model) if device == "cuda" else self.model

    def loss(self, ids: Any, targets: Any) -> Any:
        return self.forward(ids, targets)[1]


class LitGPT(Peer):
    """litgpt's GPT with Llama blocks (RMSNorm, rotary positions, gated MLP), embeddings tied."""

    def build(self, shape: str, mode: str, device: str) -> None:
        import torch

        import_litgpt_model_only()
        from litgpt.config import Config
        from litgpt.model import GPT

        layers, width, heads, vocabulary, context, _, inner = SHAPES[shape]
        self.model = GPT(
            Config(
                n_layer=layers,
                n_embd=width,
                n_head=heads,
                block_size=context,
                padded_vocab_size=vocabulary,
                vocab_size=vocabulary,
                norm_class_name="RMSNorm",
                mlp_class_name="LLaMAMLP",
                intermediate_size=inner,
                bias=False,
                rotary_percentage=1.0,
                parallel_residual=False,
            )
        )
        self.model.apply(self.model._init_weights)
        self.model.transformer.wte.weight = self.model.lm_head.weight
        self.model.to(device, torch.bfloat16 if mode == "bfloat16" else torch.float32)
        self.forward = torch.compile(self.model) if device == "cuda" else self.model
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )

    def loss(self, ids: Any, targets: Any) -> Any:
        logits = self.forward(ids)
        return self.torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
        )


def import_litgpt_model_only() -> None:
    """Makes litgpt.config and litgpt.model importable without the rest of litgpt.

    The rest needs a dozen more packages.
    """
    folders = (Path(path) / "litgpt" for path in sys.path)
    folder = next(path for path in folders if (path / "model.py").is_file())
    names = ("litgpt", "litgpt.scripts", "litgpt.scripts.convert_hf_checkpoint")
    package, scripts, converter = map(types.ModuleType, names)
    package.__path__, scripts.__path__ = [str(folder)], []
    vars(converter)["qkv_reassemble"] = None  # for old checkpoints only
    sys.modules.update({module.__name__: module for module in (package, scripts, converter)})


def work(kind: str, shape: str, mode: str, threads: int, device: str) -> None:
    """A contestant's process: prints its facts as JSON, then serves turns.

    For each number of steps on standard input it prints [result of the turn, peak memory].
    """
    kinds: dict[str, Any] = {"lm": Lm, "limit": Limit, "nanogpt": NanoGPT, "litgpt": LitGPT}
    contestant = kinds[kind](shape, mode, threads, device)
    contestant.turn(WARM_UP[shape])
    print(json.dumps(contestant.facts), flush=True)
    for line in sys.stdin:
        # not timed: refills the caches and memory that other processes took
        contestant.turn(1)
        result = contestant.turn(int(line))
        print(json.dumps([result, peak_memory(device)]), flush=True)


def peak_memory(device: str) -> int:
    """Peak bytes, on a GPU of its memory."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# -- in the main process


class Worker:
    """A contestant's process, which sleeps except in its turns."""

    def __init__(
        self,
        python: str,
        kind: str,
        mode: str,
        shape: str,
        options: argparse.Namespace,
        checkout: str | None,
    ):
        environment = dict(os.environ)
        if checkout:
            environment["PYTHONPATH"] = checkout
        self.command = [
            *(python, __file__, "--worker", kind, "--mode", mode, "--shapes", shape),
            *("--threads", str(options.threads), "--device", options.device),
        ]
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self.process.stdin and self.process.stdout
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.facts = self._answer()

    def turn(self, steps: int) -> tuple[float, int]:
        """(seconds of the steps, or FLOP/s of a limit; peak memory so far in bytes)."""
        self.stdin.write(f"{steps}\n")
        self.stdin.flush()
        result, peak = self._answer()
        return result, peak

    def close(self) -> None:
        """Ends the process."""
        self.stdin.close()
        self.process.wait()

    def _answer(self) -> Any:
        if line := self.stdout.readline():
            return json.loads(line)
        code = self.process.wait()
        raise SystemExit(f"{' '.join(self.command)} ended with exit code {code}; see above")


def compare(shape: str, options: argparse.Namespace) -> list[dict]:
    """One row per contestant, after `rounds` turns of each."""
    checkouts = {"nanogpt": options.nanogpt, "litgpt": options.litgpt}
    peers = {name: peer for name, peer in PEERS.items() if checkouts[peer[0]]}
    contestants = {**OURS, **peers, **LIMITS}
    workers = {}
    for name, (kind, mode) in contestants.items():
        python = options.peer_python if kind in checkouts else sys.executable
        workers[name] = Worker(python, kind, mode, shape, options, checkouts.get(kind))
    results: dict[str, list[float]] = {name: [] for name in contestants}
    peaks = {}
    for _ in range(options.rounds):
        for name, worker in workers.items():
            result, peaks[name] = worker.turn(STEPS[shape])
            results[name].append(result)
    for worker in workers.values():
        worker.close()
    return [
        table_row(shape, name, workers[name].facts, results, peaks[name])
        for name in contestants
        if name not in LIMITS
    ]


def table_row(
    shape: str, name: str, facts: dict, results: dict[str, list[float]], peak: int
) -> dict:
    """A contestant's row; `ratio` is lm's speed / its speed: median, minimum and maximum."""
    tokens = STEPS[shape] * SHAPES[shape][4] * SHAPES[shape][5]
    ratios = [other / lm for lm, other in zip(results["lm"], results[name])]
    speed = tokens / statistics.median(results[name])
    limit = results[f"limit {facts['dtype']}"][-1]
    return {
        "shape": shape,
        "name": name,
        "tokens_per_second": speed,
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "achieved": speed * facts["flops_per_token"],
        "limit": limit,
        "share": speed * facts["flops_per_token"] / limit,
        "peak_memory_bytes": peak,
        **facts,
    }


def show(rows: list[dict]) -> None:
    """Prints the table of one shape."""
    print(
        f"{'shape ' + rows[0]['shape']:20}{'tokens/s':>10}{'lm is × as fast':>24}{'GFLOP/s':>10}"
        f"{'of products':>13}{'peak MB':>9}{'parameters':>13}{'MFLOP/token':>13}"
    )
    for row in rows:
        span = f"{row['ratio']:.2f} ({row['ratio_min']:.2f} – {row['ratio_max']:.2f})"
        print(
            f"{row['name']:20}{row['tokens_per_second']:>10,.0f}{span:>24}"
            f"{row['achieved'] / 1e9:>10.1f}{row['share']:>13.0%}"
            f"{row['peak_memory_bytes'] / 1e6:>9,.0f}{row['parameters']:>13,}"
            f"{row['flops_per_token'] / 1e6:>13.2f}"
        )
    limits = {row["dtype"]: row["limit"] for row in rows}
    speeds = [f"{dtype} {limit / 1e9:.0f} GFLOP/s" for dtype, limit in limits.items()]
    print(f"matrix products alone: {', '.join(speeds)}")
    print(
        f"parameters agree within {spread(rows, 'parameters'):.2%}, FLOPs per token within "
        f"{spread(rows, 'flops_per_token'):.2%}\n",
        flush=True,
    )


def spread(rows: list[dict], key: str) -> float:
    """The largest value relative to the smallest, minus 1."""
    values = [row[key] for row in rows]
    return max(values) / min(values) - 1


def main() -> int:
    """Runs a worker, or the comparison; 1 if the models differ in size."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nanogpt", metavar="CHECKOUT", help="folder with nanoGPT's model.py")
    parser.add_argument("--litgpt", metavar="CHECKOUT", help="folder with litgpt/model.py")
    parser.add_argument(
        "--peer-python", default=sys.executable, help="interpreter that runs the peers"
    )
    parser.add_argument("--shapes", default="R,S")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0, help="per contestant; 0: all cores")
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
            parser.error(f"{checkout} has no {file}: give the folder of a checkout")
    if unknown := set(options.shapes.split(",")) - set(SHAPES):
        parser.error(f"unknown shape {', '.join(sorted(unknown))}; known: {', '.join(SHAPES)}")
    same_size = True
    for shape in options.shapes.split(","):
        rows = compare(shape, options)
        spreads = [spread(rows, key) for key in ("parameters", "flops_per_token")]
        same_size = same_size and max(spreads) <= 0.01
        if options.json:
            for row in rows:
                print(json.dumps(row), flush=True)
        else:
            show(rows)
    return 0 if same_size else 1


if __name__ == "__main__":
    sys.exit(main())
