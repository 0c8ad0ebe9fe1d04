"""Numbers where formulas are delicate: equal eigenvalues, certain predictions, large means, bad rates, half precision."""

from __future__ import annotations

import math
from collections import OrderedDict
from functools import partial

import pytest
import torch
from problems import normal, seeded, vectors
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from mtlib.bilevel import bilevel, first_order, implicit, secant, unrolled
from mtlib.core import Batch, Episode, over, parameters
from mtlib.evaluate import evaluate
from mtlib.joint import joint, toward
from mtlib.learners.closed_form import ridge
from mtlib.learners.context import cavia, protomaml
from mtlib.learners.finetune import (
    bss,
    delta,
    discriminative,
    finetune,
    gradual,
    l2_sp,
    layers,
    linear_probe,
    spectral_sum,
)
from mtlib.learners.gradient import adam, anil, boil, constant, descend, maml
from mtlib.learners.hyper import distilled, reweighted, weight_decay
from mtlib.learners.lora import lora
from mtlib.learners.metric import PAIRS, protonet, simpleshot, squared_distances
from mtlib.learners.policy import policy_gradient
from mtlib.learners.preconditioned import learned, meta_curvature, meta_sgd, per_step_rates
from mtlib.learners.transductive import nearest
from mtlib.models.backbones import split
from mtlib.nets import conv2, conv4, mlp, two_halves
from mtlib.run.cost import peak_memory
from mtlib.tasks import one_hot
from mtlib.train import fit
from mtlib.transfer.align import afn, bsp, coral, entropy, jan, kernel, mcc, mmd
from mtlib.transfer.critics import adversary, cdan, dann, mcd, mdd, reverse
from mtlib.transfer.transferability import (
    evidence_maximum,
    h_score,
    leep,
    log_evidence,
    logme,
    nce,
    transrate,
)
from mtlib.transfer.unseen import group_dro, group_weights, irm, mldg, vrex
from mtlib.transfer.weights import (
    balances,
    best_alpha,
    best_weights,
    gradnorm,
    log_variances,
    pcgrad,
    uncertainty,
    without_conflict,
)

BAD = (-0.1, math.nan, math.inf)


def tiny(seed=0, inputs=3, outputs=2):
    return seeded(lambda: mlp(inputs, (5, 4), outputs), seed)


def finite(*tensors):
    return all(bool(torch.isfinite(t).all()) for t in tensors)


def hessian(f, z):
    return torch.func.jacrev(torch.func.grad(lambda v: f(v.view_as(z))))(z.flatten())


def along(f, z, v):
    """H v, the derivative of f's gradient along v."""
    return torch.func.vjp(torch.func.grad(f), z)[1](v)[0]


# Spectra -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 6), (6, 4)])
@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_a_spectral_sum_has_the_derivatives_of_the_eigenvalues(shape, largest, k):
    """First and second, against torch's own, which is exact where all eigenvalues differ, and against differences."""

    def plain(z):
        gram = z @ z.mT if len(z) <= z.shape[1] else z.mT @ z
        squares = torch.linalg.eigvalsh(gram)
        return squares[-k:].sum() if largest else squares[:k].sum()

    ours, z = partial(spectral_sum, k=k, largest=largest), normal(*shape)
    assert torch.allclose(ours(z), plain(z), rtol=1e-12)
    slope = torch.func.grad(ours)(z)
    assert torch.allclose(slope, torch.func.grad(plain)(z), rtol=1e-10, atol=1e-12)
    assert torch.allclose(hessian(ours, z), hessian(plain, z), rtol=1e-8, atol=1e-9)
    step = 1e-5 * normal(*shape, seed=1)
    difference = (torch.func.grad(ours)(z + step) - torch.func.grad(ours)(z - step)) / 2
    assert torch.allclose(along(ours, z, step), difference, rtol=1e-5, atol=1e-12)


def degenerate():
    """Equal items, units that are always 0, all items equal, all features 0, all singular values equal."""
    z = normal(6, 4)
    same, dead = z.clone(), z.relu()
    same[1] = same[0]
    dead[:, :2] = 0
    return {
        "equal items": same[:4],
        "equal items, more than features": torch.cat([same[:2], same[:2], same[:2]]),
        "dead units": dead,
        "one item": z[:1].expand(4, -1),
        "zero": torch.zeros(4, 4, dtype=z.dtype),
        "equal values": torch.eye(4, dtype=z.dtype),
    }


