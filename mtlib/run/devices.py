"""What differs from device to device: whether it has float64, and how it keeps its random state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mtlib.core import expect


def double(x: Tensor) -> Tensor:
    """x in float64: where it is, or on the CPU where its device has no float64 (Apple's MPS, for one)."""
    expect(isinstance(x, Tensor), "a tensor", x)
    try:
        return x.double()
    except (TypeError, RuntimeError):
        return x.cpu().double()


def random_states() -> list[tuple[Callable[[Tensor], None], Tensor]]:
    """torch's random state: of the CPU, and of each device that is in use. Each comes with what puts it back."""
    states: list[tuple[Callable[[Tensor], None], Tensor]]
    states = [(torch.set_rng_state, torch.get_rng_state())]
    if (device := torch.accelerator.current_accelerator()) is None:
        return states
    module: Any = torch.get_device_module(device)
    if device.type == "mps":  # the one that takes no number of a device
        here = torch.backends.mps.is_available()
        return [*states, (module.set_rng_state, module.get_rng_state())] if here else states
    used = getattr(module, "is_initialized", module.is_available)()
    numbers = range(module.device_count() if used else 0)
    put = [partial(module.set_rng_state, device=i) for i in numbers]
    return [*states, *((f, module.get_rng_state(i)) for i, f in zip(numbers, put, strict=True))]


@contextmanager
def random_kept() -> Iterator[None]:
    """torch's random state is afterwards as it was before, on the CPU and on each device that is in use."""
    states = random_states()
    try:
        yield
    finally:
        for put, state in states:
            put(state)
