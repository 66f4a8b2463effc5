"""The training loop, in the order in which things happen."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mamldata.errors import RequestError
from trainer import metrics
from trainer.adapt import Parameters
from trainer.allocator import keep_large_buffers
from trainer.checkpoint import Checkpoint, find_best, save_checkpoint
from trainer.engines import loop
from trainer.evaluate import Evaluation, evaluate
from trainer.models import build_network
from trainer.protocol import TrainData, endless
from trainer.run import alone_in, begin_run, open_run
from trainer.settings import TrainSettings, pick_device


@dataclass(frozen=True)
class RunResult:
    """Where a run ended.

    Attributes:
        run_dir: its folder.
        step: outer steps done.
        accuracy: of the last validation, in [0, 1].
        best_step, best_accuracy: of the best validation.
        last, best: their checkpoints.
    """

    run_dir: Path
    step: int
    accuracy: float
    best_step: int
    best_accuracy: float
    last: Path
    best: Path


def train(
    settings: TrainSettings,
    data: TrainData,
    run_dir: Path | str,
    *,
    resume: bool = False,
    report: Callable[[str], object] = lambda _: None,
) -> RunResult:
    """Meta-train a network; what comes of it is in ``run_dir``.

    Killed at any moment and resumed, it ends with the weights, to the bit, that it would have ended with on the same
    CPU without the interruption.

    Args:
        settings: what to do.
        data: the episodes.
        run_dir: made if need be.
        resume: go on with the run in ``run_dir``; start it if there is nothing yet.
        report: told of the progress, a line at a time.

    Raises:
        RequestError: the settings, the data and the folder do not go together.
        MamldataError: training has diverged.
        DamagedError: a checkpoint that is needed is damaged.
        WriteError: ``run_dir`` cannot be written to.
    """
    run_dir = Path(run_dir)
    device = pick_device(settings.device)
    about = data.describe()
    network = _fresh_network(settings, about)  # before anything is written: the images may not fit it
    with alone_in(run_dir):
        return _train(settings, data, run_dir, about, network, device, resume=resume, report=report)


def _train(
    settings: TrainSettings,
    data: TrainData,
    run_dir: Path,
    about: dict[str, Any],
    network: nn.Module,
    device: torch.device,
    *,
    resume: bool,
    report: Callable[[str], object],
) -> RunResult:
    """The loop itself, with everything at hand and nobody else in the run folder."""
    checkpoint = open_run(run_dir, settings, about, resume=resume)
    if checkpoint and checkpoint.step >= settings.steps:
        report(f"{run_dir} is done: {checkpoint.step} of {settings.steps} steps.")
        return _result(run_dir, checkpoint)

    stream = data.train(settings.meta_batch_size, settings.seed, device, normalise=settings.normalise)
    begin_run(run_dir, settings, about, checkpoint)
    keep_large_buffers()
    network.to(device)
    parameters: Parameters = dict(network.named_parameters())
    optimizer = torch.optim.Adam(parameters.values(), lr=settings.meta_lr)
    step, best_step, best_accuracy = 0, 0, -1.0
    if checkpoint:
        network.load_state_dict(checkpoint.weights)
        optimizer.load_state_dict(checkpoint.optimizer)
        stream.load_state_dict(checkpoint.stream)
        step, best_step, best_accuracy = checkpoint.step, checkpoint.best_step, checkpoint.best_accuracy
        report(f"Going on after step {step} of {settings.steps}.")

    inner = settings.inner_loop()
    window = metrics.Window(step)
    with closing(endless(stream)) as batches:
        while step < settings.steps:
            asked = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - asked

            step += 1
            validating = step % settings.eval_every == 0 or step == settings.steps
            logging = step % settings.log_every == 0 or validating
            outcome = loop(network, parameters, batch, inner, every_step=logging)
            for name, parameter in parameters.items():
                parameter.grad = outcome.gradient[name]
            for group in optimizer.param_groups:
                group["lr"] = settings.meta_lr_at(step - 1)
            optimizer.step()
            window.add(batch, outcome, waited)
            del batch  # its memory can be used again while the next one is read

            if logging:
                row = window.sum_up()
                metrics.append(run_dir, {"event": "train", **row})
                report(_progress(row, settings))
            if validating:
                evaluation = _validate(network, settings, data, about, device, step)
                metrics.append(run_dir, {"event": "val", "step": step, **evaluation.to_json()})
                report(f"step {step}  val {evaluation}")
                if evaluation.accuracy > best_accuracy:
                    best_step, best_accuracy = step, evaluation.accuracy
                checkpoint = Checkpoint(
                    step=step,
                    accuracy=evaluation.accuracy,
                    best_step=best_step,
                    best_accuracy=best_accuracy,
                    settings=asdict(settings),
                    data=about,
                    weights=network.state_dict(),
                    optimizer=optimizer.state_dict(),
                    stream=stream.state_dict(),
                )
                save_checkpoint(run_dir, checkpoint)
            if logging:
                window = metrics.Window(step)  # only now, so that validation is not timed
    assert checkpoint is not None  # the last step validates
    return _result(run_dir, checkpoint)


def _fresh_network(settings: TrainSettings, about: dict[str, Any]) -> nn.Module:
    height, width, channels = about["image_shape"]
    if height != width:
        raise RequestError(f"The networks take square images, and these have {height}x{width} pixels.")
    return build_network(settings.network, channels, height, about["n_way"], settings.seed)


def _validate(
    network: nn.Module, settings: TrainSettings, data: TrainData, about: dict[str, Any], device: torch.device, step: int
) -> Evaluation:
    batches = data.eval("val", settings.eval_episodes, settings.meta_batch_size, device, normalise=settings.normalise)
    evaluation = evaluate(network, batches, settings.inner_loop_at_test(), about, "val")
    metrics.require_finite(evaluation.loss, f"The validation loss at step {step}")
    return evaluation


def _progress(row: dict[str, Any], settings: TrainSettings) -> str:
    before = row["accuracy_by_step"][0]
    return (
        f"step {row['step']}/{settings.steps}  loss {row['loss']:.4f}  "
        f"accuracy {100 * before:.1f} → {100 * row['accuracy']:.1f} %  {row['ms_per_step']:.0f} ms/step  "
        f"{row['images_per_second']:,.0f} images/s  data wait {row['data_wait_percent']:.1f} %"
    )


def _result(run_dir: Path, last: Checkpoint) -> RunResult:
    return RunResult(
        run_dir=run_dir,
        step=last.step,
        accuracy=last.accuracy,
        best_step=last.best_step,
        best_accuracy=last.best_accuracy,
        last=run_dir / last.name,
        best=find_best(run_dir),
    )
