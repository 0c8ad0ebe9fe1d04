"""The one seam for fast paths: private names of torch are looked up here, and nowhere else.

Where torch lacks one of them, the plain reference runs. `MTLIB_PLAIN=1` asks for the reference everywhere.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from traceback import clear_frames
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mtlib.core import Params, expect, reference, ways
from mtlib.run.attention import Switch
from mtlib.run.switches import is_on

_Result = TypeVar("_Result")


def plain() -> bool:
    """Whether the plain reference runs instead of the fast paths, everywhere: MTLIB_PLAIN=1. They agree to rounding."""
    return is_on("MTLIB_PLAIN")


def private(module: str, name: str) -> Any:
    """A name that torch does not promise to keep, or None where this torch has no such name."""
    try:
        found: Any = import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return None
    return found


TRANSFORMING = private("torch._C", "_are_functorch_transforms_active")
STACK = private("torch._C", "_functorch.get_interpreter_stack")
VMAP = private("torch._C", "_functorch.TransformType.Vmap")
LEVEL = private("torch._C", "_functorch.CVmapInterpreterPtr")
IS_BATCHED = private("torch._C", "_functorch.is_batchedtensor")
UNWRAPPED = private("torch._C", "_functorch.get_unwrapped")
IS_WRAPPED = private("torch._C", "_functorch.is_functorch_wrapped_tensor")
BATCH_DIM = private("torch._C", "_functorch.maybe_get_bdim")
ADD_BATCH_DIM = private("torch._C", "_functorch._add_batch_dim")
LEVEL_OF = private("torch._C", "_functorch.maybe_get_level")
IN_PLACE = private("torch._functorch.eager_transforms", "enable_inplace_requires_grad")
DEPTH = private("torch._C", "_functorch.get_dynamic_layer_stack_depth")
UNDO = private("torch._C", "_functorch.pop_dynamic_layer_stack_and_undo_to_depth")
FUNCTION_MODES = private("torch.overrides", "_get_current_function_mode_stack")
POP = private("torch._C", "_functorch.pop_dynamic_layer_stack")
PUSH = private("torch._C", "_functorch.push_dynamic_layer_stack")
DISPATCH_MODES = private("torch.utils._python_dispatch", "_get_current_dispatch_mode_stack")
HOOKS = [
    private("torch.nn.modules.module", f"_global_{name}_hooks")
    for name in ("forward_pre", "forward", "backward_pre", "backward")
]
"""What is called before and after every module; before, `mtlib.objective` looks itself."""
MODULE_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
"""The same of one module."""
FORWARD_LEVEL = private("torch.autograd.forward_ad", "_current_level")
SOFTMAX_BACKWARD = private("torch", "ops.aten._softmax_backward_data")
DispatchMode: Any = private("torch.utils._python_dispatch", "TorchDispatchMode") or object
"""What sees every operation of torch; `object`, which sees none, where torch has no such class."""

_KERNELS = {
    ("_get_math_sdp_enabled", "_set_sdp_use_math"): True,
    ("_get_flash_sdp_enabled", "_set_sdp_use_flash"): False,
    ("_get_mem_efficient_sdp_enabled", "_set_sdp_use_mem_efficient"): False,
    ("_get_cudnn_sdp_enabled", "_set_sdp_use_cudnn"): False,
    ("_get_overrideable_sdp_enabled", "_set_sdp_use_overrideable"): False,
}
MATH = Switch(
    [
        (read, write, on)
        for names, on in _KERNELS.items()
        if None not in (pair := [private("torch._C", name) for name in names])
        for read, write in [pair]
    ]
)
"""Held where attention is differentiated twice, or runs under `vmap` on a CPU: its math kernel alone may run."""

COMPLETE = None not in (
    *(TRANSFORMING, STACK, VMAP, LEVEL, IS_BATCHED, UNWRAPPED, BATCH_DIM, ADD_BATCH_DIM, IN_PLACE),
    *(POP, PUSH),
)
"""Whether this torch has every name that `gradient` needs."""


class NeedsLoop(Exception):
    """What `vmap` cannot run, or not exactly; a loop over tasks can."""


def transforming() -> bool:
    """Whether one of functorch's transforms (`vmap`, `grad`, …) is at work; False where torch cannot say."""
    return bool(TRANSFORMING and TRANSFORMING())


def untransformed() -> bool:
    """Whether none of functorch's transforms is at work; False where torch cannot say."""
    return TRANSFORMING is not None and not TRANSFORMING()


def vmapping() -> bool:
    """Whether `vmap` is among the transforms at work; False where torch cannot say."""
    levels = STACK() if STACK and VMAP else None
    return any(level.key() == VMAP for level in levels or ())


def as_stored(x: Tensor) -> Tensor | None:
    """x as a constant whose numbers can be looked at, under `vmap` all tasks'; None where there are none to see."""
    if torch.compiler.is_compiling() or IS_WRAPPED is None or UNWRAPPED is None:
        return None
    while IS_WRAPPED(x):
        x = UNWRAPPED(x)
    return x.detach()


