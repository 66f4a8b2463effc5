"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from mamldata.errors import RequestError, StoppedError
from mamldata.progress import Notify, Progress, silence, silent
from mamldata.streaming.batch import EpisodeBatch
from trainer.augment import augmentation
from trainer.evaluation import counting, evaluate_network, require_data, require_fit
from trainer.learner import Learner
from trainer.maml.rates import rate_lines
from trainer.protocol import TrainData, TrainStream, endless
from trainer.recorder import Recorder, reached
from trainer.runs.callbacks import Callback, Callbacks
from trainer.runs.checkpoint import Checkpoint, Start, read_start
from trainer.runs.folder import RunResult, alone_in, as_begun, open_run, require_agreement, run_result
from trainer.runs.metrics import Window
from trainer.runs.network import named
from trainer.runs.tensorboard import Board, require_tensorboard
from trainer.settings import DEPENDENT, TrainSettings, pick_device
from trainer.system.distributed import ALONE, World
from trainer.system.gpu import Wait
from trainer.system.malloc import keep_large_buffers
from trainer.system.signals import Stop, stop_at_signals
from trainer.system.threads import limited_threads


def train(
    settings: TrainSettings,
    data: TrainData,
    run_dir: Path | str,
    *,
    resume: bool = False,
    start: Path | str | None = None,
    network: nn.Module | None = None,
    notify: Notify = silence,
    progress: Progress = silent,
    callbacks: Sequence[Callback] = (),
    world: World = ALONE,
) -> RunResult:
    """Meta-train a network and write the run into ``run_dir``.

    A run that is killed at any moment and resumed ends with the same weights, bit for bit, as without the
    interruption (on the same CPU). SIGTERM, SIGUSR1 and, in one process, the first SIGINT end it with a checkpoint
    after the current outer step; a validation is broken off, and done again when the run is resumed.

    Args:
        settings: of the run.
        data: the episodes.
        run_dir: created if missing.
        resume: continue the run in ``run_dir``, or start it if there is none.
        start: a run folder, a checkpoint or a model, whose weights to start from in place of random ones: those of the
            network with its head, and learned rates and norms. The optimizer starts new.
        network: one of your own, in place of the trainer's: it takes examples float32 ``[N, C, H, W]`` and gives logits
            ``[N, n_way]``; see docs/guide.md. Its own weights are the initial ones. It is copied, not changed. The run
            records its name, ``settings.network`` or that of its class, but not its code.
        notify: receives progress lines and, on a CPU, the number of threads.
        progress: counts the episodes of a validation; with several processes, those of the first one.
        callbacks: receive the metrics, too, unless the run is done already; see ``Callback``.
        world: the processes that train together, as ``trainer.joined`` gives it. The first one writes and reports;
            the others need no access to ``run_dir``.

    Raises:
        RequestError: the settings, the data and the folder do not fit together.
        StoppedError: one of these signals came; the run is saved and can be resumed.
        DivergedError: a loss or a gradient is not finite; no checkpoint has weights that such a gradient changed.
        PeerError: another process failed, and reports why.
        LostPeerError: another process is gone.
        DamagedError: a checkpoint that is needed is damaged.
        WriteError: ``run_dir`` cannot be written to.
    """
    require_data(data)
    run_dir, settings = Path(run_dir), named(settings, network)
    notify = notify if world.first else silence
    if resume:
        settings = world.from_first(lambda: as_begun(run_dir, settings))
    from_there = world.from_first(lambda: read_start(start)) if start is not None else None
    with world.together():
        about = data.describe()
        given, settings = settings, settings.for_images(about)
        own = {name: getattr(settings, name) for name in DEPENDENT if getattr(given, name) is None}
        if own.get("network") == "conv4-pool":
            notify(
                "For colour images: " + ", ".join(f"{name} {value}" for name, value in own.items() if value is not None)
            )
        if from_there:
            require_fit(from_there.place, from_there.checkpoint, about)
        learner = _fit_to_train(settings, data, about, world, from_there, network)  # before anything is written
    require_agreement(world, settings, about)
    with stop_at_signals(keyboard=world.world_size == 1) as stop, ExitStack() as held:
        with world.together():
            if world.first:
                held.enter_context(alone_in(run_dir))
        threads = held.enter_context(limited_threads())
        # One process looks for the last checkpoint, and all resume from that one, wherever they run.
        last = world.from_first(
            lambda: open_run(run_dir, settings, about, resume=resume, start=from_there and from_there.record)
        )
        if last and last.step >= settings.outer_steps and last.accuracy is not None:
            notify(f"{run_dir} is done: {reached(last.step, settings.outer_steps)} steps.")
            return run_result(run_dir, last, world)
        with world.together():
            stream = data.train(
                settings.meta_batch_size,
                settings.seed,
                learner.device,
                normalize=bool(settings.normalize),
                transform=augmentation(settings.augment, about["image_shape"]),
                rank=world.rank,
                world_size=world.world_size,
            )
            if last:
                learner.load(last.weights, last.optimizer, run_dir / last.name)
                stream.load_state_dict(last.stream)
            told = Callbacks([*callbacks, *([Board()] if settings.tensorboard else [])] if world.first else [])
            recorder = Recorder(run_dir, learner, about, writes=world.first, callbacks=told, notify=notify, last=last)
            held.enter_context(told)
        world.spread_(learner.learned)
        if learner.device.type == "cpu":
            notify(f"Computing with {threads}.")
        run = _Run(learner, data, about, stream, recorder, world, progress)
        last = run.steps(last, stop)
        for line in rate_lines(learner.parameters, settings.point.rates):
            notify(line)
        result = run_result(run_dir, last, world)
        told.tell("end", result)
        return result


