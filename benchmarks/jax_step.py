"""One meta-gradient of MAML in JAX, ``jit`` over ``vmap`` over ``grad``: the peer whose whole step is compiled.

JAX is not a dependency: it is imported only here, and only if it is called.
"""

from __future__ import annotations

import os
import time
from typing import Any

from torch import nn

from mamldata.streaming.batch import EpisodeBatch


def jax_step(network: nn.Module, batch: EpisodeBatch, steps: int, lr: float, *, repeats: int) -> dict[str, Any]:
    """Time the second-order meta-gradient of conv4 on JAX's own device.

    Args:
        network: ``conv4`` on the CPU, whose weights are taken over.
        batch: B episodes.
        steps: inner steps.
        lr: the inner learning rate.
        repeats: timed calls.

    Returns:
        ``ms``, of each call; ``first``, seconds of the first one, which compiles; ``loss`` and ``gradient``, by name.
    """
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # or it takes most of the GPU's memory from torch
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_default_matmul_precision", "highest")  # float32, as torch has it here

    start = {name: jnp.asarray(value.detach().cpu().numpy()) for name, value in network.named_parameters()}
    parts = [jnp.asarray(part.cpu().numpy()) for part in batch[:4]]

    def logits(weights: Any, x: Any) -> Any:
        for block in range(4):
            kernel, scale, shift = (weights[f"blocks.{block}.{name}"] for name in ("kernel", "scale", "shift"))
            x = jax.lax.conv_general_dilated(x, kernel, (2, 2), [(1, 1), (1, 1)])
            mean, variance = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
            x = (x - mean) * jax.lax.rsqrt(variance + 1e-5) * scale[:, None, None] + shift[:, None, None]
            x = jax.nn.relu(x)
        return x.mean((2, 3)) @ weights["head"].T + weights["head_bias"]

    def loss(weights: Any, x: Any, y: Any) -> Any:
        found = jax.nn.log_softmax(logits(weights, x))
        return -jnp.take_along_axis(found, y[:, None], 1).mean()

    def adapted(weights: Any, support_x: Any, support_y: Any, query_x: Any, query_y: Any) -> Any:
        fast = weights
        for _ in range(steps):
            slopes = jax.grad(loss)(fast, support_x, support_y)
            fast = jax.tree_util.tree_map(lambda value, slope: value - lr * slope, fast, slopes)
        return loss(fast, query_x, query_y)

    def mean(weights: Any) -> Any:
        return jax.vmap(adapted, in_axes=(None, 0, 0, 0, 0))(weights, *parts).mean()

    step = jax.jit(jax.value_and_grad(mean))
    begin = time.perf_counter()
    value, gradient = jax.block_until_ready(step(start))
    first, taken = time.perf_counter() - begin, []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(step(start))
        taken.append(1000 * (time.perf_counter() - begin))
    return {"ms": taken, "first": first, "loss": float(value), "gradient": gradient}