@contextmanager
def settled() -> Iterator[None]:
    """functorch is at the level afterwards that it had before, and Ctrl-C comes through as such.

    Torch's own ways into and out of a transform leave the level where they are interrupted, or fail over it.
    """
    depth = DEPTH() if DEPTH and UNDO else None
    earlier = sys.exception()  # being handled where this is called
    try:
        yield
    except BaseException as error:
        if depth is not None and DEPTH() > depth:
            clear_frames(error.__traceback__)  # what waits there to take a level down does so now
            if DEPTH() > depth:
                UNDO(depth)
        cause: BaseException | None = error
        while cause and cause is not earlier and not isinstance(cause, KeyboardInterrupt):
            cause = cause.__context__
        if cause and cause is not earlier and cause is not error:
            raise cause from None
        raise


def in_one_vmap() -> bool:
    """Whether one `vmap` is at work, and no other of functorch's transforms."""
    if not (COMPLETE and transforming()) or torch.compiler.is_compiling():
        return False
    stack = STACK()
    return stack is not None and len(stack) == 1 and bool(stack[0].key() == VMAP)


class OutsideOfVmap:
    """In this block the one transform at work is not: operations on the tensors below it are plain ones."""

    layer: Any = None

    def __enter__(self) -> None:
        self.layer = POP() if transforming() else None

    def __exit__(self, *_: object) -> None:
        if self.layer is not None:
            PUSH(self.layer)


def function_modes() -> list[Any] | None:
    """The modes of this thread that see torch's functions; None where torch cannot say."""
    return list(FUNCTION_MODES()) if FUNCTION_MODES else None


def watched() -> bool:
    """Whether this thread has a mode of torch's on, such as a watch or autocast, that other threads would not have."""
    if not (FUNCTION_MODES and DISPATCH_MODES):
        return True
    modes = DISPATCH_MODES() or FUNCTION_MODES()
    return bool(modes) or torch.is_autocast_enabled("cpu") or torch.is_inference_mode_enabled()


def unwatched() -> bool:
    """Whether none but functorch and `mtlib.objective` sees what this thread computes: no mode of torch's, no hook of all modules.

    What `mtlib.objective` looks for at the first call alone is no reason for another rounding there: a run that is resumed
    equals one that was not stopped, bit for bit.
    """
    if not (FUNCTION_MODES and DISPATCH_MODES) or FORWARD_LEVEL is None or None in HOOKS:
        return False
    before, *others = HOOKS
    return not (
        any(others)
        or DISPATCH_MODES()
        or torch.is_autocast_enabled("cpu")
        or torch.is_autocast_enabled("cuda")
        or torch.autograd.forward_ad._current_level >= 0
    ) and all(eye.__module__ == "mtlib.objective" for eye in (*before.values(), *FUNCTION_MODES()))


def untouched(module: torch.nn.Module) -> bool:
    """Whether nobody looks at what a module reads and gives, or has put a function in its place."""
    own = vars(module)
    return not ("forward" in own or any(own[k] for k in MODULE_HOOKS))


def twice_differentiable() -> AbstractContextManager[Any]:
    """Attention in this block has second derivatives: torch's math kernel computes it."""
    return sdpa_kernel(SDPBackend.MATH) if torch.compiler.is_compiling() else MATH.held()


def differentiated_again(tensors: Iterable[Any]) -> bool:
    """Whether functorch takes a gradient of these tensors under `vmap`, which a graph outside of it differentiates again.

    The second derivatives of some operations are wrong there. True where torch cannot say.
    """
    if not (STACK and VMAP and IS_WRAPPED and UNWRAPPED and LEVEL_OF):
        return True
    levels = STACK() or []
    mapped = next((i for i, level in enumerate(levels) if level.key() == VMAP), len(levels))
    if all(level.key() == VMAP for level in levels[mapped:]):
        return False
    for v in tensors:
        while isinstance(v, Tensor) and IS_WRAPPED(v) and LEVEL_OF(v) >= levels[mapped].level():
            v = UNWRAPPED(v)
        while isinstance(v, Tensor):
            if v.requires_grad:
                return True
            v = UNWRAPPED(v) if IS_WRAPPED(v) else None
    return False


def mapped(x: Tensor) -> bool:
    """Whether `vmap` gives each task an x of its own; True where torch cannot say."""
    if not (IS_WRAPPED and UNWRAPPED and IS_BATCHED):
        return True
    while IS_WRAPPED(x):
        if IS_BATCHED(x):
            return True
        x = UNWRAPPED(x)
    return False


class _Reference(threading.local):
    """Whether this thread's gradients are all taken by functorch."""

    on = False


_REFERENCE = _Reference()


@contextmanager
def by_reference() -> Iterator[None]:
    """Gradients in this block are the reference's, as in a program of `torch.compile`."""
    before, _REFERENCE.on = _REFERENCE.on, True
    try:
        yield
    finally:
        _REFERENCE.on = before


