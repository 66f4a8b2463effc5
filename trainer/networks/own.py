"""Networks of one's own: modules that take images and give logits, in the form of the trainer's networks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from mamldata.errors import RequestError
from trainer.networks.batchnorm import EPSILON
from trainer.networks.networks import ToldNorm, draw_weights, told
from trainer.networks.norms import Norm, batch_statistics, written_out


class OwnNetwork(nn.Module):
    """A copy of a module, on the CPU, whose batch norms are told how to normalize; the module itself is not changed.

    The head is the submodule called ``head``, or else the last ``nn.Linear``. Parameters that require no gradients are
    constants. Norms other than batch norm stay as they are.

    Args:
        module: takes examples ``[N, ...]``, float32, and gives logits ``[N, n_way]``.

    Attributes:
        module: the copy.

    Raises:
        RequestError: it is no module, a parameter has no shape yet, none requires gradients, or a batch norm has
            another epsilon.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise RequestError(f"The network must be a torch.nn.Module, such as a function returns, not {module!r}.")
        for name, value in module.named_parameters():
            if is_lazy(value):
                raise RequestError(f"The network's {name} has no shape yet. Call the network on an example first.")
        if not any(value.requires_grad for value in module.parameters()):
            raise RequestError("The network has no parameter that requires gradients, so it cannot learn.")
        self.module = copy.deepcopy(module).cpu()
        _replace_norms(self.module)

    @property
    def head(self) -> nn.Module:
        """The layer, or layers, that ANIL adapts.

        Raises:
            RequestError: no part is known to be the head.
        """
        if isinstance(own := getattr(self.module, "head", None), nn.Module):
            return own
        linear = [layer for layer in self.module.modules() if isinstance(layer, nn.Linear)]
        if not linear:
            raise RequestError("The network has no nn.Linear. Let its head be a submodule with the name head.")
        return linear[-1]

    @property
    def head_parameters(self) -> list[str]:
        """The names of the parameters of the head."""
        return self._names_of([self.head])

    @property
    def norm_parameters(self) -> list[str]:
        """The names of the scales and shifts of the batch norms."""
        return self._names_of([layer for layer in self.modules() if isinstance(layer, ToldNorm)])

    def _names_of(self, layers: Sequence[nn.Module]) -> list[str]:
        theirs = {id(value) for layer in layers for value in layer.parameters()}
        return [name for name, value in self.named_parameters() if id(value) in theirs]

    def forward(self, x: Tensor, norm: Norm = batch_statistics) -> Tensor:
        """Examples ``[N, ...]`` to logits ``[N, n_way]``."""
        with told(self, norm), _ScaleApart():
            # Images are channels-last in memory, where ``x.view(len(x), -1)``, common in networks, is an error.
            logits: Tensor = self.module(x.contiguous())
            return logits

    def features(self, x: Tensor, norm: Norm) -> Tensor:
        """Examples ``[N, ...]`` to the inputs of the head, ``[N, features]``."""
        seen: list[Tensor] = []
        handle = self.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            self(x, norm)
        finally:
            handle.remove()
        return seen[-1].flatten(1)

    def tried(self, shape: Sequence[int], n_way: int) -> OwnNetwork:
        """The network itself, after a call with ``n_way`` examples of a shape.

        Raises:
            RequestError: it fails, its answers are not ``[N, n_way]``, it draws random numbers, or it keeps something
                for a later call.
        """
        x = torch.linspace(0, 1, n_way * torch.Size(shape).numel()).view(n_way, *shape)
        kept = {name: value.clone() for name, value in self.named_buffers()}
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            state = torch.get_rng_state()
            try:
                with _NoBatchNorm():
                    logits = self(x, written_out)
            except Exception as error:
                raise RequestError(f"The network fails with an input of shape {list(x.shape)}: {error}") from error
            drawn = not torch.equal(state, torch.get_rng_state())
        if logits.shape != (n_way, n_way) or logits.dtype != x.dtype:
            raise RequestError(
                f"The network must give {x.dtype} logits of shape [N, n_way], here {[n_way, n_way]}, but gives "
                f"{logits.dtype} {list(logits.shape)}."
            )
        if drawn:
            raise RequestError(
                "The network draws random numbers (dropout?), which a resumed run could not repeat. Call its eval() "
                "before, or set its rates of dropout to 0."
            )
        if changed := [name for name, value in self.named_buffers() if not torch.equal(value, kept[name])]:
            raise RequestError(
                f"The network changes its buffer {changed[0].removeprefix('module.')} when it is called, so that one "
                "episode would affect the next. It must keep nothing, such as running statistics."
            )
        return self

    def widened(self, n_way: int, seed: int) -> OwnNetwork:
        """A copy with a new linear head for another number of classes.

        Raises:
            RequestError: the head is not a single linear layer.
        """
        wide = copy.deepcopy(self)
        head = wide.head
        if not isinstance(head, nn.Linear):
            raise RequestError("Joint training needs a network whose head is a single nn.Linear.")
        head.weight.data = torch.empty(n_way, head.in_features)
        if head.bias is not None:
            head.bias.data = torch.zeros(n_way)
        draw_weights(head, seed)
        return wide


class _ScaleApart(TorchFunctionMode):
    """Let layer and instance norms normalize first, and multiply by their scales after that.

    Under ``torch.func.vmap``, torch's silently give wrong second derivatives if scales differ by task (torch 2.15).
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in {F.layer_norm, F.instance_norm}:
            return func(*args, **(kwargs or {}))
        scale, shift = (kwargs.pop(name) for name in ("weight", "bias"))
        out = func(*args, **kwargs)
        if func is F.instance_norm:
            scale, shift = (part if part is None else part.view(-1, *[1] * (out.ndim - 2)) for part in (scale, shift))
        out = out if scale is None else out * scale
        return out if shift is None else out + shift


class _NoBatchNorm(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.batch_norm:
            raise RequestError(
                "it calls F.batch_norm. Use nn.BatchNorm2d, which then normalizes as the setting bn says."
            )
        return func(*args, **(kwargs or {}))


class _OwnNorm(ToldNorm):
    """In place of torch's batch norm, for one dimension as well as for images, with the same parameters."""

    def __init__(self, layer: _BatchNorm) -> None:
        nn.Module.__init__(self)
        self.norm = batch_statistics
        self.weight, self.bias = layer.weight, layer.bias
        if not layer.affine:
            del self.weight, self.bias
            self.register_buffer("weight", torch.ones(layer.num_features), persistent=False)
            self.register_buffer("bias", torch.zeros(layer.num_features), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``[N, C, ...]``."""
        wide = x if x.ndim == 4 else x.reshape(len(x), x.shape[1], -1, 1)
        return self.norm(wide, self.weight, self.bias).reshape(x.shape)


def _replace_norms(module: nn.Module) -> None:
    new: dict[nn.Module, nn.Module] = {}  # a layer in several places is one layer there, too
    for parent in list(module.modules()):
        for name, layer in parent._modules.items():
            if not isinstance(layer, _BatchNorm):
                continue
            if layer.eps != EPSILON:
                raise RequestError(f"The network's batch norm {name} has eps {layer.eps:g}. Only {EPSILON:g} works.")
            if layer not in new:
                new[layer] = _OwnNorm(layer)
            parent._modules[name] = new[layer]
