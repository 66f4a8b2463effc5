"""The sinusoid problem of Finn et al. 2017, section 5.1: MAML against joint training, FOMAML and no prior training.

    python examples/sinusoid.py --steps 70000 --out sinusoid.png

Some points of a sinusoid are given, and the whole curve must be predicted; amplitudes and phases vary. A network
trained on all sinusoids jointly learns their mean, and a few points do not move it far. MAML learns weights from which
one gradient step comes close to any sinusoid, even away from the points.
Needs matplotlib: pip install '.[plots]'.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import matplotlib
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mamldata.streaming.batch import EpisodeBatch
from trainer.evaluation import measure_together
from trainer.maml.adapt import adapt, query_logits
from trainer.maml.algorithms import InnerLoop, Order
from trainer.maml.engines import vmap
from trainer.maml.parameters import Episode, episodes, meta_parameters
from trainer.maml.variants import method_of
from trainer.networks.networks import mlp
from trainer.sinusoid import Sinusoids

TRAIN, VAL, TEST = (Sinusoids(seed=0), Sinusoids(seed=1, k_query=100), Sinusoids(seed=2, k_query=100))
TASKS = 25  # in a meta-batch
SHOWN = 97  # the test task in the picture: far from the mean, with its first five points on one side
INNER = InnerLoop(steps=1, lr=0.01, order="second", bn="transductive", task_loss="squared-error")
RATES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)  # networks without an inner loop in training get the best one


def meta_train(steps: int, order: Order = "second") -> nn.Module:
    """MAML, or FOMAML at first order: one inner step on ten points, and the outer loss on ten others."""
    network = mlp(seed=0)
    parameters, method = meta_parameters(network, INNER), method_of(network, replace(INNER, order=order), "vmap")
    optimizer = torch.optim.Adam(parameters.tensors(), lr=1e-3)
    for step in range(steps):
        outcome = vmap(network, parameters, TRAIN.batch(TASKS * step, TASKS), method)
        for parameter, gradient in zip(parameters.tensors(), outcome.gradient.tensors(), strict=True):
            parameter.grad = gradient
        optimizer.step()
    return network


def train_jointly(steps: int) -> nn.Module:
    """The baseline: the same network on the same points, as if all came from one function."""
    network = mlp(seed=0)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for step in range(steps):
        batch = TRAIN.batch(TASKS * step, TASKS)
        x, y = torch.cat([batch.support_x, batch.query_x], 1), torch.cat([batch.support_y, batch.query_y], 1)
        optimizer.zero_grad()
        F.mse_loss(network(x.flatten(0, 1)), y.flatten(0, 1)).backward()
        optimizer.step()
    return network


def errors(network: nn.Module, batch: EpisodeBatch, lr: float, points: int) -> Tensor:
    """Squared errors ``[tasks, 11]``: before and after each of ten steps on the first ``points`` of each task."""
    parameters, inner = meta_parameters(network, INNER), replace(INNER, steps=10, lr=lr)
    batch = batch._replace(support_x=batch.support_x[:, :points], support_y=batch.support_y[:, :points])
    return measure_together(network, parameters, batch, inner)[:, 1:]


def best_rate(network: nn.Module) -> float:
    """The rate with the smallest error after ten steps on ten points of validation tasks."""
    batch = VAL.batch(0, 200)
    found = {rate: errors(network, batch, rate, points=10)[:, -1].mean().nan_to_num(torch.inf).item() for rate in RATES}
    return min(found, key=found.__getitem__)


def draw(panel: matplotlib.axes.Axes, network: nn.Module, task: Episode, lr: float) -> None:
    """Draw one network on one task: before adaptation, and after one and ten steps."""
    x = torch.linspace(-5, 5, 200)[:, None]
    method = method_of(network, replace(INNER, steps=10, lr=lr))
    with torch.no_grad():
        path = adapt(network, meta_parameters(network, INNER), task, method)
        lines = [query_logits(network, path[i], task._replace(query_x=x), method).flatten() for i in (0, 1, 10)]
    order = task.query_x.flatten().argsort()
    panel.plot(task.query_x.flatten()[order], task.query_y.flatten()[order], color="tab:red", label="the sinusoid")
    for line, style, name in zip(lines, (":", "--", "-"), ("before", "1 step", "10 steps"), strict=True):
        panel.plot(x.flatten(), line, style, color="tab:green", label=name)
    panel.plot(task.support_x.flatten(), task.support_y.flatten(), "^", color="tab:purple", label="points given")


def main() -> None:
    """Train, print a table and draw a picture of MAML and joint training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000, help="outer steps of each (the released code: 70,000)")
    parser.add_argument("--tasks", type=int, default=600, help="new sinusoids to measure on")
    parser.add_argument("--out", type=Path, default=Path("sinusoid.png"), help="the picture")
    options = parser.parse_args()

    torch.set_num_threads(1)  # in a network this small, threads would mostly wait for one another
    maml, joint, fresh = meta_train(options.steps), train_jointly(options.steps), mlp(seed=0)
    trained = [("MAML", maml, INNER.lr), ("joint training", joint, best_rate(joint))]
    others = [("FOMAML", meta_train(options.steps, "first"), INNER.lr), ("random", fresh, best_rate(fresh))]

    batch = TEST.batch(0, options.tasks)
    print(f"squared error at 100 points of {options.tasks} new sinusoids, {options.steps} outer steps, 95 % intervals:")
    for name, network, lr in trained + others:
        for points in (5, 10):
            table = errors(network, batch, lr, points)
            means, deviations = table.mean(0), table.std(0)
            cells = [f"{means[i]:.3f} ± {1.96 * deviations[i] / len(table) ** 0.5:.3f}" for i in (0, 1, 10)]
            print(f"{name}, {points} points, rate {lr}: before {cells[0]}, 1 step {cells[1]}, 10 steps {cells[2]}")

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(2, 2, figsize=(10, 6.5), sharex=True, sharey=True, layout="constrained")
    task = next(episodes(TEST.batch(SHOWN, 1)))
    for row, (name, network, lr) in zip(panels, trained, strict=True):
        for panel, points in zip(row, (5, 10), strict=True):
            some = task._replace(support_x=task.support_x[:points], support_y=task.support_y[:points])
            draw(panel, network, some, lr)
            panel.set_title(f"{name}, {points} points, inner rate {lr}")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.savefig(options.out, dpi=120)
    print(f"picture: {options.out}")


if __name__ == "__main__":
    main()
