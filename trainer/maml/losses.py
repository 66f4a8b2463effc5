"""The losses of the inner and the outer loop, and the scores that are reported."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from trainer.maml.algorithms import InnerLoop, TaskLoss


def loss_of(answers: Tensor, truth: Tensor, task_loss: TaskLoss) -> Tensor:
    """The mean over a set of images or points, a scalar: cross-entropy in nats, or the squared error."""
    return F.cross_entropy(answers, truth) if task_loss == "cross-entropy" else F.mse_loss(answers, truth)


def inner_loss_of(logits: Tensor, labels: Tensor, inner: InnerLoop) -> Tensor:
    """The loss of a support set that an inner step descends on, a scalar; see ``InnerLoop.inner_loss``.

    ``class-sum`` is the scale of https://github.com/cbfinn/maml, whose ``xent`` in ``utils.py`` is a vector of each
    image's loss divided by the number of shots; TensorFlow's gradient of a vector is that of its sum.
    """
    loss = loss_of(logits, labels, inner.task_loss)
    return loss * logits.shape[1] if inner.inner_loss == "class-sum" else loss


def score_of(answers: Tensor, truth: Tensor, task_loss: TaskLoss) -> Tensor:
    """The reported score, a scalar without a graph: the accuracy of classes, or the mean squared error of numbers."""
    answers = answers.detach()
    return accuracy(answers, truth) if task_loss == "cross-entropy" else loss_of(answers, truth, task_loss)


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of correct answers in [0, 1]: a float32 scalar on the device, so that the CPU does not wait for it."""
    return (logits.argmax(1) == labels).float().mean()