@pytest.mark.parametrize("name", degenerate())
@pytest.mark.parametrize("largest", [False, True])
def test_equal_eigenvalues_leave_the_spectrum_its_derivatives(name, largest):
    z = degenerate()[name]
    for k in (1, 2):
        f = partial(spectral_sum, k=k, largest=largest)
        singular = torch.linalg.svdvals(z) ** 2
        expected = singular[:k] if largest else singular[len(singular) - k :]
        assert torch.allclose(f(z), expected.sum(), atol=1e-12)
        first, second = torch.func.grad(f)(z), hessian(f, z)
        assert finite(first, second) and second.abs().max() < 100
    everything = partial(spectral_sum, k=min(z.shape))  # ‖z‖²
    assert torch.allclose(torch.func.grad(everything)(z), 2 * z, atol=1e-12)
    assert torch.allclose(hessian(everything, z), 2 * torch.eye(z.numel()).to(z), atol=1e-12)


def test_the_gradient_of_the_smallest_is_the_projector_on_their_space():
    """Rank 2 of 4: the two smallest σ are 0 and equal; ∂Σλ/∂G = P, and P z = 0; dz in the null space costs ‖dz‖²."""
    z = torch.cat([normal(2, 5), torch.zeros(2, 5, dtype=torch.float64)])
    f = partial(spectral_sum, k=2)
    assert torch.func.grad(f)(z).abs().max() < 1e-12
    away = torch.linalg.svd(z, full_matrices=True)[2][2:].sum(0)  # outside of the rows of z
    v = torch.stack([torch.zeros_like(away)] * 3 + [away])
    assert torch.allclose(along(f, z, v), 2 * v, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, None])
def test_bss_under_unrolled_is_finite_with_equal_items_and_right_without(chunk):
    net, draw = tiny(), vectors()
    learner = finetune(net, mse_loss, 0.1, 3, bss(net, 0.5, smallest=2))
    objective = bilevel(learner, mse_loss, unrolled, chunk=chunk)
    phi = parameters(net)
    phi["body.2.bias"] = phi["body.2.bias"] + 1  # no kink of the ReLU near
    _, g = objective.value_and_grad(phi, draw)
    for k in ("head.bias", "body.0.bias"):
        d = {k: 1e-5 * torch.ones_like(phi[k])}
        up, down = (objective({**phi, k: phi[k] + s * d[k]}, draw) for s in (1, -1))
        assert ((up - down) / 2).item() == pytest.approx((g[k] * d[k]).sum().item(), rel=1e-4)
    same = over(lambda t: t[:, :1].expand(-1, 6, -1), draw)
    phi["body.2.bias"][:2] -= 100  # and dead units
    value, g = objective.value_and_grad(phi, same)
    assert finite(value, *g.values())


@pytest.mark.parametrize("k", [0, -1, 5])
def test_a_spectrum_is_asked_for_as_many_values_as_it_has(k):
    net, z = tiny(), normal(2, 6, 4)
    with pytest.raises(ValueError, match=r"from 1 to 4 singular values of features \(6, 4\), got"):
        bss(net, 1.0, smallest=k)(parameters(net), parameters(net), normal(6, 3))
    with pytest.raises(
        ValueError, match=r"from 1 to 4 singular values|largest to be a whole number of at least 1"
    ):
        bsp(largest=k)({}, z, z)


# Penalties at the edge ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["mmd", "jan", "coral", "bsp", "afn", "mcc", "entropy"])
def test_penalties_are_finite_where_features_coincide_and_predictions_are_certain(name, dtype):
    make = {"mmd": mmd, "jan": jan, "coral": coral, "bsp": bsp, "afn": afn}
    penalty = {**make, "mcc": mcc, "entropy": entropy}[name]()
    sure = torch.zeros(2, 4, 3, dtype=dtype)
    sure[..., 0] = 2000.0
    for z in (torch.zeros(2, 4, 5), torch.ones(2, 4, 5), 1e-18 * torch.rand(2, 4, 5)):
        for logits in (sure, 0 * sure):
            a, b = z.to(dtype).requires_grad_(), logits.clone().requires_grad_()
            value = penalty({}, a, b)
            grads = torch.autograd.grad(value, [a, b], allow_unused=True)
            assert finite(value, *(g for g in grads if g is not None))


def test_entropy_of_certain_predictions_is_zero_and_elsewhere_its_formula():
    logits = normal(2, 5, 3).requires_grad_()
    p = logits[-1].softmax(-1)
    expected = -(p * p.log()).sum(-1).mean()
    value = entropy(2.0)({}, logits, logits)
    assert torch.allclose(value, 2 * expected)
    ours, right = (torch.autograd.grad(v, logits, retain_graph=True)[0] for v in (value, expected))
    assert torch.allclose(ours, 2 * right, atol=1e-14)
    masked = torch.tensor([[[300.0, 0.0, torch.finfo(torch.float32).min]]], requires_grad=True)
    value = entropy()({}, masked, masked)
    assert value == 0 and torch.equal(torch.autograd.grad(value, masked)[0], torch.zeros(1, 1, 3))


