"""A network of one's own trains, resumes and loads as the trainer's networks do, and is refused with the reason."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from problems import batch, fill, loop, run, small_convnet
from synthetic import Synthetic
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import trainer
from mamldata.errors import RequestError
from mamldata.streaming.batch import EpisodeBatch
from trainer.maml.algorithms import BN_MODES, ORDERS, InnerLoop
from trainer.maml.choice import FirstThatWorks
from trainer.maml.engines import ENGINES
from trainer.maml.joint import joint, joint_parameters
from trainer.maml.parameters import adapted_names, episodes, meta_parameters
from trainer.maml.variants import method_of
from trainer.networks.networks import norm_names
from trainer.networks.own import OwnNetwork
from trainer.runs.checkpoint import find_last, load_checkpoint

BASE = InnerLoop(steps=2, lr=0.1, order="second", bn="transductive")
SETTINGS = trainer.TrainSettings(
    steps=4, meta_batch_size=2, eval_every=2, eval_episodes=2, log_every=2, device="cpu", inner_lr=0.1
)


def conv(norm: type[nn.Module] = nn.BatchNorm2d, **options: object) -> nn.Module:
    body = [nn.Conv2d(1, 4, 3, bias=False), norm(4, **options), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def perceptron(norm: type[nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 7), norm(7), nn.Tanh(), nn.Linear(7, 3))


KINDS = {
    "conv, BatchNorm2d": conv,
    "conv, BatchNorm2d without scale": lambda: conv(affine=False),
    "conv, InstanceNorm2d": lambda: conv(nn.InstanceNorm2d, affine=True),
    "MLP, LayerNorm": lambda: perceptron(nn.LayerNorm),
    "MLP, BatchNorm1d": lambda: perceptron(nn.BatchNorm1d),
}


def plain_gradient(module: nn.Module, tasks: EpisodeBatch, inner: InnerLoop) -> dict[str, Tensor]:
    """The meta-gradient by nothing but the module itself, in training mode, and torch's autograd."""
    weights = dict(module.named_parameters())
    total = torch.zeros((), dtype=torch.float64)
    for episode in episodes(tasks):
        fast = weights
        for _ in range(inner.steps):
            loss = F.cross_entropy(functional_call(module, fast, (episode.support_x,)), episode.support_y)
            second = inner.order == "second"
            slopes = torch.autograd.grad(loss, list(fast.values()), create_graph=second, retain_graph=True)
            fast = {name: fast[name] - inner.lr * slope for name, slope in zip(fast, slopes, strict=True)}
        total = total + F.cross_entropy(functional_call(module, fast, (episode.query_x,)), episode.query_y)
    slopes = torch.autograd.grad(total / len(tasks.index), list(weights.values()))
    return dict(zip(weights, slopes, strict=True))


