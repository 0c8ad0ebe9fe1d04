"""What an objective is, and how the axis of tasks runs. Both pillars stand on it.

The sum over tasks is one definition; how many tasks run as one program (`chunk`) is a choice of
execution, and changes the result by rounding only. Gradients are accumulated chunk by chunk, so memory
follows the chunk and not the number of tasks.
"""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import islice
from traceback import clear_frames
from types import FunctionType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mtlib.core import Draw, Params, expect, fixed, over, take
from mtlib.run.attention import NO_CUDNN, NO_FASTPATH
from mtlib.run.copies import grad_mode_kept
from mtlib.run.cost import affordable
from mtlib.run.devices import random_state
from mtlib.run.fast import (
    MATH,
    NeedsLoop,
    by_reference,
    compiler_options,
    differentiated_again,
    function_modes,
    mapped,
    plain,
    settled,
    watched,
)
from mtlib.run.threads import Share, sharing
from mtlib.run.transformers import is_exact, layer_norm
from mtlib.tasks import positive

_Part = TypeVar("_Part")
SMALL_TASK = 2_000_000  # numbers in one task's data, up to which one thread per task is faster

Task = Callable[[Params, Any], Tensor]
"""`task(phi, data of one task)` -> a scalar whose value and whose gradient with respect to φ count."""


class InLoop(NamedTuple):
    """A task that runs in a loop over tasks, and never under `vmap`."""

    task: Task

    def __call__(self, phi: Params, data: Any) -> Tensor:
        return self.task(phi, data)


class AllAtOnce(NamedTuple):
    """A task, and a function (φ, data, w) -> Σ_t w_t · task_t and its gradient over all tasks; None where only the task can tell."""

    task: Task
    at_once: Any

    def __call__(self, *args: Any, **names: Any) -> Tensor:
        value: Tensor = self.task(*args, **names)
        return value


class Objective(NamedTuple):
    """A number to minimise over φ.

    `value(phi, data)` is the plain reference, the equation. `value_and_grad(phi, data)` is what `fit`
    uses: the same value, and the gradient for each entry of φ that one reaches. `separable` says that it is the
    plain mean over the axis of tasks, so that several processes may each take a part of them.
    """

    value: Callable[[Params, Draw], Tensor]
    value_and_grad: Callable[[Params, Draw], tuple[Tensor, Params]]
    separable: bool = False
    run: Batched | None = None  # how its tasks run, where they are one by one
    net: nn.Module | None = None  # the network in it: what `fixed(net)` names gets no gradient

    def __call__(self, phi: Params, data: Draw) -> Tensor:
        return self.value(phi, data)


