from __future__ import annotations

import math
import re
import runpy
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from mamldata.errors import RequestError
from trainer.maml.algorithms import (
    ADAPTS,
    ALGORITHMS,
    BN_MODES,
    INNER_LOSSES,
    LOSSES,
    ORDERS,
    RATES,
    Adapts,
    Algorithm,
    BatchNorm,
    InnerLoop,
    InnerLoss,
    Loss,
    Order,
    Rates,
)
from trainer.maml.engines import ENGINES
from trainer.networks.networks import NETWORKS, draw_weights
from trainer.networks.precision import PRECISIONS
from trainer.settings import (
    CHANGEABLE,
    COORDINATES,
    OLD_NAMES,
    SETTINGS,
    Setting,
    TrainSettings,
    pick_device,
    saved_settings,
)

DOCS = Path(__file__).parents[2] / "docs"


def test_the_cosine_schedule_falls_to_a_hundredth() -> None:
    """It begins at ``meta_lr``, is in the middle half-way, and ends near to a hundredth; constant stays."""
    settings = TrainSettings(steps=100, meta_lr=0.2)
    rates = [settings.meta_lr_at(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[50] == pytest.approx((0.2 + 0.002) / 2)
    assert rates[100] == pytest.approx(0.002)
    assert rates == sorted(rates, reverse=True)
    assert {TrainSettings(meta_schedule="constant").meta_lr_at(step) for step in (0, 7, 3999)} == {4e-3}


def test_filters_are_for_networks_that_have_the_choice() -> None:
    """Not for torchvision's, and at least one."""
    assert TrainSettings(filters=48).filters == 48
    with pytest.raises(RequestError, match="filters is not for the network resnet18"):
        TrainSettings(network="resnet18", filters=48)
    with pytest.raises(RequestError, match="filters must be at least 1, not 0"):
        TrainSettings(filters=0)


@pytest.mark.parametrize("name", [name for name, one in SETTINGS.items() if one.kind == "float"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e39, 1e300, 10**39])
def test_numbers_that_no_computation_bears(name: str, value: float) -> None:
    """Every setting that is a number with a fraction is finite, and small enough for float32."""
    with pytest.raises(RequestError, match=f"{name} must be (a positive number|at most [0-9e+]+), not "):
        TrainSettings(**{name: value})  # type: ignore[arg-type]


def test_bounds_are_of_numbers() -> None:
    """A bound alone lets through neither infinity nor what is no number."""
    one = Setting("x", "float", 1.0, "", at_least=0)
    assert [one.fault(value) for value in (0, 0.5)] == [None, None]
    assert {one.fault(value) for value in (math.nan, math.inf, -math.inf)} == {"a finite number"}
    assert one.fault(-1) == "at least 0"


@pytest.mark.parametrize("name", [name for name, one in SETTINGS.items() if one.at_most is not None])
def test_beyond_the_largest_value(name: str) -> None:
    """It is refused in words, as a billion filters are, for which no memory suffices."""
    most = SETTINGS[name].at_most
    TrainSettings(**{name: most, "support_batches": 1})  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=f"{name} must be at most {re.escape(str(most))}, not "):
        TrainSettings(**{name: most * 2})  # type: ignore[arg-type,operator]


def test_every_coordinate_reaches_the_inner_loop() -> None:
    """All parts of an algorithm are settings, and those that an inner loop has are passed to it."""
    assert set(COORDINATES) == {part.name for part in fields(Algorithm)} - {"name", "outer", "classifier"}
    assert set(COORDINATES) <= SETTINGS.keys()
    for name in {part.name for part in fields(InnerLoop)} & set(COORDINATES):
        for choice in SETTINGS[name].choices:
            assert getattr(TrainSettings(**{name: choice}).inner_loop(), name) == choice  # type: ignore[arg-type]


def test_the_inner_rate_suits_the_batch_norm() -> None:
    """With frozen statistics 0.4 diverges, so it is 0.05 there; what is given stays."""
    assert TrainSettings().inner_loop().lr == TrainSettings(bn="support").resolved()["inner_lr"] == 0.4
    assert (
        TrainSettings(bn="frozen").inner_loop_at_test().lr == TrainSettings(bn="frozen").resolved()["inner_lr"] == 0.05
    )
    assert TrainSettings(bn="frozen", inner_lr=0.4).inner_loop().lr == 0.4
    assert replace(TrainSettings(bn="frozen"), bn="support").inner_loop().lr == 0.4


def test_every_fault_is_reported_at_once() -> None:
    """One error names each field that cannot be, its value and what it could be."""
    with pytest.raises(RequestError) as caught:
        TrainSettings(
            algorithm="mampl",
            network="resnet",
            bn="magic",  # type: ignore[arg-type]
            steps=0,
            inner_steps=-1,
            inner_lr=0.0,
            meta_lr=float("nan"),
            eval_inner_steps=0,
            meta_batch_size=0,
            seed=-1,
            eval_every=0,
            eval_episodes=1,
            log_every=0,
            device="tpu",
        )
    assert str(caught.value).splitlines() == [
        "Invalid training settings:",
        f"  algorithm must be one of {', '.join(ALGORITHMS)}, not 'mampl'.",
        "  network must be one of conv4, conv3-pool, conv4-pool, resnet18, MODULE:FUNCTION, not 'resnet'.",
        "  bn must be one of transductive, per-step, support, frozen, not 'magic'.",
        "  steps must be at least 1, not 0.",
        "  inner_steps must be at least 1, not -1.",
        "  inner_lr must be a positive number, not 0.0.",
        "  eval_inner_steps must be at least 1, not 0.",
        "  meta_lr must be a positive number, not nan.",
        "  meta_batch_size must be at least 1, not 0.",
        "  seed must be at least 0, not -1.",
        "  eval_every must be at least 1, not 0.",
        "  eval_episodes must be at least 2, not 1.",
        "  log_every must be at least 1, not 0.",
        "  device must be one of auto, cpu, cuda, mps, not 'tpu'.",
    ]


def test_conflicts_are_reported_with_the_faults_of_single_values() -> None:
    """A number out of its bounds does not hide that two settings do not go together."""
    with pytest.raises(RequestError) as caught:
        TrainSettings(steps=0, meta_clip_norm=1.0, meta_clip_value=1.0)
    assert [line.split()[0] for line in str(caught.value).splitlines()[1:]] == ["steps", "meta_clip_norm"]


def test_names_that_stand_twice_are_the_same() -> None:
    """Those that modules with torch know are those that are declared without it, and types allow what choices do."""
    assert SETTINGS["network"].choices == tuple(NETWORKS)
    assert SETTINGS["engine"].choices == ("auto", *ENGINES, "graphed")
    assert SETTINGS["precision"].choices == PRECISIONS
    pairs = {Order: ORDERS, BatchNorm: BN_MODES, Loss: LOSSES, Rates: RATES, Adapts: ADAPTS, InnerLoss: INNER_LOSSES}
    assert all(get_args(kind) == choices for kind, choices in pairs.items())


def test_the_table_in_the_docs_is_the_declaration() -> None:
    """Every setting with its values, default and meaning; ``python docs/settings.py`` rewrites the table."""
    page = (DOCS / "training.md").read_text(encoding="utf-8")
    rewritten = runpy.run_path(str(DOCS / "settings.py"))["rewritten"](page)
    assert rewritten == page, "The table of settings is out of date. Run: python docs/settings.py"
    assert all(f"| `--{name.replace('_', '-')}` |" in page for name in SETTINGS)


@pytest.mark.parametrize("name", ["algorithm", "meta_optimizer", "engine"])
def test_a_choice_that_must_be_made_is_not_none(name: str) -> None:
    """None stands for what the algorithm, the images or the version decide, and only where they do."""
    with pytest.raises(RequestError, match=f"{name} must be one of .*, not None"):
        TrainSettings(**{name: None})  # type: ignore[arg-type]
    TrainSettings(order=None, loss=None, rates=None, adapts=None, inner_loss=None, bn=None, precision=None)


def test_an_algorithm_brings_its_own_coordinates() -> None:
    """Also its batch norm, and none of them stays behind when the algorithm is replaced."""
    settings = TrainSettings(algorithm="maml++")
    assert settings.inner_loop().bn == "per-step"
    assert replace(settings, algorithm="maml").inner_loop().bn == "transductive"
    assert TrainSettings(algorithm="maml++", bn="support").inner_loop().bn == "support"


def test_resolved_settings_are_equal_for_equal_runs() -> None:
    """They say what was left to the algorithm, and give the same settings back."""
    settings = TrainSettings(algorithm="maml++", inner_steps=2)
    explicit = replace(settings, order="second", loss="multi-step", rates="layer-step", adapts="all", bn="per-step")
    assert settings.resolved() == explicit.resolved() == TrainSettings(**settings.resolved()).resolved()
    assert settings.resolved()["bn"] == "per-step"


def test_settings_without_effect_are_refused() -> None:
    """Each with the reason."""
    for given, reason in [
        ({"algorithm": "random", "meta_clip_norm": 1.0}, "random has no meta-gradient to clip"),
        ({"algorithm": "random", "meta_clip_value": 1.0}, "random has no meta-gradient to clip"),
        ({"algorithm": "maml++", "msl_epochs": 3}, "msl_epochs has no effect with one inner step"),
    ]:
        with pytest.raises(RequestError, match=reason):
            TrainSettings(**given)  # type: ignore[arg-type]
    TrainSettings(algorithm="maml++", inner_steps=2, msl_epochs=3)
    TrainSettings(algorithm="pretrain", meta_clip_norm=1.0)


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("steps", "many", "a whole number"),
        ("steps", None, "a whole number"),
        ("seed", True, "a whole number"),
        ("inner_lr", "0.4", "a number"),
        ("meta_clip_norm", [1], "a number"),
        ("normalize", 1, "true or false"),
        ("network", ["conv4"], "one of conv4, .*"),
        ("algorithm", {"name": "maml"}, "one of maml, .*"),
        ("bn", 1, "one of transductive, .*"),
    ],
)
def test_a_value_of_another_type(name: str, value: object, kind: str) -> None:
    """It is a fault in words, wherever the value came from."""
    with pytest.raises(RequestError, match=rf"{name} must be {kind}, not {re.escape(repr(value))}\."):
        TrainSettings(**{name: value})  # type: ignore[arg-type]
    TrainSettings(inner_lr=1, eval_inner_steps=None, meta_clip_norm=None)


