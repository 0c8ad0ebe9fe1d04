"""What an objective is, and how the axis of tasks runs. Both pillars stand on it.

The sum over tasks is one definition; how many tasks run as one program (`chunk`) is a choice of
execution, and changes the result by rounding only. Gradients are accumulated chunk by chunk, so memory
follows the chunk and not the number of tasks.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mtlib.core import Params, over, take

Task = Callable[[Params, Any], Tensor]
"""`task(phi, data of one task)` -> a scalar whose value and whose gradient with respect to φ count."""


class Objective(NamedTuple):
    """A number to minimise over φ.

    `value(phi, data)` is the plain reference, the equation. `value_and_grad(phi, data)` is what `fit`
    uses: the same value, and the gradient for each entry of φ that one reaches. `separable` says that it is the
    plain mean over the axis of tasks, so that several processes may each take a part of them.
    """

    value: Callable[[Params, Any], Tensor]
    value_and_grad: Callable[[Params, Any], tuple[Tensor, Params]]
    separable: bool = False

    def __call__(self, phi: Params, data: Any) -> Tensor:
        return self.value(phi, data)


def over_tasks(
    task: Task, weights: Tensor | None = None, chunk: int | None = None, vmap: bool = True
) -> Objective:
    """Σ_t w_t · task(φ, data_t), with w_t = 1/T where `weights` is None.

    `chunk` is the number of tasks that run as one program, from 1 (a loop) to T; None chooses: a loop for
    convolutions on a CPU (`vmap` is slower there and takes the memory of all tasks), all tasks otherwise.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"expected a chunk of at least 1 task, got {chunk}")
    run = batched(task, vmap)

    def weigh(data: Any, tasks: int, like: Tensor) -> Tensor:
        if weights is None:
            return like.new_full((tasks,), 1 / tasks)
        if len(weights) != tasks:
            raise ValueError(f"expected one weight a task: {len(weights)} weights, {tasks} tasks")
        return weights.to(like)

    def value(phi: Params, data: Any) -> Tensor:
        values = torch.stack([task(phi, take(data, t)) for t in range(count(data))])
        return weigh(data, len(values), values) @ values

    def value_and_grad(phi: Params, data: Any) -> tuple[Tensor, Params]:
        leaves = {k: v.detach().requires_grad_() for k, v in phi.items()}
        tasks, total, grads = count(data), None, dict[str, Tensor]()
        size = chunk or default_chunk(phi, tasks)
        for a in range(0, tasks, size):
            with torch.enable_grad():
                values = run(leaves, take(data, slice(a, a + size)), size)
                part = weigh(data, tasks, values)[a : a + size] @ values
            total = part.detach() if total is None else total + part.detach()
            add_gradient(grads, part, leaves)
        assert total is not None
        return total, grads

    return Objective(value, value_and_grad, separable=weights is None)


def whole(value: Callable[[Params, Any], Tensor]) -> Objective:
    """An objective that couples its tasks (a penalty between domains): one program, one backward pass."""

    def value_and_grad(phi: Params, data: Any) -> tuple[Tensor, Params]:
        leaves = {k: v.detach().requires_grad_() for k, v in phi.items()}
        with torch.enable_grad():
            result = value(leaves, data)
        return result.detach(), add_gradient({}, result, leaves)

    return Objective(value, value_and_grad)


def add_gradient(grads: Params, value: Tensor, leaves: Params) -> Params:
    """grads += ∂value/∂leaves, in place; an entry that no gradient reaches stays absent."""
    if not value.requires_grad:
        return grads
    for k, g in zip(
        leaves, torch.autograd.grad(value, list(leaves.values()), allow_unused=True), strict=True
    ):
        if g is not None:
            grads[k] = g if k not in grads else grads[k] + g
    return grads


# The axis of tasks ---------------------------------------------------------------------------


def count(data: Any) -> int:
    """T: the leading axis every tensor of a Batch or Episode shares."""
    sizes: list[int] = []

    def measure(d: Tensor) -> Tensor:
        sizes.append(len(d))
        return d

    over(measure, data)
    if len(set(sizes)) != 1 or 0 in sizes:
        raise ValueError(
            f"expected tensors with one leading axis of tasks, at least one long; got lengths {sizes}"
        )
    return sizes[0]


def default_chunk(phi: Params, tasks: int) -> int:
    """One task at a time for convolutions on a CPU, all of them together otherwise."""
    convolution = any(v.ndim >= 4 and v.device.type == "cpu" for v in phi.values())
    return 1 if convolution else tasks


def batched(task: Callable[[Params, Any], Tensor], vmap: bool = True) -> Callable[..., Tensor]:
    """`run(phi, data, size)` -> the tasks' results, stacked: by `vmap` where that is exact, else by a loop.

    torch's batch, layer and instance norms give a silently wrong second-order gradient under `vmap`
    (pytorch/functorch issue 534). Where one is met the loop runs instead, for good, with a warning.
    """
    exact, first = vmap, True

    def loop(phi: Params, data: Any) -> Tensor:
        return torch.stack([task(phi, take(data, t)) for t in range(count(data))])

    def run(phi: Params, data: Any, size: int) -> Tensor:
        nonlocal exact, first
        if exact and size > 1 and count(data) > 1:
            watch: AbstractContextManager[Any] = _WatchFunctions() if first else _watch_modules()
            try:
                with watch:
                    result = torch.vmap(task, in_dims=(None, 0), randomness="different")(phi, data)
                first = False
                return result
            except InexactNorm as norm:
                exact = False
                warnings.warn(
                    f"{norm} has an inexact second-order gradient under vmap: tasks run in a loop. "
                    "mtlib.norm.Norm, group norm and RMS norm are exact.",
                    stacklevel=3,
                )
        return loop(phi, data)

    return run


class InexactNorm(Exception):
    """A norm was met whose second-order gradient `vmap` gets wrong."""


class _WatchFunctions(TorchFunctionMode):
    """Sees every torch function (slow: used on the first call): a user may call F.layer_norm directly."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        own = args[5] if len(args) > 5 else kwargs.get("training", kwargs.get("use_input_stats"))
        if (
            name in ("layer_norm", "native_layer_norm")
            or (name in ("batch_norm", "native_batch_norm") and own)
            or (name == "instance_norm" and own is not False)
        ):
            raise InexactNorm(name)
        return func(*args, **kwargs)


@contextmanager
def _watch_modules() -> Iterator[None]:
    """Sees every module called (cheap: on each later call): `net.train()` may switch a norm over."""

    def look(module: nn.Module, args: Any) -> None:
        own = module.training or getattr(module, "running_mean", None) is None
        if isinstance(module, nn.LayerNorm) or (
            isinstance(module, nn.modules.batchnorm._NormBase) and own
        ):
            raise InexactNorm(type(module).__name__)

    hook = nn.modules.module.register_module_forward_pre_hook(look)
    try:
        yield
    finally:
        hook.remove()