def gradient(loss: Callable[[Params], Tensor], theta: Params) -> Params:
    """∇L(θ) as `torch.func.grad` gives it, but by plain autograd where possible, which takes a fifth less time.

    It is possible outside of functorch's transforms, and in one `vmap`, where the tasks' θ are stacked and
    ∂Σ_t L_t(θ_t)/∂θ_t is each task's own gradient. Where gradients are enabled it may be differentiated again, attention
    too.
    """
    if not torch.is_grad_enabled():
        return _gradient(loss, theta)
    with twice_differentiable():
        return _gradient(loss, theta)


def _gradient(loss: Callable[[Params], Tensor], theta: Params) -> Params:
    outer, way = torch.is_grad_enabled(), way_to_autograd()
    loss = scalar(loss)
    if way is None:
        return outside_inference(reference, loss, theta)
    stacked = {k: way[0](v) for k, v in theta.items()}
    if outer and not any(v.requires_grad for v in stacked.values()):
        return reference(loss, theta)
    try:
        return _by_autograd(loss, stacked, *way)
    except RuntimeError as error:  # plain autograd saves no tensor made in inference mode
        if outer or "nference tensor" not in str(error):
            raise
        return reference(loss, theta)


def _by_autograd(
    loss: Callable[[Params], Tensor],
    stacked: Params,
    unwrap: Callable[[Tensor], Tensor],
    rewrap: Callable[[Tensor], Tensor],
) -> Params:
    outer = torch.is_grad_enabled()
    with torch.enable_grad():  # aliases: L may read the same tensors elsewhere, as an anchor
        point = {k: v.view_as(v) if outer else v.detach() for k, v in stacked.items()}
        with IN_PLACE(True):
            point = {k: v if v.requires_grad else v.requires_grad_() for k, v in point.items()}
        value = loss({k: rewrap(v) for k, v in point.items()})
        value = unwrap(value)
        if not value.requires_grad:  # it does not read θ
            return {k: rewrap(torch.zeros_like(v)) for k, v in stacked.items()}
        with OutsideOfVmap():
            g = torch.autograd.grad(
                value.sum(), list(point.values()), create_graph=outer, materialize_grads=True
            )
    return dict(zip(stacked, map(rewrap, g), strict=True))


def compiler_options(phi: Params) -> dict[str, Any] | None:
    """What `torch.compile` is told: on a CPU kernels are called from C++, a sixth less time for a small network."""
    settings = "torch._inductor.config"  # slow to import, so not before it is needed
    known = all(v.is_cpu for v in phi.values()) and private(settings, "cpp_wrapper") is not None
    return {"cpp_wrapper": True} if known else None


def outside_inference(f: Callable[..., _Result], *args: Any) -> _Result:
    """f(*args), in `torch.no_grad` where it was called in inference mode: before torch 2.12 `torch.func.grad` gives zeros there."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return f(*args)
    with torch.inference_mode(False), torch.no_grad():
        return f(*args)


def scalar(loss: Callable[[Params], Tensor]) -> Callable[[Params], Tensor]:
    """L(θ), and ValueError where it is no scalar."""

    def checked(theta: Params) -> Tensor:
        value = loss(theta)
        expect(
            isinstance(value, Tensor) and not value.ndim, "a loss that is a scalar tensor", value
        )
        return value

    return checked


def way_to_autograd() -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None:
    """(unwrap, rewrap) for the tensors of one `vmap`, tasks first; as they are outside of it; None anywhere else."""
    if (
        torch.compiler.is_compiling()
        or plain()
        or not COMPLETE
        or _REFERENCE.on
        or torch.is_inference_mode_enabled()
    ):
        return None
    if not transforming():
        return (lambda v: v), (lambda v: v)
    if not in_one_vmap():
        return None
    (layer,) = STACK()
    level, size = layer.level(), LEVEL(layer).batchSize()

    def unwrap(v: Tensor) -> Tensor:
        if IS_BATCHED(v):
            stacked: Tensor = UNWRAPPED(v)
            return stacked.movedim(axis, 0) if (axis := BATCH_DIM(v)) else stacked
        return v.expand(size, *v.shape)

    return unwrap, lambda v: ADD_BATCH_DIM(v, 0, level)


def along(theta: Params, rates: dict[str, Any], u: Params) -> Params:
    """θ − αu, entry by entry: one operation for each where α are numbers, in one `vmap` outside of it."""
    if plain() or not all(_shifted(v, rates[k], u[k]) for k, v in theta.items()):
        return {k: v - rates[k] * u[k] for k, v in theta.items()}
    way = way_to_autograd() if in_one_vmap() else None
    unwrap, rewrap = way or ((lambda v: v), (lambda v: v))
    triples = [(unwrap(v), unwrap(u[k]), rates[k]) for k, v in theta.items()]
    with OutsideOfVmap() if way else nullcontext():
        moved = [torch.sub(v, d, alpha=a) for v, d, a in triples]
    return dict(zip(theta, map(rewrap, moved), strict=True))


def _shifted(v: Tensor, a: Any, d: Any) -> bool:
    """Whether v − αd is torch's `sub`: a user's rule and rates may give something else."""
    return type(a) is float and isinstance(d, Tensor) and d.shape == v.shape and d.dtype == v.dtype


ways.gradient, ways.along = gradient, along