def test_a_seed_is_one_that_generators_take() -> None:
    """From 0 to the largest number of 64 bits."""
    for seed in (0, 2**64 - 1):
        draw_weights(torch.nn.Linear(2, 2), TrainSettings(seed=seed).seed)
    with pytest.raises(RequestError, match="seed must be at most 18446744073709551615, not 18446744073709551616"):
        TrainSettings(seed=2**64)


def test_saved_settings_are_those_of_the_run() -> None:
    """What a file lacks has its default; what a later version added is named, with what to do."""
    settings = TrainSettings(algorithm="maml++", steps=7)
    assert saved_settings(settings.resolved(), Path("a.pt")).resolved() == settings.resolved()
    assert saved_settings({"steps": 7}, Path("a.pt")) == TrainSettings(steps=7)
    with pytest.raises(RequestError, match=r"a\.pt has unknown settings: a, b\. Another version"):
        saved_settings({"steps": 7, "b": 1, "a": 2}, Path("a.pt"))


def test_former_names_are_read() -> None:
    """Runs that were saved under a setting's former name go on."""
    assert saved_settings({"normalise": True}, Path("a.pt")) == TrainSettings(normalize=True)
    assert set(OLD_NAMES.values()) <= SETTINGS.keys()
    assert not OLD_NAMES.keys() & SETTINGS.keys()