def test_the_kernel_of_many_items_is_that_of_few_and_of_half_precision():
    both = normal(600, 8) + 1e3
    squared = torch.cdist(both, both, compute_mode="donot_use_mm_for_euclid_dist") ** 2
    mean = squared.sum() / (600 * 599)
    expected = sum(torch.exp(-squared / (c * mean)) for c in (0.25, 0.5, 1.0, 2.0, 4.0))
    assert PAIRS < 600 * 600 * 8
    assert torch.allclose(kernel(both), expected, atol=1e-8)
    small = 0.01 * normal(6, 4).half()
    assert torch.allclose(kernel(small).double(), kernel(small.double()), atol=1e-5)


NET = tiny()
NEGATIVE = {
    "l2_sp": lambda s: l2_sp(s),
    "l2_sp's head": lambda s: l2_sp(1.0, s),
    "delta": lambda s: delta(NET, s),
    "toward": lambda s: toward(parameters(NET), s),
    "maml": lambda s: maml(NET, mse_loss, 0.1, 1, strength=s),
    "bss": lambda s: bss(NET, s),
    **{f.__name__: f for f in (mmd, jan, coral, bsp, afn, mcc, entropy)},
    **{f.__name__: partial(f, nn.Linear(4, 2)) for f in (dann, cdan, mdd)},
    "mcd": lambda s: mcd(NET, s),
    "reverse": lambda s: reverse(torch.ones(2), s),
    "afn's step": lambda s: afn(step=s),
    "irm": lambda s: irm(NET, mse_loss, s),
    "vrex": lambda s: vrex(NET, mse_loss, s),
    "mldg": lambda s: mldg(NET, mse_loss, 0.1, s),
    "gradnorm": lambda s: gradnorm(NET, mse_loss, s),
    "reweighted": lambda s: reweighted(NET, mse_loss, 0.1, 1, 6, decay=s),
}


@pytest.mark.parametrize("name", NEGATIVE)
@pytest.mark.parametrize("strength", BAD)
def test_a_strength_is_a_number_of_at_least_zero(name, strength):
    with pytest.raises(ValueError, match="of at least 0, got"):
        NEGATIVE[name](strength)
    NEGATIVE[name](0.0)
    NEGATIVE[name](1)


@pytest.mark.parametrize("make", [dann, cdan, mdd])
def test_a_critic_wants_two_domains(make):
    critic = nn.Linear(4, 1)
    with pytest.raises(ValueError, match="at least two domains"):
        make(critic)(adversary(critic), torch.rand(1, 6, 4), torch.rand(1, 6, 2))
    with pytest.raises(ValueError, match="at least two classes, got 1"):
        mdd(critic)(adversary(critic), torch.rand(2, 6, 4), torch.rand(2, 6, 1))


def test_l2_sp_wants_a_body():
    theta = {"0.weight": torch.ones(2, 2)}
    with pytest.raises(ValueError, match=r"entries named body\.\*"):
        l2_sp(1.0)(theta, theta, torch.ones(1, 2))


def test_other_settings_that_are_none_are_refused():
    for s in (0.0, *BAD[:2]):
        with pytest.raises(ValueError, match="expected strength > 0"):
            implicit(s)
        with pytest.raises(ValueError, match="strength > 0"):
            linear_probe(NET, strength=s)
        with pytest.raises(ValueError, match="decay > 0"):
            weight_decay(NET, mse_loss, 0.1, 1, decay=s)
        with pytest.raises(ValueError, match="lr > 0"):
            distilled(NET, mse_loss, s, 1, Batch(torch.rand(2, 3), torch.rand(2, 2)))
        with pytest.raises(ValueError, match="spread > 0"):
            policy_gradient(NET, None, s, 0.1, 1)
        with pytest.raises(ValueError, match="temperature > 0"):
            mcc(temperature=s)
        with pytest.raises(ValueError, match="margin > 0"):
            mdd(nn.Linear(4, 2), margin=s)
        with pytest.raises(ValueError, match="width > 0"):
            mmd(widths=(1.0, s))
    with pytest.raises(ValueError, match="at least one width"):
        jan(widths=())
    with pytest.raises(ValueError, match="negative number of source labels or distance"):
        best_alpha(10, 10, math.nan, 5.0)
    with pytest.raises(ValueError, match="finite offsets"):
        best_weights(torch.ones(2), torch.tensor([[0.0], [math.nan]]))


