"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mamldata.errors import RequestError, StoppedError
from mamldata.progress import Notify, silence
from mamldata.streaming.batch import EpisodeBatch
from trainer.evaluation import evaluate_network
from trainer.learner import Learner
from trainer.maml.rates import rate_lines
from trainer.protocol import TrainData, TrainStream, endless
from trainer.recorder import Recorder
from trainer.runs.checkpoint import Checkpoint
from trainer.runs.folder import RunResult, alone_in, open_run, require_agreement, run_result
from trainer.runs.metrics import Window
from trainer.runs.tensorboard import require_tensorboard
from trainer.settings import TrainSettings, pick_device
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
    notify: Notify = silence,
    world: World = ALONE,
) -> RunResult:
    """Meta-train a network and write the run into ``run_dir``.

    A run that is killed at any moment and resumed ends with the same weights, bit for bit, as without the
    interruption (on the same CPU). SIGTERM, SIGUSR1 and, in one process, the first SIGINT end it with a checkpoint
    after the current outer step.

    Args:
        settings: of the run.
        data: the episodes.
        run_dir: created if missing.
        resume: continue the run in ``run_dir``, or start it if there is none.
        notify: receives progress lines and, on a CPU, the number of threads.
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
    run_dir = Path(run_dir)
    notify = notify if world.first else silence
    with world.together():
        about = data.describe()
        learner = _fit_to_train(settings, data, about, world)  # before anything is written
    require_agreement(world, settings, about)
    with stop_at_signals(keyboard=world.world_size == 1) as stop, ExitStack() as held:
        with world.together():
            if world.first:
                held.enter_context(alone_in(run_dir))
        threads = held.enter_context(limited_threads())
        # One process looks for the last checkpoint, and all resume from that one, wherever they run.
        last = world.from_first(lambda: open_run(run_dir, settings, about, resume=resume))
        if last and last.step >= settings.outer_steps and last.accuracy is not None:
            notify(f"{run_dir} is done: {last.step} of {settings.outer_steps} steps.")
            return run_result(run_dir, last, world)
        with world.together():
            stream = data.train(
                settings.meta_batch_size,
                settings.seed,
                learner.device,
                normalize=settings.normalize,
                rank=world.rank,
                world_size=world.world_size,
            )
            if last:
                learner.load(last.weights, last.optimizer, run_dir / last.name)
                stream.load_state_dict(last.stream)
            recorder = Recorder(run_dir, learner, about, writes=world.first, notify=notify, last=last)
            held.enter_context(recorder)
        world.spread_(learner.learned)
        if learner.device.type == "cpu":
            notify(f"Computing with {threads}.")
        run = _Run(learner, data, about, stream, recorder, world)
        step = last.step if last else 0
        last = run.steps(step, stop) if step < settings.outer_steps else run.validate(step)
        for line in rate_lines(learner.parameters, settings.point.rates):
            notify(line)
        return run_result(run_dir, last, world)


def _fit_to_train(settings: TrainSettings, data: TrainData, about: dict[str, Any], world: World) -> Learner:
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
    keep_large_buffers()
    learner = Learner(settings, data, about, device)
    _validation(learner, data, world)  # raises if there are too few episodes
    return learner


def _validation(learner: Learner, data: TrainData, world: World) -> Iterable[EpisodeBatch]:
    settings = learner.settings
    return data.eval(
        "val",
        settings.eval_episodes,
        settings.meta_batch_size,
        learner.device,
        normalize=settings.normalize,
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

    def steps(self, step: int, stop: Stop) -> Checkpoint:
        """Take the outer steps after ``step``; gives the checkpoint of the last one, which is validated."""
        settings, learner, recorder, world = self.learner.settings, self.learner, self.recorder, self.world
        with closing(endless(self.stream)) as batches:
            while step < settings.steps:
                waited = Wait(learner.device)
                with world.together(stop):
                    if learner.device.type == "cpu":  # on a GPU this would wait, so the log line checks instead
                        recorder.window.require_finite()
                    batch = next(batches)
                    waited.end()

                validating = (step + 1) % settings.eval_every == 0 or step + 1 == settings.steps
                logging = (step + 1) % settings.log_every == 0 or validating
                share = len(batch.index) / settings.meta_batch_size if world.world_size > 1 else 1.0
                outcome = learner.gradient(batch, step, share, world, every_step=logging)
                recorder.window.add(batch, outcome, waited, share)  # before a clip can hide an infinite gradient
                learner.descend(outcome, step)
                step += 1
                del batch  # frees its memory while the next one is read

                if logging:
                    with world.together():
                        recorder.log()
                if validating:
                    last = self.validate(step)
                if logging:
                    recorder.window = Window(step)  # after validation, which is not timed
                if stop.agreed and step < settings.steps:
                    if not validating:
                        with world.together():
                            recorder.save(step, self.stream)
                    raise StoppedError(
                        f"Stopped by {stop.agreed}: step {step} of {settings.steps} is saved in {recorder.run_dir}."
                    )
        return last

    def validate(self, step: int) -> Checkpoint:
        """Evaluate on the val split and save a checkpoint."""
        learner, world = self.learner, self.world
        world.require_same(learner.learned, f"The weights at step {step}")
        with world.together():
            batches = _validation(learner, self.data, world)
        start = time.perf_counter()
        inner = learner.settings.inner_loop_at_test()
        evaluation = evaluate_network(learner.network, batches, inner, self.about, "val", learner.parameters, world)
        with world.together():
            return self.recorder.validated(step, evaluation, self.stream, time.perf_counter() - start)
