"""Norm, 2×2 max-pool and ReLU as one operation, and the convolution before it, against the three one by one."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn
from torch.nn.functional import max_pool2d

from mtlib.nets import Blocks, conv4, together
from mtlib.norm import Norm, moments
from mtlib.run import block, compiled
from mtlib.run.convolution import convolution, convolves

pytestmark = pytest.mark.fast
HAS = block._kernels(torch.float64)
kernels = pytest.mark.skipif(HAS is None, reason="no C compiler here")
SHAPES = [(5, 16, 8, 8), (3, 6, 7, 9), (2, 1, 2, 3), (1, 5, 6, 5), (4, 33, 5, 4)]
LAST = torch.channels_last


def written_out(x, weight, bias, eps=1e-5):
    mean, var = (m.view(-1, 1, 1) for m in moments(x))
    y = (x - mean) * (var + eps).rsqrt() * weight.view(-1, 1, 1) + bias.view(-1, 1, 1)
    return torch.relu(max_pool2d(y, 2))


def as_one(x, weight, bias, eps=1e-5):
    return block.norm_pool_relu(x, weight, bias, eps)


def last(x):
    _, c, h, w = x.shape
    return x.contiguous(memory_format=LAST).as_strided(x.shape, (c * h * w, 1, c * w, c))


def inputs(shape, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    sizes = (shape, shape[1:2], shape[1:2])
    x, w, b = (torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in sizes)
    return [last(x), w, b]


def orders(f, args, seed=1):
    """Values, gradients, and the gradients of a linear form of those."""
    at = [last(a.clone()) if a.ndim == 4 else a.clone() for a in args]
    at = [a.requires_grad_() for a in at]
    y = f(*at)
    first = torch.autograd.grad((y**3).sum() + y.sin().sum(), at, create_graph=True)
    g = torch.Generator().manual_seed(seed)
    ways = [torch.randn(a.shape, generator=g, dtype=torch.float64).to(a.dtype) for a in at]
    second = torch.autograd.grad(sum((a * b).sum() for a, b in zip(first, ways, strict=True)), at)
    return [y, *first, *second]


def gaps(left, right):
    return [
        float((a - b).detach().norm() / b.detach().norm().clamp_min(1e-30))
        for a, b in zip(left, right, strict=True)
    ]


@kernels
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_both_orders_equal_the_formula_also_where_the_pool_drops_a_row(shape):
    args = inputs(shape)
    assert block.fits(*args)
    assert max(gaps(orders(as_one, args), orders(written_out, args))) <= 1e-10


@kernels
def test_gradcheck():
    args = [a.requires_grad_() for a in inputs((2, 3, 5, 4))]
    assert torch.autograd.gradcheck(as_one, args) and torch.autograd.gradgradcheck(as_one, args)


@kernels
def test_single_precision_is_as_close_to_double_as_the_formula_is():
    args = inputs((40, 32, 21, 21), torch.float32)
    args[0] = last(args[0] * 0.1 + 30)  # a mean far from 0
    exact = orders(written_out, [a.double() for a in args])
    ours, theirs = (
        gaps([t.double() for t in orders(f, args)], exact) for f in (as_one, written_out)
    )
    assert ours[0] <= 1e-3 and all(
        a <= 3 * b + 1e-5 for a, b in zip(ours[:4], theirs[:4], strict=True)
    )


@kernels
def test_ties_go_to_the_first_of_a_window_and_nothing_passes_where_the_winner_is_zero():
    x, weight, bias = inputs((3, 4, 6, 6))
    x = last(x.round())  # many equal numbers in a window
    weight = torch.tensor([1.0, -1.0, 0.0, 2.0], dtype=torch.float64)
    bias = torch.tensor([0.1, 0.1, 0.3, 0.0], dtype=torch.float64)
    assert (
        max(gaps(orders(as_one, (x, weight, bias)), orders(written_out, (x, weight, bias))))
        <= 1e-10
    )
    flat = last(
        torch.ones(2, 1, 2, 2, dtype=torch.float64)
    ).requires_grad_()  # y = β = 0 everywhere
    one, zero = (
        torch.ones(1, dtype=torch.float64),
        torch.zeros(1, dtype=torch.float64, requires_grad=True),
    )
    y = as_one(flat, one, zero)
    assert not y.any() and not torch.autograd.grad(y.sum(), zero)[0].any()


@kernels
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_come_through_in_their_channel_alone(bad):
    x, weight, bias = inputs((3, 4, 6, 6))
    x[1, 2, 3, 3] = bad
    ours, theirs = as_one(x, weight, bias), written_out(x, weight, bias)
    assert torch.equal(ours.isnan(), theirs.isnan()) and bool(ours[:, 2].isnan().any())
    assert bool(ours[:, [0, 1, 3]].isfinite().all())


@kernels
def test_the_third_order_is_refused_not_wrong():
    args = [a.requires_grad_() for a in inputs((2, 3, 4, 4))]
    g = torch.autograd.grad((as_one(*args) ** 3).sum(), args[0], create_graph=True)[0]
    gg = torch.autograd.grad((g**2).sum(), args[0], create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="not of third"):
        torch.autograd.grad((gg**2).sum(), args[0])


@kernels
def test_a_backward_pass_under_vmap_is_right():
    args = [a.requires_grad_() for a in inputs((2, 3, 4, 4))]
    ways = torch.randn(5, 2, 3, 2, 2, dtype=torch.float64)
    for f in (as_one, written_out):
        y = f(*args)
        many = torch.autograd.grad(y, args, ways, is_grads_batched=True, retain_graph=True)
        for t, way in enumerate(ways):
            one = torch.autograd.grad(written_out(*args), args, way)
            assert max(gaps([m[t] for m in many], one)) <= 1e-10


@kernels
def test_the_number_of_threads_changes_no_digit():
    args, before = inputs((6, 16, 42, 42), torch.float32), torch.get_num_threads()
    try:
        found = []
        for n in (1, 2):
            torch.set_num_threads(n)
            found.append(orders(as_one, args))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *found))


@kernels
def test_calls_on_several_threads_do_not_meet():
    args = [inputs((4, 16, 12, 12), seed=s) for s in range(4)]
    alone, found = [orders(as_one, a) for a in args], {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: orders(as_one, args[i])}))
        for i in range(4)
    ]
    [t.start() for t in threads], [t.join() for t in threads]
    assert all(torch.equal(a, b) for i in range(4) for a, b in zip(alone[i], found[i], strict=True))


# In a network ---------------------------------------------------------------------------------


def both_ways(monkeypatch, net, x):
    """The network's values and gradients of both orders with the kernels, and with MTLIB_PLAIN=1."""
    found = []
    for plain in ("0", "1"):
        monkeypatch.setenv("MTLIB_PLAIN", plain)
        at = list(net.parameters())
        y = net(x)
        first = torch.autograd.grad((y**2).sum(), at, create_graph=True)
        ways = [torch.arange(t.numel(), dtype=t.dtype).cos().view_as(t) for t in at]
        second = torch.autograd.grad(
            sum((a * b).sum() for a, b in zip(first, ways, strict=True)), at
        )
        found.append([y, *first, *second])
    return found