def over_tasks(
    task: Task,
    weights: Tensor | None = None,
    chunk: int | None = None,
    vmap: bool = True,
    compile: bool = False,
    net: nn.Module | None = None,
) -> Objective:
    """Σ_t w_t · task(φ, data_t), with w_t = 1/T if `weights` is None.

    `chunk` is the number of tasks that run as one program, from 1 (a loop) to T; None chooses: a loop for
    convolutions on a CPU (`vmap` is slower there and takes the memory of all tasks), all tasks otherwise, or as many as
    half of the device's memory holds (`mtlib.run.cost.affordable`).
    On a CPU with convolutions, small tasks run on several threads: what a task calls must be thread-safe, or
    `torch.set_num_threads(1)` keeps them on one. Tasks that draw random numbers from torch stay on one by themselves.
    Where `vmap` has no rule for what they do, or a wrong one, tasks run in a loop, with a warning that says why.
    `compile` makes the gradient of a chunk one program of `torch.compile`. The second call compiles, which takes the
    better part of a minute: for small networks and many steps. Where that fails a warning says why, and it runs as it did.
    A task that knows its gradient for all tasks at once (`AllAtOnce`) is asked first, unless a `chunk` is given, compiled
    or not.
    Frozen parameters and buffers of `net` get no gradient.
    """
    if chunk is not None:
        positive(chunk=chunk)
    expect(callable(task), "a task, a function (phi, data) -> scalar", task)
    at_once, task = (task.at_once, task.task) if isinstance(task, AllAtOnce) else (None, task)
    run = Batched(task, vmap and not isinstance(task, InLoop))

    def weigh(tasks: int) -> Tensor:
        if weights is not None and len(weights) != tasks:
            raise ValueError(f"expected one weight per task: {len(weights)} weights, {tasks} tasks")
        return torch.full((tasks,), 1 / tasks, dtype=torch.float64) if weights is None else weights

    def value(phi: Params, data: Any) -> Tensor:
        values = second_derivatives(partial(run.loop, phi, data), phi, run)
        expect(values.ndim == 1, "a task whose value is a scalar, for T tasks (T,)", values)
        return weigh(len(values)).to(values) @ values

    def gradient(leaves: Params, data: Any, w: Tensor) -> tuple[Tensor, Params]:
        with torch.enable_grad():
            values = run(leaves, data)
            expect(values.ndim == 1, "a task whose value is a scalar, for T tasks (T,)", values)
            part = w.to(values) @ values
        return part.detach(), add_gradient({}, part, leaves)

    run.compiled = compile
    step = compiled(gradient, run) if compile else gradient

    @grad_mode_kept
    def value_and_grad(phi: Params, data: Any) -> tuple[Tensor, Params]:
        w, size = weigh(count(data)), chunk
        found: tuple[Tensor, Params] | None = (
            at_once(phi, data, w) if at_once and not chunk else None
        )
        if found is not None:
            return found
        leaves = leaves_of(phi, net)

        def one(part: slice) -> tuple[Tensor, Params]:
            """Σ w_t · task_t over the tasks of a chunk, and its gradient: one backward pass."""
            return step(leaves, take(data, part), w[part])

        if not (chunk or compile):
            size = affordable(default_chunk(phi, len(w)), one, phi, data, run.sizes)
        return second_derivatives(
            partial(in_chunks, one, _add, phi, data, size, run.share, 1 if compile else None),
            phi,
            run,
        )

    return Objective(value, value_and_grad, weights is None, run, net)


def whole(value: Callable[[Params, Any], Tensor], net: nn.Module | None = None) -> Objective:
    """An objective that couples its tasks (a penalty between domains): one program, one backward pass.

    Frozen parameters and buffers of `net` get no gradient.
    """

    def one(phi: Params, data: Any) -> tuple[Tensor, Params]:
        leaves = leaves_of(phi, net)
        with torch.enable_grad():
            result = value(leaves, data)
            right = isinstance(result, Tensor) and not result.ndim
            expect(right, "a value that is a scalar tensor", result)
        return result.detach(), add_gradient({}, result, leaves)

    run = Batched(value, vmap=False)

    @grad_mode_kept
    def value_and_grad(phi: Params, data: Any) -> tuple[Tensor, Params]:
        return second_derivatives(partial(one, phi, data), phi, run)

    return Objective(value, value_and_grad, net=net)


def leaves_of(phi: Params, net: nn.Module | None) -> Params:
    """φ to differentiate by: what may not move in `net` is a constant in it."""
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "expected a place where torch keeps what a gradient needs; got torch.inference_mode(), where there is none. "
            "Train outside of it; torch.no_grad() does no harm"
        )
    still = fixed(net)
    own = {k: v.clone() if v.is_inference() else v.detach() for k, v in phi.items()}
    return {k: v.requires_grad_(k not in still) for k, v in own.items()}


def add_gradient(grads: Params, value: Tensor, leaves: Params) -> Params:
    """grads += ∂value/∂leaves, in place; an entry that no gradient reaches, or that is a constant, stays absent."""
    moving = {k: v for k, v in leaves.items() if v.requires_grad}
    if not (value.requires_grad and moving):
        return grads
    found = torch.autograd.grad(value, list(moving.values()), allow_unused=True)
    torch.clear_autocast_cache()  # else autocast keeps a cast of each of the leaves until it ends
    for k, g in zip(moving, found, strict=True):
        if g is not None:
            grads[k] = g if k not in grads else grads[k] + g
    return grads


def _add(parts: Iterable[tuple[Tensor, Params]]) -> tuple[Tensor, Params]:
    """Values, and gradients entry by entry, summed in order; an entry that one gradient lacks is 0 there."""
    values, grads = list[Tensor](), dict[str, Tensor]()
    for value, part in parts:
        values.append(value)
        for k, g in part.items():
            grads[k] = g if k not in grads else grads[k] + g
    return torch.stack(values).sum(), grads


