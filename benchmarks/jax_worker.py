"""The meta-gradient with JAX, in a process without torch: started by `with_jax.py`, asked over its standard streams.

    python benchmarks/jax_worker.py NUMBER_OF_THREADS

Both ends speak in pickles. First comes the problem: a dict of settings, the parameters and the data as arrays. Then each
"gradient" is answered with the gradient as arrays, each "seconds" with the seconds of one call, to the end of what it
started, and the end of the stream ends the process. Data and parameters are on JAX's device before a clock runs, and
images have their channels last, which XLA's CPU compiler asks for.

Threads: XLA makes a pool of as many threads as the process has processors, or as NPROC says, so both are set before
JAX is imported; one thread also turns off the pool of single operations.
"""

from __future__ import annotations

import os
import pickle
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

SHORT = 0.05  # seconds, as in `meta_gradient.py`


def main() -> None:
    threads = int(sys.argv[1])
    limit(threads)
    source, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    run = gradient(**pickle.load(source))
    while True:
        try:
            asked = pickle.load(source)
        except EOFError:
            return
        time.sleep(0.002)  # until the threads of who asked have stopped spinning
        for _ in range(2):  # as `meta_gradient.clock`
            began = time.perf_counter()
            found = run()
            spent = time.perf_counter() - began
            if spent > SHORT:
                break
        found = spent if asked == "seconds" else arrays(found)
        pickle.dump(found, answers)
        answers.flush()


def limit(threads: int) -> None:
    """XLA computes on so many threads."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    os.environ |= {"NPROC": str(threads), "JAX_PLATFORMS": "cpu"}
    if threads == 1:
        os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"


def gradient(
    work: dict[str, Any], parameters: list[Any], episode: Any, double: bool
) -> Callable[[], Any]:
    """A function of no arguments: the meta-gradient, parameter by parameter, once it is there.

    All tasks are one program, by `vmap`. Measured on two cores (JAX 0.10), with convolutions written as products, that is
    JAX's fastest: a loop over tasks takes a tenth longer, its own convolution in a loop a sixth, `lax.map` over it 8 times
    as long, and `vmap` over it, as one of groups, 6 times.
    """
    import jax

    jax.config.update("jax_enable_x64", double)
    each = jax.tree.map
    last = partial(each, lambda v: v.transpose(2, 3, 1, 0) if v.ndim == 4 else v)
    images = partial(each, lambda v: v.transpose(0, 1, 3, 4, 2) if v.ndim == 5 else v)
    phi, data = jax.device_put((last(parameters), images(episode)))
    risk = partial(classification if work["size"] else regression, jax)

    def task(phi: Any, batches: Any) -> Any:
        support, query = batches
        theta = phi
        for _ in range(work["steps"]):
            slope = jax.grad(risk)(theta, *support)
            slope = jax.lax.stop_gradient(slope) if work["method"] == "first order" else slope
            theta = each(lambda p, g: p - work["lr"] * g, theta, slope)
        return risk(theta, *query)

    def together(phi: Any, data: Any) -> Any:
        return jax.vmap(partial(task, phi))(data).mean()

    whole = jax.jit(jax.grad(together))
    return lambda: jax.block_until_ready(whole(phi, data))


def regression(jax: Any, theta: list[Any], x: Any, y: Any) -> Any:
    """The mean squared error of a perceptron with ReLU."""
    *hidden, (w, b) = zip(theta[::2], theta[1::2], strict=True)
    for weight, bias in hidden:
        x = jax.nn.relu(x @ weight.T + bias)
    return ((x @ w.T + b - y) ** 2).mean()


def classification(jax: Any, theta: list[Any], x: Any, y: Any) -> Any:
    """The cross-entropy of blocks of convolution, batch statistics, ReLU and 2×2 pool, and a linear head.

    ReLU follows the pool: the same numbers, of which there are fewer.
    """
    *blocks, w, b = theta
    for k, scale, shift in zip(blocks[::3], blocks[1::3], blocks[2::3], strict=True):
        x = jax.nn.relu(pool(jax.numpy.where, norm(jax, convolution(jax, x, k), scale, shift)))
    features = x.transpose(0, 3, 1, 2).reshape(len(x), -1)  # torch's order
    return -(jax.nn.log_softmax(features @ w.T + b) * y).sum(-1).mean()


def convolution(jax: Any, x: Any, k: Any) -> Any:
    """3×3, as one matrix product with the nine neighbours of each pixel."""
    n, h, w, channels = x.shape
    wide = jax.numpy.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    nine = [wide[:, i : i + h, j : j + w] for i in range(3) for j in range(3)]
    rows = jax.numpy.concatenate(nine, -1).reshape(n * h * w, 9 * channels)
    return (rows @ k.reshape(9 * channels, -1)).reshape(n, h, w, -1)


def norm(jax: Any, x: Any, scale: Any, shift: Any) -> Any:
    mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
    return (x - mean) * jax.lax.rsqrt(variance + 1e-5) * scale + shift


def pool(where: Any, x: Any) -> Any:
    """The larger of two rows, then of two columns, by a choice: the derivative of JAX's `max` compares with the maximum.

    Where XLA computes the numbers anew for that, rounded otherwise, none is equal, and the gradient is lost.
    """
    h, w = (n // 2 * 2 for n in x.shape[1:3])
    a, b = x[:, 0:h:2], x[:, 1:h:2]
    rows = where(a >= b, a, b)
    a, b = rows[:, :, 0:w:2], rows[:, :, 1:w:2]
    return where(a >= b, a, b)


def arrays(grads: list[Any]) -> list[Any]:
    """As torch lays them out."""
    import numpy as np

    return [np.asarray(g.transpose(3, 2, 0, 1) if g.ndim == 4 else g) for g in grads]


if __name__ == "__main__":
    main()