@pytest.mark.parametrize("size", [16, 21])
@pytest.mark.parametrize("channels", [1, 3])
def test_conv4_equals_the_plain_reference(monkeypatch, size, channels):
    net = conv4(3, channels, 8, size, seed=0).double()
    x = torch.rand(
        4, channels, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    for given in (
        x,
        x.contiguous(memory_format=LAST),
        x.expand(4, channels, size, size)[:, :, :, :].flip(0),
    ):
        assert max(gaps(*both_ways(monkeypatch, net, given))) <= 1e-10


def test_hooks_other_pools_and_stored_statistics_take_the_modules_one_by_one():
    norm, pool, relu = Norm(4), nn.MaxPool2d(2), nn.ReLU()
    assert together(norm, pool, relu)
    assert not together(norm, nn.MaxPool2d(3), relu) and not together(
        norm, nn.MaxPool2d(2, padding=1), relu
    )
    assert not together(norm, nn.AvgPool2d(2), relu) and not together(norm, pool) and not together()
    assert not together(norm, nn.MaxPool2d(2, ceil_mode=True), relu)
    seen = []
    pool.register_forward_hook(lambda m, a, y: seen.append(y.shape))
    assert not together(norm, pool, relu)
    net = Blocks(nn.Conv2d(3, 4, 3, bias=False), norm, pool, relu)
    net(last(torch.rand(2, 3, 8, 8)))
    assert seen == [(2, 4, 3, 3)]
    stored = Norm(4, "stored")
    x = last(torch.rand(2, 4, 6, 6))
    assert torch.equal(stored.pooled(x), torch.relu(max_pool2d(stored(x), 2)))


def test_half_precision_under_autocast_takes_the_modules_one_by_one():
    net, x = conv4(3, 1, 8, 16, seed=0), torch.rand(4, 1, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x)
    assert y.dtype == torch.bfloat16 and (y.float() - net(x)).abs().max() <= 0.1


@pytest.mark.parametrize("short", ["weight", "bias"])
def test_scales_of_another_length_are_an_error(short):
    """The kernels would read past their end."""
    norm, x = Norm(4), torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last)
    setattr(norm, short, torch.nn.Parameter(torch.ones(3)))
    for read in (norm, norm.pooled):
        with pytest.raises((RuntimeError, ValueError), match="4"):
            read(x)