@pytest.mark.parametrize("engine", ["loop", "vmap"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", KINDS)
def test_its_meta_gradient_is_that_of_plain_autograd(kind: str, order, engine: str) -> None:
    """In float64, of the module as it is, whatever its norms; and the module is not changed."""
    module = fill(KINDS[kind]())
    before, inner = copy.deepcopy(module.state_dict()), replace(BASE, order=order)
    network = OwnNetwork(module).double()
    found = run(engine, network, meta_parameters(network, inner), batch(), inner).gradient.weights
    assert all(map(torch.equal, before.values(), module.state_dict().values()))
    for name, slope in plain_gradient(module, batch(), inner).items():
        torch.testing.assert_close(found[f"module.{name}"], slope, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("adapts", ["all", "head"])
@pytest.mark.parametrize("bn", BN_MODES)
def test_its_batch_norm_is_the_trainers(bn, adapts) -> None:
    """In every mode the same gradient as of the same network among the trainer's own."""
    ours, theirs = small_convnet(), nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Conv2d(4, 3, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3)),
    ).double()  # fmt: skip
    head, head_bias, *blocks = dict(ours.named_parameters())
    names = dict(zip(dict(theirs.named_parameters()), [*blocks, head, head_bias], strict=True))
    values = dict(ours.named_parameters())
    theirs.load_state_dict({name: values[own] for name, own in names.items()}, strict=False)
    inner, network = replace(BASE, bn=bn, adapts=adapts), OwnNetwork(theirs)
    expected, found = (loop(one, meta_parameters(one, inner), batch(), inner).gradient for one in (ours, network))
    for part in ("weights", "norms"):
        there, here = getattr(expected, part), getattr(found, part)
        assert len(there) == len(here)
        for name, slope in here.items():
            torch.testing.assert_close(slope, there[names[name.removeprefix("module.")]], rtol=1e-9, atol=1e-12)


class Named(nn.Module):
    """Its head is not its last linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.norm, self.first = nn.Linear(5, 3), nn.BatchNorm1d(5), nn.Linear(36, 5)
        self.twice = self.norm

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.twice(self.norm(self.first(x.flatten(1)))))


def test_its_parts_are_known() -> None:
    """The head is called so, or else is the last linear layer; the norms are its batch norms, a shared one once."""
    network, head = OwnNetwork(Named()), replace(BASE, adapts="head")
    assert adapted_names(network, head) == ["module.head.weight", "module.head.bias"]
    assert norm_names(network) == ["module.norm.weight", "module.norm.bias"]
    assert adapted_names(OwnNetwork(conv()), head) == ["module.6.weight", "module.6.bias"]
    headless = OwnNetwork(nn.Sequential(nn.Conv2d(1, 3, 6), nn.Flatten()))
    with pytest.raises(RequestError, match=r"has no nn.Linear. Let its head be a submodule with the name head"):
        adapted_names(headless, head)


def test_parameters_without_gradients_are_constants(tmp_path: Path) -> None:
    """A body that is frozen learns nothing, in the inner or the outer loop, and is saved with the rest."""
    module = conv().requires_grad_(False)
    module[-1].requires_grad_()
    trainer.train(SETTINGS, Synthetic(n_way=3), tmp_path, network=module)
    learned = trainer.load_run(tmp_path, network=conv()).network.module
    assert torch.equal(learned[0].weight, module[0].weight)
    assert not torch.equal(learned[-1].weight, module[-1].weight)


def counting() -> nn.Module:
    return nn.Sequential(nn.InstanceNorm2d(1, track_running_stats=True), nn.Flatten(), nn.Linear(144, 5))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.linear = nn.Parameter(torch.ones(1)), nn.Linear(144, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.batch_norm(x, None, None, self.scale, None, training=True).flatten(1))


def flat(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), *layers)


REFUSED = {
    "draws random numbers .dropout.., .* Call its eval": lambda: flat(nn.Dropout(0.1), nn.Linear(144, 5)),
    "changes its buffer 0.running_mean when it is called": counting,
    r"must give torch.float32 logits of shape \[N, n_way\], here \[5, 5\], but .* \[5, 3\]": lambda: flat(
        nn.Linear(144, 3)
    ),
    r"fails with an input of shape \[5, 1, 12, 12\]: .* shapes cannot be multiplied": lambda: flat(nn.Linear(36, 5)),
    "it calls F.batch_norm. Use nn.BatchNorm2d": Functional,
    "batch norm 0 has eps 0.1. Only 1e-05 works": lambda: nn.Sequential(nn.BatchNorm2d(1, eps=0.1)),
    "1.weight has no shape yet. Call the network on an example": lambda: flat(nn.LazyLinear(5)),
    "must be a torch.nn.Module, such as a function returns, not <function flat": lambda: flat,
    "no parameter that requires gradients": lambda: flat(nn.Linear(144, 5).requires_grad_(False)),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_train_is_refused(reason: str, tmp_path: Path) -> None:
    """Before anything is written."""
    with pytest.raises(RequestError, match=reason):
        trainer.train(SETTINGS, Synthetic(), tmp_path / "run", network=REFUSED[reason]())
    assert not (tmp_path / "run").exists()


def test_dropout_that_is_switched_off_trains(tmp_path: Path) -> None:
    """By eval(), as its refusal says."""
    module = flat(nn.Dropout(0.5), nn.Linear(144, 5)).eval()
    assert trainer.train(SETTINGS, Synthetic(), tmp_path, network=module).step == 4


class Buffered(nn.Module):
    """With random features that are no parameters, and whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("features", torch.randn(16, 144))
        self.register_buffer("order", torch.randperm(16))
        self.norm, self.fc = nn.BatchNorm1d(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(torch.tanh(x.view(len(x), -1) @ self.features.T)))


class Viewing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1)


def test_it_may_view_images() -> None:
    """Those of a stream are channels-last in memory, where ``view`` is an error."""
    images = torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last)
    network = OwnNetwork(nn.Sequential(Viewing(), nn.Linear(48, 5)))
    assert torch.equal(network(images), network(images.contiguous()))


def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    """With the weights and buffers of the run, whatever those of the module that is given again; it is recorded."""
    torch.manual_seed(0)
    first = Buffered()
    constant = replace(SETTINGS, meta_schedule="constant")
    trainer.train(replace(constant, steps=2), Synthetic(), tmp_path / "a", network=first)
    trainer.train(constant, Synthetic(), tmp_path / "b", network=first)
    trainer.train(constant, Synthetic(), tmp_path / "a", network=Buffered(), resume=True)
    a, b = (load_checkpoint(find_last(tmp_path / name)) for name in "ab")
    assert a.weights.keys() == b.weights.keys()
    assert all(map(torch.equal, a.weights.values(), b.weights.values()))
    assert json.loads((tmp_path / "a" / "config.json").read_text())["settings"]["network"] == f"{__name__}:Buffered"
    assert a.step == b.step == 4