def test_reweighted_refuses_predictions_of_another_width():
    net = mlp(3, (4,), 1, seed=0)
    data = Batch(torch.rand(6, 3), torch.rand(6, 2))
    learner = reweighted(net, mse_loss, 0.1, 1, 6)
    with pytest.raises(ValueError, match="predictions and targets of one shape"):
        learner.adapt(learner.init(), data)


def test_adams_root_and_the_decay_are_finite_at_zero():
    """Units that are always 0: g = 0, v = 0."""
    net = tiny()
    phi = parameters(net)
    phi["body.0.bias"] = phi["body.0.bias"] - 100
    learner = maml(net, mse_loss, 0.1, 3, rule=adam())
    assert finite(*bilevel(learner, mse_loss).value_and_grad(phi, vectors())[1].values())


# Weights --------------------------------------------------------------------------------------


def test_surgery_goes_by_directions_however_small_the_gradients():
    """‖g‖² underflows below 1e-23 in single precision; g_1 without the part along g_2 is (1, 0)."""
    for size in (1.0, 1e-12, 1e-25):
        g = torch.tensor([[1.0, -1.0], [0.0, size]])
        assert torch.allclose(without_conflict(g)[0], torch.tensor([1.0, 0.0]), atol=1e-6)
    still = torch.tensor([[1.0, -1.0], [0.0, 0.0]])
    assert torch.equal(without_conflict(still), still)


class Two(nn.Module):
    """An entry that only items with a positive first number reach."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 1), nn.Linear(2, 1)

    def forward(self, x):
        return self.a(x) if x[0, 0] > 0 else self.b(x)


def test_surgery_keeps_gradients_of_entries_that_some_data_sets_do_not_reach():
    torch.manual_seed(0)
    net = Two().double()
    x = normal(2, 5, 2).abs()
    x[1] *= -1
    batch = Batch(x, normal(2, 5, 1, seed=1))
    g = pcgrad(net, mse_loss).value_and_grad(parameters(net), batch)[1]
    right = joint(net, mse_loss, chunk=1).value_and_grad(parameters(net), batch)[1]
    assert g.keys() == right.keys() and all(torch.allclose(g[k], right[k]) for k in g)


def test_gradnorm_is_finite_without_risks_and_says_what_it_wants():
    net, batch = tiny(), Batch(normal(2, 6, 3), torch.zeros(2, 6, 2, dtype=torch.float64))
    phi = {k: torch.zeros_like(v) for k, v in parameters(net).items()}
    phi |= balances(torch.ones(2, dtype=torch.float64))
    value, g = gradnorm(net, mse_loss).value_and_grad(phi, batch)
    assert value == 0 and finite(*g.values())
    with pytest.raises(ValueError, match="risks of at least 0"):
        gradnorm(net, lambda p, y: mse_loss(p, y) - 5).value_and_grad(phi, batch)
    with pytest.raises(ValueError, match="no such parameter"):
        gradnorm(net, mse_loss, layer="body.7.weight")
    del phi["weight.initial"]
    with pytest.raises(ValueError, match=r"an entry 'weight\.initial'"):
        gradnorm(net, mse_loss).value_and_grad(phi, batch)


@pytest.mark.parametrize("sizes", [(1, 6), (2, 1), (1, 1)])
def test_one_domain_or_one_item_of_each_is_finite_and_one_domain_is_joint_training(sizes):
    net, (sets, items) = tiny(), sizes
    batch = Batch(normal(sets, items, 3), normal(sets, items, 2, seed=1))
    phi = parameters(net)
    plain = joint(net, mse_loss).value_and_grad(phi, batch)[1]
    dtype = {"dtype": torch.float64}
    for make, own in (
        (irm(net, mse_loss, 0.0), {}),
        (vrex(net, mse_loss, 3.0), {}),
        (pcgrad(net, mse_loss), {}),
        (group_dro(net, mse_loss), group_weights(sets)),
        (uncertainty(net, mse_loss), log_variances(sets)),
        (gradnorm(net, mse_loss), balances(torch.ones(sets, **dtype))),
    ):
        value, g = make.value_and_grad({**phi, **own}, batch)
        assert finite(value, *g.values())
        if sets == 1:
            assert all(torch.allclose(g[k], plain[k]) for k in plain)
    for penalty in (entropy(), mcc(), afn(), bsp()):
        z = normal(sets, items, 4).requires_grad_()
        value = penalty({}, z, z)
        assert finite(value, *torch.autograd.grad(value, z))


# Layers ---------------------------------------------------------------------------------------


class Residual(nn.Module):
    """A stage's block, as in torchvision's ResNet-18."""

    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)


class ResNet(nn.Module):
    """torchvision's names: a stem, four stages of two blocks, a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 7, 2, 3, bias=False), nn.BatchNorm2d(4)
        self.relu, self.maxpool = nn.ReLU(), nn.MaxPool2d(2)
        for i in range(1, 5):
            setattr(self, f"layer{i}", nn.Sequential(Residual(4, 4), Residual(4, 4)))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 10)