NO_DERIVATIVE = re.compile(r"derivative for '?(?:aten::)?(\w*backward\w*?)'? is not implemented")
FUSED_RNN = re.compile(r"_rnn_backward' is not|RNN backward can only be called in training mode")
INSTEAD = {
    "embedding_bag": "write nn.EmbeddingBag as nn.Embedding and a mean: `embedding(x).mean(1)`",
    "cdist": "write torch.cdist(a, b) as torch.cdist(a, b, compute_mode='use_mm_for_euclid_dist'), or for another p as "
    "`(a[:, None] - b).abs().pow(p).sum(-1).pow(1 / p)`",
    "pdist": "write pdist(x) as a sum over `(x[:, None] - x).pow(2)`",
    "scaled_dot_product": "compute attention with torch's math kernel: `with torch.nn.attention.sdpa_kernel("
    "torch.nn.attention.SDPBackend.MATH):`",
    "hardsigmoid": "write hardsigmoid(x) as `relu6(x + 3) / 6`",
    "multi_margin": "take cross_entropy in the inner loss",
    "multilabel_margin": "take binary_cross_entropy_with_logits in the inner loss",
}
"""What to write in the place of operations that have no second derivatives, by a part of their names."""


def second_derivatives(work: Callable[[], _Part], phi: Params, run: Batched) -> _Part:
    """work(), with an error of our own where an operation has no second derivatives.

    Recurrent networks of cuDNN have none, and in evaluation mode no first ones; torch's own have all. Where one is met
    work() runs anew without cuDNN, and so does all that follows, with a warning.
    """
    draw_again = random_state()
    try:
        with NO_CUDNN.held() if run.without_cudnn else nullcontext():
            return work()
    except RuntimeError as error:
        found = NO_DERIVATIVE.search(str(error))
        if run.without_cudnn or not FUSED_RNN.search(str(error)):
            if found is None:
                raise
            instead = next((f", or {v}" for k, v in INSTEAD.items() if k in found[1]), "")
            raise ValueError(
                f"expected operations that can be differentiated twice; torch has no derivative of {found[1]}. Take a way "
                f"without second derivatives, `bilevel(learner, loss, first_order)`{instead}."
            ) from error
    run.without_cudnn = True
    draw_again()
    warnings.warn(
        "cuDNN's recurrent networks have no second derivatives, and none in evaluation mode: these tasks run without cuDNN "
        "from now on.",
        stacklevel=3,
    )
    return second_derivatives(work, phi, run)


# The axis of tasks ---------------------------------------------------------------------------


def in_chunks(
    one: Callable[[slice], _Part],
    add: Callable[[Iterable[_Part]], _Part],
    phi: Params,
    data: Draw,
    chunk: int | None,
    share: Share,
    workers: int | None = None,
) -> _Part:
    """add(one(tasks), …) over chunks of the tasks in `data`, in their order: the one loop over the axis of tasks.

    Each of the `workers` adds up a block of chunks, then the blocks are added. None chooses, as for `chunk`.
    """
    tasks = count(data)
    size = chunk or default_chunk(phi, tasks)

    def part(a: int) -> _Part:
        result = one(slice(a, a + size))
        torch.clear_autocast_cache()  # else autocast keeps a cast of each fresh leaf until it ends
        return result

    def block(starts: Sequence[int]) -> _Part:
        return add(map(part, starts))

    workers = default_threads(phi, data, size) if workers is None else workers
    return add(share(block, range(0, tasks, size), workers))


def count(data: Draw) -> int:
    """T: the leading axis every tensor of a Batch or Episode shares."""
    sizes = set[int]()

    def length(d: Tensor) -> int:
        sizes.add(d.shape[0] if d.ndim else 0)
        return d.shape[0] if d.ndim else 0

    lengths = over(length, data)
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            f"expected tensors with one leading axis of tasks, at least one long; got lengths {lengths}"
        )
    return sizes.pop()


