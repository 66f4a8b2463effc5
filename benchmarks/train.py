"""Outer steps per second on synthetic episodes of Omniglot's shape: engines, orders and inner steps, in turn.

Each candidate runs in a separate process, with the allocator and the threads that it would have alone. The processor
time of a step is reported with the rates, because on a shared machine a rate mostly shows which process got the cores;
and the floor, the rate at which a step's floating-point operations would go by at the speed of a large matrix product.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import pairwise

import torch
from common import arguments, in_turn, ratio, report
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mamldata.parallel import default_workers
from mamldata.streaming.batch import EpisodeBatch
from trainer.maml.algorithms import InnerLoop
from trainer.maml.choice import engine_for
from trainer.maml.parameters import MetaParameters
from trainer.maml.variants import method_of
from trainer.networks.networks import build_network
from trainer.networks.precision import arithmetic, set_precision
from trainer.settings import pick_device
from trainer.system.malloc import keep_large_buffers

ORDERS = ("second", "first")
INNER_LR = 0.1
BESIDE = " beside busy processes"
PLAIN, PLAIN_KEPT = "plain example", "plain example with our allocator and layout"


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.set_defaults(repeats=5)
    parser.add_argument(
        "--candidates",
        nargs="+",
        default=["auto", "vmap", "higher", PLAIN, PLAIN_KEPT],
        help="engines, such as vmap, or vmap:bf16 in another precision; and the plain examples",
    )
    parser.add_argument("--network", choices=("conv4", "conv3-pool"), default="conv4")
    parser.add_argument("--k-shot", type=int, default=1)
    parser.add_argument("--k-query", type=int, default=15)
    parser.add_argument("--meta-batch-size", type=int, default=16)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--inner-steps", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--threads", type=int, default=default_workers())
    parser.add_argument(
        "--beside", type=int, default=0, metavar="N", help="also time each step beside N busy processes"
    )
    parser.add_argument("--one", metavar="CANDIDATE", help="be this candidate, and take a step for each line")
    options = parser.parse_args()
    if options.one:
        take_steps(options)
        return
    results: dict[str, dict[str, float]] = {}
    ratios, slower, floors = {}, {}, {}
    speed = peak(options)
    with ExitStack() as stack:
        busy = stack.enter_context(Busy(options.beside))
        workers = {name: stack.enter_context(Worker(name, options.threads)) for name in options.candidates}
        for steps in options.inner_steps:
            for order in ORDERS:
                what = f"{order} order, {steps} inner step{'s' if steps > 1 else ''}"
                count = operations(options, steps, order)
                floors[what] = {"GFLOP": count / 1e9, "GFLOP/s": speed / 1e9, "floor": speed / count}
                tasks = {name: worker.task(steps, order) for name, worker in workers.items()}
                if options.beside:
                    tasks |= {f"{name}{BESIDE}": busy.beside(task) for name, task in tasks.items()}
                found = in_turn(tasks, options.repeats)
                for name, worker in workers.items():
                    found[name]["cpu_seconds"] = worker.cpu_seconds()
                    found[name]["floor"] = speed / count
                    if options.beside:
                        slower[f"{what}, {name}"] = ratio(found, name, f"{name}{BESIDE}")
                results |= {f"{what}, {name}": value for name, value in found.items()}
                ratios |= {f"{what}, {name}": ratio(found, name, PLAIN) for name in found if PLAIN in found}
    report(
        "train",
        {
            "unit": "outer steps/s; cpu_seconds of all threads, a step",
            "episodes": f"5-way {options.k_shot}-shot {options.k_query}-query, 28x28, made up",
            "meta_batch_size": options.meta_batch_size,
            "network": f"{options.network}; the plain example has it as torch's own layers",
            "device": options.device,
            "torch": torch.__version__,
            "threads": options.threads,
            "busy processes beside": options.beside,
            "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT"),
            "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY"),
        },
        results | {"floors": floors, "times as fast as the plain example": ratios, f"times as long{BESIDE}": slower},
    )


def operations(options: argparse.Namespace, steps: int, order: str) -> int:
    """Floating-point operations of the products and convolutions of a step of ``loop``; an addition counts as one."""
    batch, network = made_up(1, torch.device("cpu"), shots=(options.k_shot, options.k_query)), _network(options, "fp32")
    inner = InnerLoop(steps, INNER_LR, "second" if order == "second" else "first", "transductive")
    with FlopCounterMode(display=False) as counter:
        parameters = MetaParameters(dict(network.named_parameters()))
        engine_for("loop", batch.support_x.device)(network, parameters, batch, method_of(network, inner))
    return int(counter.get_total_flops()) * options.meta_batch_size


def peak(options: argparse.Namespace, side: int = 512) -> float:
    """The highest rate of a float32 matrix product with the threads of a candidate, in floating-point operations/s."""
    device, before = pick_device(options.device), torch.get_num_threads()
    torch.set_num_threads(options.threads)
    x, best = torch.randn(side, side, device=device), 0.0
    for _ in range(200):  # short, so that some are not interrupted
        start = time.perf_counter()
        (x @ x)[0, 0].item()  # waits for the device
        best = max(best, 2 * side**3 / (time.perf_counter() - start))
    torch.set_num_threads(before)
    return best


def _network(options: argparse.Namespace, precision: str) -> nn.Module:
    network = build_network(options.network, 1, 28, 5, seed=0)
    set_precision(network, precision)  # type: ignore[arg-type]
    return network


class Busy:
    """Processes that keep a processor busy each, but only during ``beside``."""

    def __init__(self, count: int) -> None:
        self._processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
        self._tell(signal.SIGSTOP)

    def __enter__(self) -> Busy:
        return self

    def __exit__(self, *_: object) -> None:
        self._tell(signal.SIGKILL)
        for process in self._processes:
            process.wait()

    def beside(self, work: Callable[[], int]) -> Callable[[], int]:
        """``work`` with the processes busy meanwhile."""

        def both() -> int:
            self._tell(signal.SIGCONT)
            done = work()
            self._tell(signal.SIGSTOP)
            return done

        return both

    def _tell(self, number: signal.Signals) -> None:
        for process in self._processes:
            process.send_signal(number)


class Worker:
    """A candidate in a separate process, which takes a step on request."""

    def __init__(self, name: str, threads: int) -> None:
        self._cpu: list[float] = []
        self._process = subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], "--one", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # closing its input ends it

    def task(self, steps: int, order: str) -> Callable[[], int]:
        """A task that takes a step and waits for it."""

        def work() -> int:
            assert self._process.stdin
            assert self._process.stdout
            print(steps, order, file=self._process.stdin, flush=True)
            self._cpu.append(float(self._process.stdout.readline()))
            return 1

        self._cpu.clear()
        return work

    def cpu_seconds(self) -> float:
        """The median processor time of a step of the last task, over all threads, without the first step."""
        return statistics.median(self._cpu[1:])


def take_steps(options: argparse.Namespace) -> None:
    device = pick_device(options.device)
    batch = made_up(options.meta_batch_size, device, shots=(options.k_shot, options.k_query))
    engine, _, precision = options.one.partition(":")
    if options.one == PLAIN:
        # The memory layout of torch's own loaders.
        batch = batch._replace(support_x=batch.support_x.contiguous(), query_x=batch.query_x.contiguous())
    else:
        keep_large_buffers()
    network = _network(options, precision or "fp32").to(device)
    made = None if engine in {PLAIN, PLAIN_KEPT} else engine_for(engine, device)
    parameters = MetaParameters(dict(network.named_parameters()))
    plain = {
        (steps, order): plain_example(options.network, batch, steps, INNER_LR, second=order == "second")
        for steps in options.inner_steps
        for order in ORDERS
    }
    for line in sys.stdin:
        steps, order, start = int(line.split()[0]), line.split()[1], time.process_time()
        if made is None:
            loss = plain[steps, order]()
        else:
            inner = InnerLoop(steps, INNER_LR, "second" if order == "second" else "first", "transductive")
            with arithmetic(network, device):
                loss = made(network, parameters, batch, method_of(network, inner, engine)).loss
        assert float(loss) >= 0  # waits for the device
        print(time.process_time() - start, flush=True)


def plain_example(name: str, batch: EpisodeBatch, steps: int, lr: float, *, second: bool) -> Callable[[], Tensor]:
    """A step as in tutorials: torch's layers, ``functional_call``, and one backward pass for all tasks."""
    layers: list[nn.Module] = []
    if name == "conv3-pool":  # of the functional examples
        for inputs, outputs in pairwise([1, 64, 64, 64]):
            layers += [nn.Conv2d(inputs, outputs, 3), nn.BatchNorm2d(outputs, track_running_stats=False)]
            layers += [nn.ReLU(), nn.MaxPool2d(2)]
    else:
        for inputs, outputs in pairwise([1, 64, 64, 64, 64]):
            layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)]
            layers += [nn.BatchNorm2d(outputs, track_running_stats=False), nn.ReLU()]
        layers += [nn.AdaptiveAvgPool2d(1)]
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 5)).to(batch.support_x.device)
    start = dict(network.named_parameters())

    def work() -> Tensor:
        losses = []
        for support_x, support_y, query_x, query_y in zip(*batch[:4], strict=True):
            fast = start
            for _ in range(steps):
                loss = F.cross_entropy(torch.func.functional_call(network, fast, (support_x,)), support_y)
                slopes = torch.autograd.grad(loss, list(fast.values()), create_graph=second)
                fast = {name: value - lr * slope for (name, value), slope in zip(fast.items(), slopes, strict=True)}
            losses.append(F.cross_entropy(torch.func.functional_call(network, fast, (query_x,)), query_y))
        network.zero_grad()
        whole = torch.stack(losses).mean()
        whole.backward()
        return whole.detach()

    return work


def made_up(
    episodes: int,
    device: torch.device,
    image: tuple[int, int, int] = (28, 28, 1),
    n_way: int = 5,
    shots: tuple[int, int] = (1, 15),
    seed: int = 0,
) -> EpisodeBatch:
    """Random episodes with the memory layout of a stream's meta-batches."""
    generator = torch.Generator().manual_seed(seed)
    images = [
        torch.rand(episodes, n_way * k, *image, generator=generator).permute(0, 1, 4, 2, 3).to(device) for k in shots
    ]
    labels = [torch.arange(n_way).repeat_interleave(k).repeat(episodes, 1).to(device) for k in shots]
    return EpisodeBatch(images[0], labels[0], images[1], labels[1], torch.arange(episodes))


if __name__ == "__main__":
    main()