def test_loading_needs_the_network_again(tmp_path: Path) -> None:
    """A run names it, and imports nothing: it must be given, must fit, and must not be given to another run."""
    own, other = tmp_path / "own", tmp_path / "other"
    module = flat(nn.Linear(144, 8), nn.BatchNorm1d(8), nn.Linear(8, 5))
    trainer.train(SETTINGS, Synthetic(), own, network=module)
    trainer.train(SETTINGS, Synthetic(), other)
    for load in (trainer.load_run, lambda place, **more: trainer.evaluate(place, Synthetic(), episodes=2, **more)):
        with pytest.raises(
            RequestError, match=r"torch.nn.modules.container:Sequential, is code of the user's, which is"
        ):
            load(own)
        with pytest.raises(RequestError, match=r"The network of this run is conv4. Leave out the network of your own"):
            load(other, network=module)
        with pytest.raises(
            RequestError, match=r"module.2.bias, module.2.weight differ in .*A network of your own must be the"
        ):
            load(own, network=flat(nn.Linear(144, 8), nn.ReLU(), nn.Linear(8, 5)))
        assert load(own, network=module)
    with pytest.raises(RequestError, match=r"torch.nn.modules.container:Sequential, is code of the user's, which is"):
        trainer.train(SETTINGS, Synthetic(), own, resume=True)
    with pytest.raises(RequestError, match="filters is not for the network"):
        trainer.train(replace(SETTINGS, filters=8), Synthetic(), tmp_path / "new", network=module)


def test_it_pretrains_with_a_wide_head() -> None:
    """The joint gradient is that of a classifier of all classes whose body is the module's."""
    module = fill(conv())
    network = OwnNetwork(module)
    parameters = joint_parameters(network, network.widened(9, seed=0))
    assert [tuple(value.shape) for value in parameters.joint.values()] == [(9, 4), (9,)]
    tasks, classes = batch(), torch.arange(9).view(3, 3)
    doubled = parameters.like(value.detach().double().requires_grad_() for value in parameters.tensors())
    found = joint(network, doubled, tasks, classes).gradient
    wide = copy.deepcopy(module)
    wide[-1] = nn.Linear(4, 9).double()
    wide[-1].load_state_dict({name.rpartition(".")[2]: value for name, value in parameters.joint.items()})
    x = torch.cat([tasks.support_x.flatten(0, 1), tasks.query_x.flatten(0, 1)])
    y = torch.cat([classes.gather(1, part).flatten() for part in (tasks.support_y, tasks.query_y)])
    slopes = torch.autograd.grad(F.cross_entropy(wide(x), y), list(wide.parameters()))
    for slope, same in zip(slopes, found.tensors(), strict=True):
        torch.testing.assert_close(same, slope, rtol=1e-9, atol=1e-12)


def test_an_engine_that_lacks_an_operation_gives_way() -> None:
    """Where the engine is chosen by itself, the next one takes over, and says so."""

    def lacks(*_: object, **__: object) -> None:
        raise RuntimeError("vmap: no batching rule")

    network = OwnNetwork(fill(conv()))
    engine = FirstThatWorks({"vmap": lacks, "loop": ENGINES["loop"]})
    with pytest.warns(UserWarning, match="engine vmap does not work here, loop does: vmap: no batching rule"):
        engine(network, meta_parameters(network, BASE), batch(), method_of(network, BASE))


def test_embeddings_are_the_inputs_of_the_head(tmp_path: Path) -> None:
    """Of a network of one's own as of the trainer's: the head makes the logits of them."""
    images = torch.rand(6, 1, 12, 12)
    for name, module in (("own", flat(nn.Linear(144, 8), nn.BatchNorm1d(8), nn.Linear(8, 5))), ("ours", None)):
        trainer.train(replace(SETTINGS, filters=None if module else 4), Synthetic(), tmp_path / name, network=module)
        loaded = trainer.load_run(tmp_path / name, network=module)
        embedded = loaded.embed(images)
        weight, bias = list(loaded.network.parameters())[-2:] if module else (
            loaded.network.head, loaded.network.head_bias
        )  # fmt: skip
        torch.testing.assert_close(F.linear(embedded, weight, bias), loaded.network(images))
        assert not embedded.requires_grad