def default_chunk(phi: Params, tasks: int) -> int:
    """One task at a time for convolutions on a CPU, all of them together otherwise."""
    return 1 if plain() or _convolves_on_cpu(phi) else tasks


def default_threads(phi: Params, data: Draw, size: int) -> int:
    """Threads that take chunks of `size` tasks: all of torch's for a loop over small convolutions on a CPU, else one.

    Measured on two cores with a Conv4: with 28×28 images and 5 ways a loop over 8 tasks takes a fifth less, and with
    84×84 images and 80 of them in a task a loop over 4 tasks a sixth less.
    """
    if size > 1 or plain() or watched() or not _convolves_on_cpu(phi):
        return 1
    elements = 0

    def measure(d: Tensor) -> Tensor:
        nonlocal elements
        elements += d[0].numel()
        return d

    over(measure, data)
    return min(torch.get_num_threads(), count(data)) if elements <= SMALL_TASK else 1


def _convolves_on_cpu(phi: Params) -> bool:
    return any(v.ndim >= 4 and v.device.type == "cpu" for v in phi.values())


class Batched:
    """`run(phi, data)` -> the tasks' results, stacked: by `vmap` where it can run them exactly, else by a loop.

    Where `vmap` has no rule for an operation (recurrent networks, `.item()`, a choice by values, boolean masks), or gives
    wrong derivatives, silently (second ones of norms, pytorch/functorch issue 534; those of embeddings with padding), the
    loop runs instead, for good, with a warning that says why. What a loop cannot run either raises the loop's error.
    """

    def __init__(self, task: Callable[[Params, Any], Tensor], vmap: bool = True):
        self.task, self.exact, self.first, self.share = task, vmap, True, sharing()
        self.compiled = self.without_cudnn = self.rewrites = False
        self.sizes = dict[Any, int]()  # of chunks, by the shapes of tasks

    def learn_from(self, other: Batched) -> None:
        """Take over what the other found out, if its task does the same but for the numbers in it."""
        try:
            same = alike(self.task, other.task)
        except (RecursionError, ValueError):  # a function that holds itself, or a name not yet set
            same = False
        if same:
            self.exact, self.first, self.share = other.exact, other.first, other.share
            self.without_cudnn, self.rewrites = other.without_cudnn, other.rewrites
            self.sizes = other.sizes

    def __call__(self, phi: Params, data: Any) -> Tensor:
        if not self.exact or plain() or count(data) == 1:
            return second_derivatives(partial(self.loop, phi, data), phi, self)
        draw_again = random_state()
        try:
            functions = self.first or self.rewrites
            with settled(), _watch_functions() if functions else _watch_modules() as watch:
                result = self.vmap(phi, data)
        except Exception as error:
            clear_frames(error.__traceback__)  # and what they hold, for all tasks together
            reason = error
        else:
            self.first, self.rewrites = False, watch is not None and watch.rewrites
            return result
        draw_again()
        result = second_derivatives(partial(self.loop, phi, data), phi, self)
        self.exact = False
        if isinstance(reason, InexactEmbedding):
            warnings.warn(f"{reason}: tasks run in a loop.", stacklevel=3)
        elif isinstance(reason, InexactNorm):
            warnings.warn(
                f"{reason}: tasks run in a loop. mtlib.norm.Norm, layer, group and RMS norm run together, exactly.",
                stacklevel=3,
            )
        elif not isinstance(reason, NeedsLoop):
            warnings.warn(
                "tasks run in a loop, one by one, with the same result (as chunk=1 does): torch's vmap cannot run them "
                f"together. It says: {_shortened(reason)}",
                stacklevel=3,
            )
        return result

    def loop(self, phi: Params, data: Any) -> Tensor:
        with settled():
            values = [self.task(phi, take(data, t)) for t in range(count(data))]
            for value in values:
                expect(isinstance(value, Tensor), "a task that gives a tensor", value)
            return torch.stack(values)

    def vmap(self, phi: Params, data: Any) -> Tensor:
        together = torch.vmap(partial(self.task, phi), randomness="different")
        if torch.compiler.is_compiling():
            return together(data)
        with _together(phi):
            return together(data)