def _fit_to_train(
    settings: TrainSettings,
    data: TrainData,
    about: dict[str, Any],
    world: World,
    start: Start | None,
    network: nn.Module | None,
) -> Learner:
    """The learner, once everything that training needs has been checked."""
    if world.world_size > settings.meta_batch_size:
        raise RequestError(
            f"{world.world_size} processes cannot share a meta-batch of {settings.meta_batch_size}: each needs an "
            f"episode. Start at most {settings.meta_batch_size}, or raise meta_batch_size."
        )
    device = world.device(pick_device(settings.device))
    if settings.tensorboard:
        require_tensorboard()
    settings.inner_loop().require_shots(about["k_shot"])
    augmentation(settings.augment, about["image_shape"])  # raises if it is not for these images
    keep_large_buffers()
    learner = Learner(settings, data, about, device, start, network)
    _validation(learner, data, world)  # raises if there are too few episodes
    return learner


def _validation(learner: Learner, data: TrainData, world: World) -> Iterable[EpisodeBatch]:
    settings = learner.settings
    return data.eval(
        "val",
        settings.eval_episodes,
        settings.meta_batch_size,
        learner.device,
        normalize=bool(settings.normalize),
        rank=world.rank,
        world_size=world.world_size,
    )


@dataclass(frozen=True)
class _Run:
    """A run, as one of its processes sees it; its folder is locked.

    All processes hold the same weights at every step: they begin with those of the first one, and then each applies
    the same averaged gradient, bit for bit, by the same arithmetic. Validations check this.
    """

    learner: Learner
    data: TrainData
    about: dict[str, Any]
    stream: TrainStream
    recorder: Recorder
    world: World
    progress: Progress

    def steps(self, last: Checkpoint | None, stop: Stop) -> Checkpoint:
        """Take the outer steps after ``last``; gives the checkpoint of the last one, which is validated."""
        settings, learner, recorder, world = self.learner.settings, self.learner, self.recorder, self.world
        step = last.step if last else 0
        if self.due(step) and (last is None or last.accuracy is None):  # it was broken off, or steps has changed
            recorder.window = Window(step)
            last = self.validate(step, stop)
        with closing(endless(self.stream)) as batches:
            while step < settings.outer_steps:
                waited = Wait(learner.device)
                with world.together(stop):
                    if learner.device.type == "cpu":  # on a GPU this would wait, so the log line checks instead
                        recorder.window.require_finite()
                    batch = next(batches)
                    waited.end()

                logging = (step + 1) % settings.log_every == 0 or self.due(step + 1)
                share = len(batch.index) / settings.meta_batch_size if world.world_size > 1 else 1.0
                outcome = learner.gradient(batch, step, share, world, every_step=logging)
                recorder.window.add(batch, outcome, waited, share)  # before a clip can hide an infinite gradient
                learner.descend(outcome, step)
                step += 1
                del batch  # frees its memory while the next one is read

                if logging:
                    with world.together():
                        recorder.log()
                    recorder.window = Window(step)
                if self.due(step):
                    last = self.validate(step, stop)
                elif stop.agreed:
                    self.save(step)
                if stop.agreed and step < settings.outer_steps:
                    self.leave(step, stop)
        assert last is not None  # the last step is validated
        return last

    def due(self, step: int) -> bool:
        """Whether the run is validated after ``step`` outer steps."""
        settings = self.learner.settings
        return step >= settings.outer_steps or (step > 0 and step % settings.eval_every == 0)

    def validate(self, step: int, stop: Stop) -> Checkpoint:
        """Evaluate on the val split and save a checkpoint; on a signal save one without, and leave."""
        learner, world = self.learner, self.world
        world.require_same(learner.learned, f"The weights at step {step}")
        with world.together():
            batches = _validation(learner, self.data, world)
        batches = counting(batches, "val", learner.settings.eval_episodes, self.progress, world)
        start = time.perf_counter()
        inner, evaluation = learner.settings.inner_loop_at_test(), None
        if not stop.agreed:
            with suppress(StoppedError):
                evaluation = evaluate_network(
                    learner.network, batches, inner, self.about, "val", learner.parameters, world, stop
                )
        if evaluation is None:
            self.save(step)
            self.leave(step, stop, " It will be validated when the run is resumed.")
        with world.together():
            last = self.recorder.validated(step, evaluation, self.stream, time.perf_counter() - start)
        self.recorder.window = Window(step)  # validation is not timed
        return last

    def save(self, step: int) -> None:
        """Save a checkpoint that is not validated."""
        with self.world.together():
            self.recorder.save(step, self.stream)

    def leave(self, step: int, stop: Stop, left: str = "") -> NoReturn:
        """End the run on a signal, after ``step`` is saved.

        Args:
            step: the last outer step.
            stop: the signal.
            left: a sentence on what is still to be done for this step.
        """
        steps, place = self.learner.settings.outer_steps, self.recorder.run_dir
        raise StoppedError(f"Stopped by {stop.agreed}: step {reached(step, steps)} is saved in {place}.{left}")
