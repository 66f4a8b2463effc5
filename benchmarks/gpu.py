"""What a GPU does with this project: its limits, proofs of right numbers on it, times and memory, in ten minutes.

Each part is a process with a time limit. It prints a JSON object for each result as soon as it has it, so that one
that fails, hangs or is cut off costs only its own remaining results. Nothing is fetched. ``make gpu`` runs this and
then the tests marked gpu. With ``--device cpu --tiny`` every part runs in seconds, on a machine without a GPU, to show
that it still works; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import bank, raw
from jax_step import jax_step
from torch import Tensor, nn
from train import made_up, plain_example

from mamldata.archive.build import build
from mamldata.archive.plan import BuildRequest
from mamldata.errors import MamldataError, StoppedError
from mamldata.sources.live import live
from mamldata.streaming.batch import EpisodeBatch
from mamldata.streaming.stream import EpisodeStream
from trainer.data import live_data
from trainer.evaluation import evaluate, evaluate_network
from trainer.learner import Learner
from trainer.loop import train
from trainer.maml.algorithms import ALGORITHMS, BN_MODES
from trainer.maml.choice import engine_for
from trainer.maml.engines import Engine
from trainer.maml.graphed import CudaGraphs, Prepared
from trainer.maml.parameters import meta_parameters
from trainer.maml.variants import method_of
from trainer.networks.batchnorm import batch_norm
from trainer.networks.networks import build_network
from trainer.networks.precision import PRECISIONS, arithmetic, set_precision
from trainer.runs import metrics
from trainer.runs.checkpoint import load_checkpoint
from trainer.runs.recipe import load_recipe
from trainer.settings import TrainSettings
from trainer.system.gpu import Wait

Row = dict[str, Any]
ENGINES = ("loop", "vmap", "graphed")
MIB = 2**20


class Kit:
    """What the parts share.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.tiny: bool = options.tiny
        self.device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
        self.options = options
        self.cuda = self.device.type == "cuda"
        self.repeats = 2 if self.tiny else 20

    def size(self, real: int, tiny: int) -> int:
        """A size of the kit, or that of a dry run."""
        return tiny if self.tiny else real

    def engine(self, name: str, *, compiled: bool = False) -> Engine:
        """A new engine; without a GPU graphs are plain calls."""
        if name == "graphed" and not self.cuda:
            return Prepared(PlainGraphs())
        return engine_for(name, self.device, compile=compiled)

    def wait(self) -> None:
        """Let the device finish."""
        if self.cuda:
            torch.cuda.synchronize()

    def milliseconds(self, work: Callable[[], object], *, warm_ups: int = 3) -> Row:
        """Median and extremes of the time between the device's begin and end of the work."""
        for _ in range(1 if self.tiny else warm_ups):
            work()
        taken = []
        for _ in range(self.repeats):
            self.wait()
            timer = Wait(self.device)
            work()
            timer.end()
            self.wait()
            taken.append(1000 * float(timer))
        return {"ms": statistics.median(taken), "fastest": min(taken), "slowest": max(taken)}

    def batch(self, seed: int = 0, tasks: int = 0, image: tuple[int, int, int] = (28, 28, 1)) -> EpisodeBatch:
        """Random episodes, 5-way 1-shot 15-query."""
        tasks = tasks or self.size(32, 2)
        drawn = made_up(tasks, self.device, image, shots=(1, self.size(15, 2)), seed=seed)
        return drawn._replace(index=drawn.index.to(self.device))

    def learner(self, engine: str, **settings: Any) -> Learner:
        """On random episodes of Omniglot's shape."""
        about = {"image_shape": (28, 28, 1), "n_way": 5}
        small = {"filters": 2} if self.tiny else {}
        chosen = TrainSettings(
            **{"inner_lr": 0.1, "engine": "vmap" if engine == "graphed" else engine, **small, **settings}
        )
        learner = Learner(chosen, _NoClasses(), about, self.device)
        learner._engine = self.engine(engine)  # in a dry run also graphs, which the settings refuse
        return learner

    def images(self) -> tuple[str, str | None]:
        """The dataset and the root of images that lie there ready."""
        raw(self.options)
        return self.options.dataset, self.options.root


class _NoClasses:
    """The data of learners whose algorithm needs no classes."""

    def class_count(self) -> int:
        raise NotImplementedError

    def classes(self, index: Tensor) -> Tensor:
        raise NotImplementedError


