"""Time the whole training step of JAX on the CPU: one process, jitted as a whole, its state donated.

A step gathers a batch from resident float32 samples, computes cross entropy and its gradient and updates with Adam, all
in one XLA program that writes the new parameters and moments over the old ones (`donate_argnums`). XLA takes as many
threads as the process may use cores, so the caller's affinity or NPROC decides; XLA_FLAGS are reported as they are set.
See peer.py for how it is asked. Runs in the peers' environment, which has no hpcmlp.
"""

import os
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from peer import BATCHES, make_parser, samples, take_turns, time_steps

BETA1, BETA2, EPS, RATE = 0.9, 0.999, 1e-8, 1e-4  # PyTorch's Adam


def start(sizes: list[int]) -> tuple[list, list, list, jax.Array]:
    """Return parameters [(weight, bias)] from PyTorch's distribution, both moments, and the number of steps done."""
    random = np.random.default_rng(0)
    params = []
    for a, b in zip(sizes, sizes[1:], strict=False):
        bound = a ** -0.5
        params.append((jnp.asarray(random.uniform(-bound, bound, (a, b)).astype(np.float32)),
                       jnp.asarray(random.uniform(-bound, bound, b).astype(np.float32))))

    def zeros() -> list:
        return jax.tree.map(jnp.zeros_like, params)

    return params, zeros(), zeros(), jnp.zeros((), jnp.int32)


def loss(params: list, x: jax.Array, y: jax.Array) -> jax.Array:
    """Mean cross entropy of ReLU layers."""
    for w, b in params[:-1]:
        x = jax.nn.relu(x @ w + b)
    w, b = params[-1]
    return -jnp.take_along_axis(jax.nn.log_softmax(x @ w + b), y[:, None], 1).mean()


def train_step(state: tuple, source: jax.Array, labels: jax.Array, index: jax.Array) -> tuple[tuple, jax.Array]:
    """Return the state after one step of Adam, and the loss before it."""
    params, m, v, t = state
    value, grads = jax.value_and_grad(loss)(params, source[index], labels[index])
    t = t + 1
    m = jax.tree.map(lambda m, g: BETA1 * m + (1 - BETA1) * g, m, grads)
    v = jax.tree.map(lambda v, g: BETA2 * v + (1 - BETA2) * g * g, v, grads)
    rate, root = RATE / (1 - BETA1**t.astype(jnp.float32)), jnp.sqrt(1 - BETA2**t.astype(jnp.float32))
    params = jax.tree.map(lambda p, m, v: p - rate * m / (jnp.sqrt(v) / root + EPS), params, m, v)
    return (params, m, v, t), value


def make_step(sizes: list[int], rows: int) -> Callable[[int], None]:
    """Return one training step as a function of its number; it returns when everything is computed."""
    x, y, index = samples(sizes, rows)
    source, labels = jax.device_put(x), jax.device_put(y.astype(np.int32))
    index = [jax.device_put(i.astype(np.int32)) for i in index]
    jitted = jax.jit(train_step, donate_argnums=0)
    state = start(sizes)

    def step(number: int) -> None:
        nonlocal state
        state, value = jitted(state, source, labels, index[number % BATCHES])
        jax.block_until_ready((state, value))

    return step


def main() -> None:
    args = make_parser(__doc__).parse_args()
    warnings.simplefilter("error")  # JAX warns when it could not use what was donated
    step = make_step(args.sizes, args.global_batch_size)
    time_steps(step, 5)  # compiles
    about = {"peer": "jax", "version": jax.__version__, "platform": jax.default_backend(),
             "xla_flags": os.environ.get("XLA_FLAGS", ""), "processes": 1, "threads": args.threads}
    take_turns(about, lambda count: time_steps(step, count))


if __name__ == "__main__":
    main()