@contextmanager
def _together(phi: Params) -> Iterator[None]:
    """Attention has rules for `vmap` in this block."""
    on_cpu = any(v.device.type == "cpu" for v in _first(phi))
    with NO_FASTPATH.held(), MATH.held() if on_cpu else nullcontext():
        yield


def _first(phi: Params) -> list[Tensor]:
    return list(islice(phi.values(), 1))


def _shortened(error: BaseException) -> str:
    """The first words of what came first."""
    while error.__cause__:
        error = error.__cause__
    words = " ".join(str(error).split()[:30])
    return words if isinstance(error, RuntimeError) else f"{type(error).__name__}: {words}"


def alike(a: Any, b: Any) -> bool:
    """Whether two functions do the same, but for the real numbers and the tensors that they hold."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, FunctionType):
        cells = ([c.cell_contents for c in f.__closure__ or ()] for f in (a, b))
        values = ((f.__defaults__, f.__kwdefaults__) for f in (a, b))
        return a.__code__ is b.__code__ and alike(*cells) and alike(*values)
    if isinstance(a, partial):
        return alike((a.func, a.args, a.keywords), (b.func, b.args, b.keywords))
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(alike, a, b))
    if isinstance(a, dict):
        return alike(list(a.items()), list(b.items()))
    return isinstance(a, float | Tensor) or (isinstance(a, int | str) and a == b)


Gradient = Callable[[Params, Any, Tensor], tuple[Tensor, Params]]
"""`gradient(leaves, data, w)` -> Σ_t w_t task_t over the tasks in `data`, and its gradient."""


def compiled(gradient: Gradient, run: Batched) -> Gradient:
    """The same gradient as one program of `torch.compile`, from the second call on.

    The first runs as it is: it shows which entries a gradient reaches, and whether `vmap` is exact. So does each call
    after torch's compiler has failed, with a warning that says why, or while a norm is in a mode that `vmap` gets wrong.
    """
    reached: dict[frozenset[str], list[str]] = {}  # by the entries that move
    norms = dict[int, nn.Module]()
    program: Callable[..., Any] | None = None
    failed = False
    # torch 2.11 traces no cross-entropy under `vmap` whose sizes may change: there each size has its own program
    dynamic = False if torch.__version__ < "2.13" else None

    def total(moving: Params, still: Params, data: Any, w: Tensor) -> Tensor:
        phi = {**still, **moving}
        values = (run.vmap if run.exact and not run.rewrites else run.loop)(phi, data)
        return w.to(values) @ values

    def note(module: nn.Module, args: Any) -> None:
        if isinstance(module, NORMS):
            norms[id(module)] = module

    def faster(leaves: Params, data: Any, w: Tensor) -> tuple[Tensor, Params]:
        nonlocal failed, program
        moving = {k: v.detach() for k, v in leaves.items() if v.requires_grad}
        still = {k: v for k, v in leaves.items() if not v.requires_grad}
        key = frozenset(moving)
        if key not in reached or failed or plain() or any(map(_inexact, norms.values())):
            with _each_module(note), by_reference() if key not in reached else nullcontext():
                value, grads = gradient(leaves, data, w)
            reached[key] = list(grads)
            return value, grads
        try:
            program = program or torch.compile(
                torch.func.grad_and_value(total),
                fullgraph=True,
                dynamic=dynamic,
                options=compiler_options(leaves),
            )
            with _together(leaves):
                grads, value = program(moving, still, data, w)
        except Exception as error:  # the same call ran before without the compiler
            failed = True
            reason = " ".join(str(error).split()[:40]) or type(error).__name__
            warnings.warn(f"torch.compile failed, so it runs without: {reason}", stacklevel=2)
            return gradient(leaves, data, w)
        return value, {k: grads[k] for k in reached[key]}

    return faster


class InexactEmbedding(NeedsLoop):
    """An embedding was met whose gradient `vmap` gets wrong."""


class InexactNorm(NeedsLoop):
    """A norm was met whose second-order gradient `vmap` gets wrong, or that writes to its statistics."""


WATCHED = frozenset(
    [
        "native_layer_norm",
        "layer_norm",
        "native_batch_norm",
        "batch_norm",
        "instance_norm",
        "embedding",
    ]
)
"""Functions that `_WatchFunctions` asks about; the others pass, as most do."""


class _WatchFunctions(TorchFunctionMode):
    """Sees every torch function (slow: used on the first call, and where it `rewrites`): a user may call F.layer_norm directly."""

    rewrites = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name not in WATCHED:
            return func(*args, **kwargs)
        own = args[5] if len(args) > 5 else kwargs.get("training", kwargs.get("use_input_stats"))
        if _LOOKING.functions is self and (
            name == "native_layer_norm"
            or (name in ("batch_norm", "native_batch_norm") and own)
            or (name == "instance_norm" and own is not False)
        ):
            _refuse(name, [*args, *kwargs.values()])
        given = [*args, *kwargs.values()]
        if _LOOKING.functions is self and name == "layer_norm" and differentiated_again(given):
            self.rewrites = True
            return layer_norm(*args, **kwargs)
        if _LOOKING.functions is self and func is nn.functional.embedding:
            _check_embedding(*args, **kwargs)
        return func(*args, **kwargs)


BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
NORMS = (nn.LayerNorm, *BATCH_NORMS, *INSTANCE_NORMS)


def _inexact(module: nn.Module) -> bool:
    """Whether `vmap` gives wrong second derivatives of what this norm computes now."""
    own = module.training or getattr(module, "running_mean", None) is None
    return isinstance(module, nn.LayerNorm) or (isinstance(module, NORMS) and own)


def _refuse(norm: str, tensors: Iterable[Any]) -> None:
    """Raise `InexactNorm` where second derivatives are taken of a norm in a way that gets them wrong."""
    if differentiated_again(tensors):
        raise InexactNorm(f"{norm} has an inexact second-order gradient under vmap")


def _check_embedding(
    input: Any,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> None:
    """Raise `InexactEmbedding` where vmap forgets which row is padding in tasks but the first, or counts all tasks' words."""
    if (padding_idx is not None and mapped(weight)) or scale_grad_by_freq:
        what = "scale_grad_by_freq" if scale_grad_by_freq else "padding_idx"
        raise InexactEmbedding(f"an embedding with {what} has a wrong gradient under vmap")