def test_settings_are_frozen() -> None:
    """Nothing changes its settings on the way."""
    with pytest.raises(FrozenInstanceError):
        TrainSettings().steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(("inner", "given", "expected"), [(1, None, 3), (5, None, 5), (5, 10, 10), (1, 1, 1)])
def test_inner_steps_at_test(inner: int, given: int | None, expected: int) -> None:
    """As many as asked for; else three as in the paper's 5-way experiments, and never fewer than in training."""
    settings = TrainSettings(inner_steps=inner, eval_inner_steps=given, bn="support")
    assert settings.inner_loop_at_test() == InnerLoop(expected, 0.4, "first", "support")


def test_the_algorithm_decides_the_order() -> None:
    """MAML is second order and FOMAML first; they differ in nothing else."""
    assert TrainSettings(algorithm="maml").inner_loop() == InnerLoop(1, 0.4, "second", "transductive")
    assert TrainSettings(algorithm="fomaml").inner_loop() == InnerLoop(1, 0.4, "first", "transductive")


def test_changeable_settings_exist() -> None:
    """What a resumed run may change are fields of the settings."""
    assert set(TrainSettings.__dataclass_fields__) >= CHANGEABLE


def test_absent_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that is not there is an error that says which ones are, and auto takes one that is."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(RequestError, match=r"This machine has no device 'cuda'. Available: cpu."):
        pick_device("cuda")
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == torch.device("cuda")


def test_defaults_for_images() -> None:
    """Colour images have a network and a rate of their own and are normalized; what is given stays."""
    mean = {"mean": [0.5] * 3, "std": [0.2] * 3}
    colour = {"image_shape": [84, 84, 3], "normalisation": mean}

    def found(about: dict[str, Any], **given: Any) -> tuple[Any, ...]:
        settings = TrainSettings(**given).for_images(about)
        return settings.network, settings.normalize, settings.inner_lr

    assert found({"image_shape": (28, 28, 1)}) == found({"image_shape": [8, 8, 3]}) == ("conv4", False, None)
    assert found({"image_shape": (7,)}) == ("conv4", False, None)
    assert found(colour) == ("conv4-pool", True, 0.03)
    assert found({"image_shape": [84, 84, 3], "normalisation": None}) == ("conv4-pool", False, 0.03)
    assert found(colour, network="conv4", normalize=False) == ("conv4", False, None)
    assert found(colour, inner_lr=0.4) == ("conv4-pool", True, 0.4)
    assert found(colour, bn="frozen") == found(colour, algorithm="protonet") == ("conv4-pool", True, None)
