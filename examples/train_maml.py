"""MAML (Finn et al. 2017) in plain PyTorch, from an archive to its test accuracy, in one file to read and change.

    mamldata fetch omniglot && mamldata build omniglot --out omniglot-5w1s
    OMP_NUM_THREADS=1 python examples/train_maml.py omniglot-5w1s --steps 600

gives 83.02 ± 0.73 % on 600 test episodes, 5-way 1-shot, in two minutes of one processor's time.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor
from torch.func import grad, grad_and_value
from torch.nn import functional as F

import mamldata

Weights = dict[str, Tensor]
Task = tuple[Tensor, Tensor, Tensor, Tensor]  # support images and labels, query images and labels
BLOCKS, FILTERS = 4, 64
TASKS = 4  # in a meta-batch
INNER_LR, TRAIN_STEPS, TEST_STEPS = 0.4, 1, 3


def fresh_weights(channels: int, n_way: int) -> Weights:
    """Weights of four 3x3 convolutions, each with the scale and shift of its batch norm, and of a linear head."""
    weights = {}
    for i in range(BLOCKS):
        weights[f"kernel{i}"] = torch.empty(FILTERS, channels if i == 0 else FILTERS, 3, 3)
        weights[f"scale{i}"], weights[f"shift{i}"] = torch.ones(FILTERS), torch.zeros(FILTERS)
    weights["head"], weights["head_bias"] = torch.empty(n_way, FILTERS), torch.zeros(n_way)
    for value in weights.values():
        if value.ndim > 1:
            torch.nn.init.xavier_uniform_(value)
    return weights


def logits(weights: Weights, x: Tensor) -> Tensor:
    """Images ``[N, C, H, W]`` to logits ``[N, n_way]``; batch norm uses the statistics of these N images only."""
    for i in range(BLOCKS):
        x = F.conv2d(x, weights[f"kernel{i}"], stride=2, padding=1)
        x = F.relu(F.batch_norm(x, None, None, weights[f"scale{i}"], weights[f"shift{i}"], training=True))
    return F.linear(x.mean((2, 3)), weights["head"], weights["head_bias"])


def loss(weights: Weights, x: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy in nats."""
    return F.cross_entropy(logits(weights, x), y)


def adapt(weights: Weights, x: Tensor, y: Tensor, steps: int) -> Weights:
    """The inner loop: gradient descent on the support set; differentiable."""
    for _ in range(steps):
        slopes = grad(loss)(weights, x, y)
        weights = {name: value - INNER_LR * slopes[name] for name, value in weights.items()}
    return weights


def meta_loss(weights: Weights, task: Task, steps: int) -> tuple[Tensor, Tensor]:
    """Loss and accuracy on the query set after adaptation to the support set."""
    support_x, support_y, query_x, query_y = task
    answers = logits(adapt(weights, support_x, support_y, steps), query_x)
    return F.cross_entropy(answers, query_y), (answers.argmax(1) == query_y).float().mean()


def tasks_of(batch: mamldata.EpisodeBatch) -> list[Task]:
    """The episodes of a meta-batch, one by one."""
    return list(zip(*batch[:4], strict=True))


def train(archive: str, steps: int, device: str) -> Weights:
    """The outer loop: Adam on the gradient of each meta-batch's loss, with a rate that falls to a hundredth."""
    stream = mamldata.EpisodeStream(archive, batch_size=TASKS, seed=0, remix=True)
    initial = fresh_weights(stream.info.image_shape[-1], stream.info.n_way)
    weights = {name: value.to(device) for name, value in initial.items()}
    optimizer = torch.optim.Adam(weights.values(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=1e-5)
    step = 0
    while step < steps:
        for batch in stream.to(device):  # an epoch, with remix of new episodes each time
            optimizer.zero_grad()
            found = []
            for task in tasks_of(batch):
                # Differentiates through the inner loop: torch.func can nest grad.
                slopes, result = grad_and_value(meta_loss, has_aux=True)(weights, task, TRAIN_STEPS)
                found.append(torch.stack(result))
                for name, weight in weights.items():
                    mean = slopes[name] / TASKS
                    weight.grad = mean if weight.grad is None else weight.grad + mean
            optimizer.step()
            schedule.step()
            step += 1
            if step % 100 == 0 or step == steps:
                value, accuracy = torch.stack(found).mean(0)
                print(f"step {step}: loss {value:.3f}, accuracy {100 * accuracy:.1f} %", flush=True)
            if step == steps:
                break
    return weights


def test(archive: str, weights: Weights, device: str) -> Tensor:
    """The accuracy of every test episode, after adapting to each separately."""
    stream = mamldata.EpisodeStream(archive, split="test").to(device)  # every episode once, in order
    return torch.stack([meta_loss(weights, task, TEST_STEPS)[1] for batch in stream for task in tasks_of(batch)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive")
    parser.add_argument("--steps", type=int, default=600)
    options = parser.parse_args()
    torch.manual_seed(0)
    place, start = "cuda" if torch.cuda.is_available() else "cpu", time.process_time()
    rates = test(options.archive, train(options.archive, options.steps, place), place)
    interval = 1.96 * rates.std() / len(rates) ** 0.5
    print(f"test accuracy {100 * rates.mean():.2f} ± {100 * interval:.2f} % ({len(rates)} episodes)")
    print(f"{time.process_time() - start:.0f} s of processor time")