def test_what_does_not_fit_is_left_to_torch():
    x, w, b = inputs((2, 3, 4, 4))
    assert not block.fits(x.contiguous(), w, b) and not block.fits(x.float(), w, b)
    assert (
        not block.fits(x[:, :, :1], w, b)
        and not block.fits(x[:0], w, b)
        and not block.fits(x[0], w, b)
    )
    assert not block.fits(x.half(), w.half(), b.half()) and not block.fits(x.to("meta"), w, b)
    with pytest.raises(ValueError, match="expected x of shape"):
        Norm(5).double().pooled(x)


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("how", [{"padding": 1}, {"stride": 2}, {"dilation": 2, "padding": 1}])
def test_the_convolution_equals_torchs_to_third_order(wanted, how):
    g = torch.Generator().manual_seed(0)
    module = nn.Conv2d(3, 4, 3, bias=False, **how).double()
    x = torch.randn(2, 3, 7, 8, dtype=torch.float64, generator=g).requires_grad_(wanted)
    assert convolves(module, x)
    at, found = [module.weight, *[x] * wanted], []
    for f in (lambda x: convolution(module, x), module):
        y, out = f(x), []
        value = (y**3).sum()
        for order in range(3):
            grads = torch.autograd.grad(value, at, create_graph=order < 2)
            value = sum((t**2).sum() for t in grads)
            out += grads
        found.append([y, *out])
    assert max(gaps(*found)) <= 1e-10
    biased, grouped = nn.Conv2d(4, 4, 3).double(), nn.Conv2d(4, 4, 3, groups=2, bias=False).double()
    assert not convolves(biased, x) and not convolves(grouped, x)
    assert not convolves(nn.Conv2d(3, 4, 3, padding="same", bias=False).double(), x)


# The library ----------------------------------------------------------------------------------


def compiler(folder, text):
    path = folder / "cc"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.mark.parametrize(
    "text", ["echo broken >&2; exit 1", "exit 0", 'echo nonsense > "${@: -1}"']
)
def test_a_compiler_that_is_broken_gives_no_library_and_no_word(monkeypatch, tmp_path, capfd, text):
    monkeypatch.setenv("CC", compiler(tmp_path, text))
    monkeypatch.setattr(compiled, "folder", lambda: tmp_path / "kept")
    assert compiled.library("block", REAL="float") is None
    monkeypatch.setenv("CC", str(tmp_path / "absent"))
    assert compiled.library("block", REAL="float") is None
    assert capfd.readouterr() == ("", "")


@kernels
def test_a_folder_that_cannot_be_written_costs_the_keeping_alone(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(compiled, "folder", lambda: tmp_path / "file" / "kept")
    assert compiled.library("block", REAL="float") is not None


@kernels
def test_a_library_is_kept_and_found_again(monkeypatch, tmp_path):
    monkeypatch.setattr(compiled, "folder", lambda: tmp_path / "kept")
    assert compiled.library("block", REAL="float") is not None
    (kept,) = (tmp_path / "kept").iterdir()
    monkeypatch.setattr(compiled, "_run", lambda *command: pytest.fail("compiled again"))
    assert compiled.library("block", REAL="float") is not None and kept.suffix == ".so"


@kernels
def test_the_first_call_may_be_in_inference_mode_or_without_gradients():
    args = inputs((2, 3, 4, 4))
    block._kernels.cache_clear()
    with torch.inference_mode():
        found = as_one(*args)
    block._kernels.cache_clear()
    with torch.no_grad():
        assert torch.equal(as_one(*args), found)
    assert gaps([found.clone()], [written_out(*args)])[0] <= 1e-10


@kernels
def test_kernels_that_are_wrong_are_not_used():
    class Wrong(block._Kernels):
        def twice(self, *given):
            to_g, to_x, to_weight = super().twice(*given)
            return to_g, to_x * 1.001, to_weight

    wrong = Wrong(HAS.functions)
    assert block._right(HAS, torch.float64)
    assert not block._right(wrong, torch.float64)


def test_without_a_compiler_the_network_gives_the_same_numbers(tmp_path):
    code = (
        "import torch; from mtlib.nets import conv4; net = conv4(3, 1, 8, 16, seed=0).double();"
        "x = torch.arange(1024.0).sin().view(4, 1, 16, 16).double(); print(net(x).sum().item())"
    )
    found = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "CC": cc},
            capture_output=True,
            text=True,
            check=True,
        )
        for cc in ("cc", str(tmp_path / "absent"))
    ]
    assert abs(float(found[0].stdout) - float(found[1].stdout)) <= 1e-9
    assert not found[0].stderr and not found[1].stderr