class PlainGraphs(CudaGraphs):
    """In a dry run: a capture is a call, and so is each replay."""

    def capture(self, work: Callable[[], Sequence[Tensor]]) -> tuple[Sequence[Tensor], Callable[[], object]]:
        """See ``CudaGraphs``."""
        places = [value.clone() for value in work()]

        def replay() -> None:
            for place, value in zip(places, work(), strict=True):
                place.copy_(value)

        return places, replay


def ceilings(kit: Kit) -> Iterator[Row]:
    """Versions, and what the device can do at best."""
    about = {"torch": torch.__version__, "python": platform.python_version(), "processors": os.cpu_count()}
    if kit.cuda:
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
        )
        about |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "gpu": driver.stdout.strip()}
    yield {"versions": about}
    count = kit.size(1 << 30, 1 << 16)
    there = torch.zeros(count, dtype=torch.uint8, device=kit.device)
    other = torch.zeros_like(there)
    found = kit.milliseconds(lambda: other.copy_(there))
    yield {"name": "copy on the device, read and written", "GB/s": 2 * count / found["ms"] / 1e6}
    host = torch.zeros(count // 4, dtype=torch.uint8, pin_memory=kit.cuda)
    found = kit.milliseconds(lambda: other[: len(host)].copy_(host, non_blocking=True))
    yield {"name": "copy from page-locked memory", "GB/s": len(host) / found["ms"] / 1e6}
    side = kit.size(8192, 64)
    a, b = torch.randn(2, side, side, device=kit.device)
    for precision in PRECISIONS:
        network = nn.Identity()
        set_precision(network, precision)
        x, y = (a.bfloat16(), b.bfloat16()) if precision == "bf16" else (a, b)
        with arithmetic(network, kit.device):
            found = kit.milliseconds(lambda x=x, y=y: x @ y)
        yield {"name": f"matrix product, {precision}", "TFLOP/s": 2 * side**3 / found["ms"] / 1e9}
    small, launches = torch.zeros(1, device=kit.device), kit.size(2000, 20)

    def launch() -> list[Tensor]:
        for _ in range(launches):
            small.add_(1)
        return [small]

    found = kit.milliseconds(launch)
    yield {"name": "launch", "us": 1000 * found["ms"] / launches}
    _, replay = (CudaGraphs() if kit.cuda else PlainGraphs()).capture(launch)
    found = kit.milliseconds(replay)
    yield {"name": "launch in a graph", "us": 1000 * found["ms"] / launches}


def gradient(
    kit: Kit, settings: TrainSettings, engine: str, batch: EpisodeBatch, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """The meta-gradient of a fresh network, as one float64 vector on the CPU."""
    network = build_network("conv4", 1, 28, 5, 0, kit.size(64, 2)).to(device, dtype)
    set_precision(network, settings.precision or "fp32")
    inner, made = settings.inner_loop(), kit.engine(engine)
    given = EpisodeBatch(*(part.to(device, dtype if part.is_floating_point() else part.dtype) for part in batch))
    with arithmetic(network, device):
        found = made(
            network, meta_parameters(network, inner), given, method_of(network, inner, engine), settings.objective(0)
        )
    return torch.cat([value.flatten() for value in found.gradient.tensors()]).double().cpu()


def truth(kit: Kit) -> Iterator[Row]:
    """Float64 gradients of all engines against the CPU's; errors of the precisions; no step waits for the device."""
    exact, cpu = torch.float64, torch.device("cpu")
    cells: list[Row] = [{"algorithm": name} for name, one in ALGORITHMS.items() if one.outer in {"query", "reptile"}]
    cells.remove({"algorithm": "protonet"})  # without an inner loop
    for cell in cells + [{"bn": bn} for bn in BN_MODES]:
        settings, batch = TrainSettings(inner_steps=2, inner_lr=0.1, **cell), kit.batch(tasks=kit.size(4, 2))
        expected, errors = gradient(kit, settings, "loop", batch, cpu, exact), {}
        for engine in ENGINES:
            found = gradient(kit, settings, engine, batch, kit.device, exact)
            errors[engine] = ((found - expected).abs().max() / expected.abs().max()).item()
        yield {"name": "float64 against the CPU", **cell, **errors, "right": max(errors.values()) < 1e-9}
    for steps in (1, kit.size(5, 2)):
        batch, errors = kit.batch(), {}
        settings = TrainSettings(inner_steps=steps, inner_lr=0.1)
        expected = gradient(kit, settings, "vmap", batch, kit.device, exact)
        for precision in PRECISIONS if kit.cuda else ("fp32", "bf16"):
            found = gradient(kit, replace(settings, precision=precision), "vmap", batch, kit.device, torch.float32)
            errors[precision] = {
                "error": ((found - expected).norm() / expected.norm()).item(),
                "cosine": nn.functional.cosine_similarity(found, expected, dim=0).item(),
            }
        yield {"name": "meta-gradient of an untrained network against float64", "inner steps": steps, **errors}
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(3, 2, 3, 3, dtype=torch.float64, device=kit.device).to(memory_format=layout).requires_grad_()
        weight, bias = torch.rand(2, 2, dtype=torch.float64, device=kit.device).unbind()
        inputs = (x, weight.clone().requires_grad_(), bias.clone().requires_grad_())
        right = torch.autograd.gradgradcheck(batch_norm, inputs, raise_exception=False)
        yield {"name": f"second derivative of batch norm, {layout}", "right": right}
    yield from _no_waiting(kit)


def _no_waiting(kit: Kit) -> Iterator[Row]:
    for engine in ENGINES:
        learner, batch = kit.learner(engine), kit.batch()
        learner.descend(learner.gradient(batch, 0, every_step=False), 0)  # captures; Adam makes its state
        kit.wait()
        reason = None
        if kit.cuda:
            torch.cuda.set_sync_debug_mode("error")
        try:
            learner.descend(learner.gradient(batch, 1, every_step=False), 1)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
        finally:
            if kit.cuda:
                torch.cuda.set_sync_debug_mode("default")
        yield {"name": f"no step of {engine} makes the host wait", "right": reason is None, "reason": reason}


class Numbered:
    """A source whose every byte is a function of the episode's index and the byte's place."""

    def __init__(self, source: Any) -> None:
        self._source = source

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def read(self, index: Any, support: Any, query: Any) -> None:
        """See ``Source``."""
        info = self._source.info
        for part, k in ((support, info.k_shot), (query, info.k_query)):
            count = info.n_way * k * int(np.prod(info.image_shape))
            part[: len(index) * count].reshape(len(index), count)[:] = numbers(index, count)


def numbers(index: Any, count: int) -> Any:
    return ((index[:, None] * 131 + np.arange(count)[None] * 7) % 251).astype(np.uint8)


def ring(kit: Kit) -> Iterator[Row]:
    """Every byte of meta-batches that come while the consumer is slow, at random, and freed memory is overwritten."""
    dataset, root = kit.images()
    batches, chance = kit.size(500, 5), np.random.default_rng(0)
    for prefetch in (1, 2, 3):
        stream = EpisodeStream(Numbered(live(dataset, root=root)), batch_size=kit.size(32, 2), dtype=torch.uint8)
        device = stream.to(kit.device, prefetch=prefetch)
        done = 0
        with torch.cuda.stream(torch.cuda.Stream() if kit.cuda else None):
            wrong = torch.zeros((), dtype=torch.int64, device=kit.device)
            while done < batches:
                for batch in device:  # broken off at random
                    done += 1
                    if kit.cuda:
                        torch.cuda._sleep(int(chance.integers(0, 2_000_000)))
                    for part in (batch.support_x, batch.query_x):
                        found = part.permute(0, 1, 3, 4, 2).flatten(1).long()
                        places = torch.arange(found.shape[1], device=kit.device)
                        wrong += ((batch.index[:, None] * 131 + places[None] * 7) % 251 != found).sum()
                    shape = batch.query_x.shape
                    del batch, part, found
                    torch.full(shape, 255, dtype=torch.uint8, device=kit.device)  # over what is free
                    if done >= batches or chance.random() < 0.05:
                        break
        kit.wait()
        yield {
            "name": f"ring, prefetch {prefetch}",
            "batches": done,
            "wrong bytes": int(wrong),
            "right": not int(wrong),
        }
    if not kit.cuda:
        return
    reserved = []
    for _ in range(kit.size(40, 3)):
        for t, _ in enumerate(EpisodeStream(live(dataset, root=root), batch_size=32).to(kit.device)):
            if t == 5:
                break
        torch.cuda.synchronize()
        reserved.append(torch.cuda.memory_reserved() / MIB)
    yield {
        "name": "reserved memory over passes, MiB",
        "all": sorted(set(reserved)),
        "right": reserved[1] == reserved[-1],
    }
    checker = shutil.which("compute-sanitizer")
    if checker and not kit.tiny and "MAMLDATA_SANITIZED" not in os.environ:
        command = [checker, "--error-exitcode", "9", *command_of("ring", [*sys.argv[1:], "--tiny"])]
        with suppress(subprocess.TimeoutExpired):
            end = subprocess.run(
                command, capture_output=True, check=False, timeout=40, env={**os.environ, "MAMLDATA_SANITIZED": "1"}
            )
            yield {"name": "compute-sanitizer", "exit": end.returncode, "right": end.returncode == 0}


def capture(kit: Kit) -> Iterator[Row]:
    """Captures while another thread reads ahead; replays against eager steps, over all changes that a run knows."""
    dataset, root = kit.images()
    points: dict[str, Row] = {
        "maml": {},
        "changing weights of the multi-step loss": {
            "algorithm": "maml++",
            "epoch_steps": kit.size(10, 1),
            "msl_epochs": 3,
        },
        "from first to second order": {"first_order_epochs": 1, "epoch_steps": kit.size(20, 2)},
    }
    for name, point in points.items():
        losses = {}
        for engine in ("vmap", "graphed"):
            learner = kit.learner(engine, inner_steps=2, meta_optimizer="sgd", meta_lr=0.01, **point)
            stream = EpisodeStream(live(dataset, root=root), batch_size=kit.size(16, 2)).to(kit.device)
            outcomes = []
            for step, batch in zip(range(kit.size(50, 4)), stream, strict=False):
                outcomes.append(learner.gradient(batch, step, every_step=step % 2 == 1))
                learner.descend(outcomes[-1], step)
            losses[engine] = torch.stack([outcome.loss for outcome in outcomes]).cpu()
        difference = (losses["vmap"] - losses["graphed"]).abs().max().item()
        yield {"name": f"graphed against vmap, {name}", "difference of losses": difference, "right": difference < 1e-3}
    with tempfile.TemporaryDirectory() as place:
        data = live_data(dataset, root, {"k_query": kit.size(15, 2)})
        settings = TrainSettings(steps=2, meta_batch_size=2, eval_every=2, eval_episodes=2, device="cpu", filters=4)
        last = load_checkpoint(train(settings, data, Path(place) / "run").last)
        learner = kit.learner("graphed", filters=4)
        learner.load(last.weights, last.optimizer, Path(place))
        learner.descend(learner.gradient(kit.batch(), 2, every_step=False), 2)
        moved = max(
            (value.detach().cpu() - last.weights[name]).abs().max() for name, value in learner.weights().items()
        )
        yield {"name": "resume from a CPU's checkpoint", "right": 0 < moved.item() < 0.01}


def _again(stream: Any) -> Iterator[EpisodeBatch]:
    while True:
        yield from stream


def times(kit: Kit) -> Iterator[Row]:
    """Milliseconds and memory of a meta-gradient; a plain loop and JAX beside it. Compiled ones last."""
    networks = [("conv4", (28, 28, 1)), ("conv3-pool", (28, 28, 1)), ("conv4-pool", (84, 84, 3))]
    networks = networks[:1] if kit.tiny else networks
    for network, image in networks:
        batch = kit.batch(image=image)
        for steps in (1, kit.size(5, 2)):
            what = {"network": network, "inner steps": steps}
            for engine in ("graphed", "vmap", "loop"):
                for precision in PRECISIONS:
                    if (precision == "tf32" and not kit.cuda) or (engine == "loop" and precision != "fp32"):
                        continue
                    yield _timed(kit, what, engine, precision, batch, image)
            if network != "conv4-pool":
                work = plain_example(network, batch, steps, 0.1, second=True)
                yield {**what, "engine": "plain example", **kit.milliseconds(work, warm_ups=1)}
            if network == "conv4":
                yield {**what, "engine": "jax", **_jax(kit, batch, steps)}
    for steps in (1, 5) if kit.cuda else ():
        what = {"network": "conv4", "inner steps": steps}
        for engine in ("graphed", "vmap"):
            yield _timed(kit, what, engine, "fp32", kit.batch(), (28, 28, 1), compiled=True)


def _timed(
    kit: Kit,
    what: Row,
    engine: str,
    precision: str,
    batch: EpisodeBatch,
    image: tuple[int, int, int],
    *,
    compiled: bool = False,
) -> Row:
    row = {**what, "engine": engine + " compiled" * compiled, "precision": precision}
    filters = 2 if kit.tiny else None
    network = build_network(what["network"], image[2], image[0], 5, 0, filters).to(kit.device)
    set_precision(network, precision)  # type: ignore[arg-type]
    settings = TrainSettings(inner_steps=what["inner steps"], inner_lr=0.1)
    at, made = meta_parameters(network, settings.inner_loop()), kit.engine(engine, compiled=compiled)
    method = method_of(network, settings.inner_loop(), engine)

    def work() -> None:
        with arithmetic(network, kit.device):
            made(network, at, batch, method)

    try:
        before = 0
        if kit.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        work()
        kit.wait()
        row |= {"first call, s": time.perf_counter() - start, **kit.milliseconds(work)}
        if kit.cuda:
            row["peak MiB"] = (torch.cuda.max_memory_allocated() - before) / MIB
            row["reserved MiB"] = torch.cuda.max_memory_reserved() / MIB
            row["kernels"] = _kernels(work)
    except (MamldataError, RuntimeError) as error:
        row["error"] = str(error).splitlines()[0]
    return row


def _kernels(work: Callable[[], object]) -> int:
    from torch.autograd import DeviceType

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in profile.events())


def _jax(kit: Kit, batch: EpisodeBatch, steps: int) -> Row:
    if importlib.util.find_spec("jax") is None:
        return {"skipped": "JAX is not installed"}
    network = build_network("conv4", 1, 28, 5, 0, 2 if kit.tiny else None)
    taken = jax_step(network, batch, steps, 0.1, repeats=kit.repeats)
    return {"ms": statistics.median(taken["ms"]), "first call, s": taken["first"], "loss": taken["loss"]}


def stream(kit: Kit) -> Iterator[Row]:
    """GB/s of images to the device, and how long the device waits for them, from each kind of source."""
    manifest, images = bank(kit.options)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "archive"
        episodes = {"train": kit.size(4000, 8), "val": 2, "test": 2}
        build(manifest, images, folder, BuildRequest(n_way=5, k_shot=1, k_query=15, episodes=episodes, seed=0))
        for name, source, more in [
            ("archive", folder, {}),
            ("remix", folder, {"remix": True}),
            ("live", live(kit.options.dataset, root=kit.options.root), {}),
            ("normalized", folder, {"normalize": True}),
        ]:
            size = kit.size(32, 2)
            made = EpisodeStream(source, batch_size=size, **more).to(kit.device)
            count = kit.size(120, 3)
            batches = _again(made)
            next(batches)
            waited, bytes_, start = [], 0, time.perf_counter()
            for _ in range(count):
                wait = Wait(kit.device)
                batch = next(batches)
                wait.end()
                waited.append(wait)
                bytes_ += batch.support_x.numel() + batch.query_x.numel()
            kit.wait()
            seconds = time.perf_counter() - start
            batches.close()
            percent = 100 * sum(map(float, waited)) / seconds
            yield {"name": name, "GB/s": bytes_ / seconds / 1e9, "batches/s": count / seconds, "waiting %": percent}


def evaluation(kit: Kit) -> Iterator[Row]:
    """Seconds of an evaluation of 600 episodes that lie on the device."""
    learner = kit.learner("loop")
    about = {"dataset": "made up", "split_scheme": "none", "n_way": 5, "k_shot": 1, "k_query": kit.size(15, 2)}
    inner, size = learner.settings.inner_loop_at_test(), kit.size(16, 2)
    for batch_size in (size, 4 * size):
        batches = [kit.batch(seed, batch_size) for seed in range(kit.size(600, 4) // batch_size + 1)]
        for turn in ("first", "second"):
            kit.wait()
            start = time.perf_counter()
            found = evaluate_network(learner.network, batches, inner, about, "test", learner.parameters)
            seconds = time.perf_counter() - start
            yield {"episodes": found.episodes, "at once": batch_size, "turn": turn, "s": seconds}


def headline(kit: Kit) -> Iterator[Row]:
    """Omniglot 5-way 1-shot as in the paper: seconds to 97 and 98.7 % of validation, then test with its interval."""
    dataset = "glyphs" if kit.tiny else "omniglot"
    plan = load_recipe("maml-omniglot-5w1s")
    with tempfile.TemporaryDirectory() as place:
        try:
            data = live_data(dataset, kit.options.root, {"k_query": 2} if kit.tiny else plan.episodes)
            data.available("val")
        except MamldataError as error:
            yield {"skipped": str(error)}
            return
        settings = TrainSettings(**{**plan.settings, "eval_every": 500, "eval_episodes": 200, "log_every": 500})
        if kit.tiny:
            settings = replace(
                settings, steps=2, eval_every=1, eval_episodes=2, filters=2, meta_batch_size=2, device="cpu"
            )
        run, start = Path(place) / "run", time.perf_counter()
        limit = threading.Timer(kit.options.headline, os.kill, (os.getpid(), signal.SIGTERM))
        limit.daemon = True
        limit.start()
        with suppress(StoppedError):
            train(settings, data, run, notify=lambda line: print(line, file=sys.stderr))
        limit.cancel()
        rows = metrics.read(run)
        seconds = time.perf_counter() - start
        last = max(row["step"] for row in rows)
        yield {"steps": last, "s": seconds, "ms per step with validations": 1000 * seconds / last}
        for goal in (0.97, 0.987):
            step = next((row["step"] for row in rows if row["event"] == "val" and row["accuracy"] >= goal), None)
            spent = sum(_seconds_of(row, rows) for row in rows if step is not None and row["step"] <= step)
            yield {"validation": goal, "step": step, "s": spent if step is not None else None}
        found = evaluate(run, data, episodes=kit.size(600, 2), device=kit.device.type)
        yield {"test": found.accuracy, "interval": found.interval, "in words": str(found)}


def _seconds_of(row: Row, rows: list[Row]) -> float:
    if row["event"] == "val":
        return float(row["seconds"])
    before = max((one["step"] for one in rows if one["event"] == "train" and one["step"] < row["step"]), default=0)
    return (row["step"] - before) * float(row["ms_per_step"]) / 1000


# With the limit of each in seconds; together ten minutes.
PARTS: dict[str, tuple[float, Callable[[Kit], Iterator[Row]]]] = {
    "ceilings": (40, ceilings),
    "truth": (80, truth),
    "ring": (80, ring),
    "capture": (50, capture),
    "times": (140, times),
    "stream": (40, stream),
    "evaluation": (30, evaluation),
    "headline": (140, headline),
}


def rows_of(part: str, options: argparse.Namespace) -> Iterator[Row]:
    """The results of a part, and the error that ends it, each with the seconds since its begin."""
    start = time.perf_counter()
    try:
        for row in PARTS[part][1](Kit(options)):
            yield {"part": part, **row, "after_s": round(time.perf_counter() - start, 2)}
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        yield {"part": part, "failed": reason, "after_s": round(time.perf_counter() - start, 2)}


def command_of(part: str, words: Sequence[str]) -> list[str]:
    return [sys.executable, __file__, *words, "--one", part]


def supervise(command: Sequence[str], limit: float, part: str, tell: Callable[[str], object]) -> None:
    """Run a part as a process, hand on its lines as they come, and end it at its limit."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    cut = threading.Timer(limit, lambda: os.killpg(process.pid, signal.SIGKILL))
    cut.start()
    with process:
        assert process.stdout
        for line in process.stdout:
            tell(line.rstrip("\n"))
    code, over = process.returncode, not cut.is_alive()
    cut.cancel()
    if code:
        reason = f"cut off after {limit:g} s" if over else f"ended with exit code {code}"
        tell(json.dumps({"part": part, "failed": reason}))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    made.add_argument("--tiny", action="store_true", help="sizes of a dry run")
    made.add_argument("--out", type=Path, default=Path("gpu.jsonl"), help="where each row is also appended")
    made.add_argument("--headline", type=float, default=110, help="seconds of training in the last part")
    made.add_argument("--dataset", default="glyphs", help="for streams: a name or a manifest (default: glyphs)")
    made.add_argument("--from", dest="places", action="append", default=[], help="where raw files are")
    made.add_argument("--root", help="the data root (default: as for mamldata)")
    made.add_argument("--one", choices=tuple(PARTS), help=argparse.SUPPRESS)
    return made


def main() -> None:
    options = parser().parse_args()
    if options.one:
        for row in rows_of(options.one, options):
            print(json.dumps(row, default=str), flush=True)
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch finds no GPU. For a dry run: --device cpu --tiny")
    with options.out.open("a") as out:

        def tell(line: str) -> None:
            print(line, flush=True)
            out.write(line + "\n")
            out.flush()

        for part in options.parts:
            supervise(command_of(part, sys.argv[1:]), PARTS[part][0], part, tell)


if __name__ == "__main__":
    main()