def _watch_modules() -> AbstractContextManager[None]:
    """Raises at such a norm or embedding (cheap: on each later call): `net.train()` may switch a norm over."""

    def look(module: nn.Module, args: Any) -> None:
        if _inexact(module) and not is_exact(module):
            name = type(module).__name__
            if module.training and getattr(module, "running_mean", None) is not None:
                raise InexactNorm(
                    f"{name} in training mode writes to its statistics, which vmap cannot"
                )
            _refuse(name, [*args, *module.parameters()])
        if isinstance(module, nn.Embedding):
            padding, counted = module.padding_idx, module.scale_grad_by_freq
            _check_embedding(args, module.weight, padding, scale_grad_by_freq=counted)

    return _each_module(look)


class _Looking(threading.local):
    """What one thread does before each module that it calls."""

    look: Callable[[nn.Module, Any], Any] | None = None
    functions: TorchFunctionMode | None = None


_LOOKING = _Looking()


@contextmanager
def _watch_functions() -> Iterator[_WatchFunctions]:
    """Raises at such a norm or embedding, module or function; one that Ctrl-C leaves behind looks no more."""
    outer = _LOOKING.functions
    mode: Any = _WatchFunctions()
    try:
        mode.__enter__()
        _LOOKING.functions = mode
        yield mode
    finally:
        _LOOKING.functions = outer
        if function_modes() is None:
            mode.__exit__(None, None, None)
        while (on := function_modes()) and isinstance(on[-1], type(mode)) and on[-1] is not outer:
            mode.__exit__(None, None, None)  # Ctrl-C may have left another, or taken this one off


@contextmanager
def _each_module(look: Callable[[nn.Module, Any], Any]) -> Iterator[None]:
    """`look(module, args)` before each module that this thread calls; torch's hook itself is every thread's."""

    def before(module: nn.Module, args: Any) -> None:
        if _LOOKING.look is look:
            look(module, args)

    outer = _LOOKING.look
    hook = nn.modules.module.register_module_forward_pre_hook(before)
    try:
        _LOOKING.look = look
        yield
    finally:
        _LOOKING.look = outer
        hook.remove()