class Transformer(nn.Module):
    """An embedding, a token of its own, four layers in a list, a last norm."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.embedding = nn.Embedding(20, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4, norm=nn.LayerNorm(8))


def tops(groups, parts):
    """The first `parts` names of each path in a group."""
    return [sorted({".".join(k.split(".")[:parts]) for k in names}) for names in groups]


def test_a_convolution_and_its_norm_are_one_layer():
    assert tops(layers(conv4()), 2)[:4] == [["body.1"], ["body.2"], ["body.3"], ["body.4"]]
    assert tops(layers(conv2()), 2)[:3] == [
        ["body.1", "body.2"],
        ["body.5", "body.6"],
        ["body.10", "body.11"],
    ]
    stem, *stages, head = tops(layers(split(ResNet(), 5)), 3)
    assert stem == ["body.model.bn1", "body.model.conv1"] and head == ["head.bias", "head.weight"]
    assert stages == [[f"body.model.layer{i}"] for i in range(1, 5)]


def test_a_transformers_layers_are_layers():
    first, *found, last, head = layers(two_halves(Transformer(), nn.Linear(8, 3)))
    assert first == ["body.token", "body.embedding.weight"] and head[0] == "head.weight"
    assert tops(found, 4) == [[f"body.encoder.layers.{i}"] for i in range(3)]
    assert tops([last], 3) == [["body.encoder.layers", "body.encoder.norm"]]


def test_layers_of_small_and_odd_networks():
    def named(net):
        return [names[0] for names in layers(net)]

    one = two_halves(nn.Linear(2, 2), nn.Linear(2, 2))
    assert named(one) == ["body.weight", "head.weight"]
    plain = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.ReLU(), nn.Linear(2, 1))
    assert tops(layers(plain), 1) == [["0", "1"], ["3"]]
    body = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2), nn.Linear(2, 2))
    assert tops(layers(two_halves(body, nn.Linear(2, 1))), 2)[0] == ["body.0", "body.1"]
    turned = nn.Sequential(OrderedDict(head=nn.Linear(2, 1), body=nn.Linear(2, 2)))
    assert named(turned) == ["body.weight", "head.weight"]
    tied = mlp(4, (4, 4), 4, seed=0)
    tied.head.weight = tied.body[2].weight
    assert tops(layers(tied), 2)[-1] == ["head.bias"]


def test_rates_of_plain_networks_are_what_they_were():
    """One module for each layer: lr / factorᵈ, to the bit."""
    net = mlp(3, (4, 4, 4), 2, seed=0)
    rates = discriminative(net, 0.3)
    for depth, name in enumerate(("head", "body.4", "body.2", "body.0")):
        for entry in ("weight", "bias"):
            assert torch.equal(rates[f"{name}.{entry}"], torch.tensor(0.3 / 2.6**depth))


def test_groups_may_be_named():
    net = split(ResNet(), 5)
    stem, deep = (
        ("body.model.conv1", "body.model.bn1"),
        [f"body.model.layer{i}" for i in range(1, 5)],
    )
    groups = [stem, *deep, "head."]
    assert layers(net, groups) == layers(net)
    rates = discriminative(net, 1.0, 2.0, groups=[[*stem, *deep], "head"])
    assert {v.item() for v in rates.values()} == {1.0, 0.5} and rates.keys() == {
        k for k, _ in net.named_parameters()
    }
    opened = gradual(net, 0.1, 3, groups=["body", "head"])
    assert {v.item() for k, v in opened(2).items() if k.startswith("body.")} == {0.0}
    assert all(v == torch.tensor(0.1) for v in opened(3).values())


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (["body", "heads"], "none is under 'heads'"),
        (["body.2", "head"], r"in no group: \['body.0.weight', 'body.0.bias'\]"),
        (["body", "body.0", "head"], r"in two groups or more: \['body.0.weight'"),
        (["bod", "head"], "none is under 'bod'"),
        ([], "in no group"),
    ],
)
def test_groups_take_each_parameter_once(groups, message):
    with pytest.raises(ValueError, match=message):
        discriminative(mlp(3, (4, 4), 2, seed=0), 0.1, groups=groups)


def test_a_rate_that_stands_still_is_told():
    net = mlp(2, (2,) * 25, 2, seed=0)
    with pytest.warns(UserWarning, match="with 26 layers .* it stands still"):
        discriminative(net, 0.1)
    for make in (lambda lr: discriminative(NET, lr), lambda lr: gradual(NET, lr, 1)):
        for lr in BAD:
            with pytest.raises(ValueError, match="finite lr of at least 0"):
                make(lr)
    with pytest.raises(ValueError, match="factor > 0"):
        discriminative(NET, 0.1, 0.0)


# Autocast -------------------------------------------------------------------------------------


def draws(step):
    x = torch.rand(2, 6, 3, generator=torch.Generator().manual_seed(step))
    batch = Batch(x, torch.eye(2).repeat(3, 1).expand(2, -1, -1))
    return Episode(batch, batch)


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


WIDE = mlp(3, (64, 64), 2, seed=0)
LONG = {  # name -> work of so many calls
    "evaluate": lambda n: evaluate(
        maml(WIDE, cross_entropy, 0.1, 2), parameters(WIDE), draws, 2 * n, chunk=1, progress=False
    ),
    "fit, a loop": lambda n: (
        fit(
            bilevel(maml(WIDE, cross_entropy, 0.1, 2), cross_entropy, chunk=1),
            parameters(WIDE),
            draws,
            n,
            partial(torch.optim.SGD, lr=0.1),
        ).params
    ),
    "fit, coupled": lambda n: (
        fit(
            joint(WIDE, cross_entropy, penalties=[coral()]),
            parameters(WIDE),
            lambda step: draws(step).support,
            n,
            partial(torch.optim.SGD, lr=0.1),
        ).params
    ),
    "fit, surgery": lambda n: (
        fit(
            pcgrad(WIDE, cross_entropy),
            parameters(WIDE),
            lambda step: draws(step).support,
            n,
            partial(torch.optim.SGD, lr=0.1),
        ).params
    ),
}


@pytest.mark.parametrize("name", LONG)
def test_autocast_around_a_loop_keeps_no_casts_of_what_is_done(name):
    def peak(n):
        with autocast():
            return peak_memory(LONG[name], n)

    few = peak(6)
    assert peak(24) < few + 4 * sum(v.numel() for v in parameters(WIDE).values())


def test_forgetting_casts_changes_no_bit(monkeypatch):
    def numbers():
        with autocast():
            return LONG["evaluate"](6).values, LONG["fit, a loop"](4)

    score, phi = numbers()
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: None)
    kept, other = numbers()
    assert torch.equal(score, kept) and all(torch.equal(phi[k], other[k]) for k in phi)


# Distances ------------------------------------------------------------------------------------


def differences(a, b):
    return ((a[:, None] - b[None]) ** 2).sum(-1)


@pytest.mark.parametrize("mean", [0.0, 1e3, 1e6])
def test_many_distances_keep_their_digits_under_a_large_common_mean(mean):
    a, b = (normal(n, 256, seed=n) for n in (90, 100))
    right = differences(a, b)
    a, b = (a + mean).float(), (b + mean).float()
    assert len(a) * len(b) * 256 > PAIRS
    found, plain = squared_distances(a, b).double(), differences(a.double(), b.double())
    assert torch.allclose(found, plain, rtol=1e-5)
    assert mean > 1e3 or torch.allclose(found, right, rtol=1e-3)


def test_many_distances_have_exact_derivatives_of_both_orders():
    a, b = normal(70, 150, seed=1) + 10, normal(101, 150, seed=2) + 10
    assert len(a) * len(b) * 150 > PAIRS
    weights = normal(70, 101, seed=3)

    def both(f):
        def value(a, b):
            return (weights * (-f(a, b) / 100).exp()).sum()

        slopes, back = torch.func.vjp(torch.func.grad(value, (0, 1)), a, b)
        return slopes, back((normal(70, 150, seed=4), normal(101, 150, seed=5)))

    for ours, right in zip(both(squared_distances), both(differences), strict=True):
        assert all(
            torch.allclose(u, v, rtol=1e-9, atol=1e-10) for u, v in zip(ours, right, strict=True)
        )


def test_many_distances_are_not_negative_and_have_slopes_where_items_coincide():
    a = normal(110, 100).float()
    d = squared_distances(a, a)
    assert len(a) ** 2 * 100 > PAIRS and d.min() >= 0 and d.diagonal().max() < 1e-3
    first = torch.func.grad(lambda v: squared_distances(v, a).diagonal().sum())
    slope, back = torch.func.vjp(first, a)
    assert slope.abs().max() < 1e-5 and torch.allclose(back(a)[0], 2 * a)
    z = a.double()
    right = differences(z, z) + torch.diag(torch.full((110,), torch.inf))
    order = right.argsort(1).argsort(1)
    assert torch.equal(nearest(a, 3), (order < 3).float())


def test_a_thousand_classes_need_little_memory_and_agree_under_vmap():
    net = mlp(8, (64,), 2, seed=0)
    support = Batch(torch.rand(1000, 8), torch.eye(1000))
    query = torch.rand(100, 8)
    for make in (protonet, simpleshot):
        learner = make(net)
        theta = learner.adapt(learner.init(), support)
        assert peak_memory(learner.predict, theta, query) < 4e6  # differences: 26e6
    a, b = normal(2, 110, 100), normal(2, 100, 100, seed=1)
    ours = torch.vmap(squared_distances)(a, b)
    assert torch.allclose(ours, torch.stack([differences(*p) for p in zip(a, b, strict=True)]))


def test_few_distances_are_the_differences_to_the_bit():
    for items, classes, width in ((75, 5, 1600), (300, 20, 64), (128, 128, 64)):
        a, b = torch.randn(items, width), torch.randn(classes, width)
        assert torch.equal(squared_distances(a, b), differences(a, b))


# Transferability ------------------------------------------------------------------------------


def evidence(f, t, alpha, beta):
    """log N(t; 0, I/β + f fᵀ/α), from the covariance itself."""
    f, t = f.double(), t.double()
    covariance = torch.eye(len(f)).double() / beta + f @ f.mT / alpha
    zero = torch.zeros(len(f)).double()
    return torch.distributions.MultivariateNormal(zero, covariance).log_prob(t).item()


@pytest.mark.parametrize("shape", [(40, 6), (12, 30), (20, 20)])
def test_one_decomposition_gives_every_columns_evidence(shape):
    f = normal(*shape)
    y = torch.arange(len(f)) % 4 + 3  # class numbers need not begin at 0
    targets = one_hot(y - 3, 4).double()
    best = evidence_maximum(f, targets)
    each = [
        evidence(f, *column)
        for column in zip(targets.mT, best.alpha.tolist(), best.beta.tolist(), strict=True)
    ]
    assert logme(f, y) == pytest.approx(sum(each) / 4 / len(f), rel=1e-10)
    for alpha, beta in ((0.3, 2.0), (0.01, 10.0), (50.0, 0.1)):
        t = f[:, 0] + normal(len(f), seed=2)
        assert log_evidence(f, t, alpha, beta) == pytest.approx(
            evidence(f, t, alpha, beta), rel=1e-9
        )


def test_scores_do_not_depend_on_the_numbers_of_the_classes_or_on_a_copy_of_the_items():
    f, y = normal(30, 5), torch.arange(30) % 3
    p = normal(30, 4, seed=1).softmax(1)
    for score, a in ((h_score, f), (logme, f), (transrate, f), (leep, p)):
        assert score(a, y) == pytest.approx(score(a, 7 * y - 5), rel=1e-12)
        assert math.isfinite(score(torch.cat([a, a]), torch.cat([y, y])))
        assert math.isfinite(score(a[:3], y[:3]))  # fewer items than features
        with pytest.raises(ValueError, match="finite numbers"):
            score(torch.full_like(a, torch.nan), y)
        if score is not leep:
            assert math.isfinite(score(torch.ones_like(a), y))  # features that are all the same
            with pytest.raises(ValueError, match="at least 2 classes"):
                score(a, 0 * y)
    z = torch.arange(30) % 4
    assert nce(z, y) == pytest.approx(nce(3 * z + 1, 7 * y - 5), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_leep_takes_half_precision(dtype):
    g = torch.Generator().manual_seed(0)
    p = (3 * torch.randn(200, 300, generator=g)).softmax(1)
    y = torch.randint(5, (200,), generator=g)
    assert leep(p.to(dtype), y) == pytest.approx(leep(p, y), abs=1e-3)
    with pytest.raises(ValueError, match=r"torch\.softmax"):
        leep((2 * p).to(dtype), y)


# Rates ----------------------------------------------------------------------------------------

RATED = {
    "maml": maml,
    "anil": anil,
    "boil": boil,
    "finetune": finetune,
    "lora": lora,
    "cavia": cavia,
    "protomaml": protomaml,
    "meta_sgd": meta_sgd,
    "per_step_rates": per_step_rates,
    "meta_curvature": meta_curvature,
    "weight_decay": weight_decay,
    "reweighted": lambda *a: reweighted(*a, 6),
    "policy_gradient": lambda net, loss, lr, steps: policy_gradient(net, None, 1.0, lr, steps),
}


@pytest.mark.parametrize("name", RATED)
@pytest.mark.parametrize("lr", BAD)
def test_a_rate_is_a_number_of_at_least_zero(name, lr):
    with pytest.raises(ValueError, match=r"expected a finite (lr|rate) of at least 0, got"):
        RATED[name](tiny(), mse_loss, lr, 1)
    RATED[name](tiny(), mse_loss, 0.0, 1)


def test_a_rate_that_follows_the_step_is_looked_at_where_it_is_used():
    support = over(lambda d: d[0], vectors().support)
    learner = maml(tiny(), mse_loss, lambda step: 0.1 - 0.1 * step, 3)
    with pytest.raises(ValueError, match=r"finite rate of at least 0, got -0.1"):
        learner.adapt(learner.init(), support)
    with pytest.raises(ValueError, match=r"finite rate of 'head.bias' of at least 0, got nan"):
        maml(tiny(), mse_loss, {"head.bias": math.nan}, 1)
    learned_rate = maml(tiny(), mse_loss, torch.tensor(-0.1), 1)  # a learned one may go below 0
    assert learned_rate.adapt(learned_rate.init(), support)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: {k: v for k, v in r.items() if k != "head.bias"}, r"none for \['head.bias'\]"),
        (lambda r: {**r, "head.wieght": 0.1}, r"no entry is named \['head.wieght'\]"),
        (lambda r: {**r, "head.bias": torch.ones(3)}, "size of tensor|shape"),
        (
            lambda r: {**r, "head.bias": torch.ones(2, 1)},
            r"'head.bias', .* got rates of shape \(2, 1\)",
        ),
    ],
)
def test_rates_fit_the_entries(change, message):
    net, support = tiny(), over(lambda d: d[0], vectors().support)
    rates = change(discriminative(net, 0.1))
    for lr in (rates, lambda step: rates):
        learner = finetune(net, mse_loss, lr, 1)
        with pytest.raises((ValueError, RuntimeError), match=message):
            learner.adapt(learner.init(), support)


def test_rates_of_entries_that_stay_are_no_error():
    net, support = tiny(), over(lambda d: d[0], vectors().support)
    learner = anil(net, mse_loss, discriminative(net, 0.1), 1)
    plain = anil(net, mse_loss, torch.tensor(0.1), 1)
    a, b = (one.adapt(one.init(), support) for one in (learner, plain))
    assert all(torch.equal(a[k], b[k]) for k in b)
    assert descend(lambda t: t["a"].sum(), {"a": torch.ones(2)}, 0.5, 1)["a"][0] == 0.5


SETTINGS = {
    "meta_sgd": (lambda net: meta_sgd(net, mse_loss, 0.1, 1), "lr.body.0.weight"),
    "per_step_rates": (lambda net: per_step_rates(net, mse_loss, 0.1, 1), "lr.body.0.weight"),
    "meta_curvature": (
        lambda net: meta_curvature(net, mse_loss, 0.1, 1),
        "curvature.body.0.weight.0",
    ),
    "learned": (
        lambda net: learned(
            {"rate.log": torch.zeros((), dtype=torch.float64)},
            lambda own: maml(net, mse_loss, own["rate.log"].exp(), 1),
        ),
        "rate.log",
    ),
    "ridge": (lambda net: ridge(net), "ridge.log_strength"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_hypergradient_that_cannot_reach_a_setting_refuses_it(name):
    make, entry = SETTINGS[name]
    learner = make(tiny())
    for hypergradient in (first_order, secant):
        with pytest.raises(ValueError, match=f"'{entry}'.* would never be trained. Use unrolled"):
            bilevel(learner, mse_loss, hypergradient)
    draw = vectors()
    assert entry in bilevel(learner, mse_loss).value_and_grad(learner.init(), draw)[1]
    for hypergradient in (None, first_order, secant):
        plain = maml(tiny(), mse_loss, 0.1, 1, rule=constant)
        g = bilevel(plain, mse_loss, hypergradient).value_and_grad(plain.init(), draw)[1]
        assert g.keys() == plain.init().keys()


def test_learners_from_the_networks_start_refuse_them_too():
    learner = weight_decay(tiny(), mse_loss, 0.1, 1)
    with pytest.raises(ValueError, match="this one adds"):
        bilevel(learner, mse_loss, first_order).value_and_grad(learner.init(), vectors())


def test_a_learned_learner_keeps_what_its_steps_return():
    net = tiny()
    own = {"rate.log": torch.zeros((), dtype=torch.float64)}
    learner = learned(own, lambda own: weight_decay(net, mse_loss, 0.1, 1)._replace())
    support = over(lambda d: d[0], vectors().support)
    assert learner.adapt(learner.init(), support).keys() == parameters(net).keys()


def test_a_spectral_sum_of_what_is_not_finite_is_nan():
    z = normal(2, 5, 8)
    bad = z.clone()
    bad[1, 0, 0] = torch.inf
    for found in (spectral_sum(bad, 1), torch.vmap(lambda one: spectral_sum(one, 1))(bad)):
        assert found[1].isnan() and torch.allclose(found[0], spectral_sum(z[0], 1))
