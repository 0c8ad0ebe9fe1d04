"""What holds on a device that is not the CPU: the same numbers, up to rounding. `pytest tests/second_device/laws.py`.

Not in a process with other tests: the second device stays. MTLIB_TEST_DEVICE=cuda runs the same on a GPU.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from device import NAME, Unavailable, name, without_float64
from problems import classified, convolutional, images, normal, seeded, vectors
from test_contract import ROWS, WAYS
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from mtlib.bilevel import bilevel, checkpointed, first_order, implicit, multi_step, secant, unrolled
from mtlib.core import Batch, Episode, apply, load, move, over, parameters, start
from mtlib.data.navigation import navigation, walk
from mtlib.data.planted import planted
from mtlib.data.sinusoids import risk_of
from mtlib.evaluate import answers, evaluate, interval, over_classes
from mtlib.joint import joint, toward
from mtlib.learners.amortised import point
from mtlib.learners.finetune import as_is, finetune, fresh_head
from mtlib.learners.gradient import maml
from mtlib.learners.hyper import distilled, flat, reweighted, weight_decay, weighted_ridge
from mtlib.learners.lora import lora, merged
from mtlib.learners.metric import centred, protonet, simpleshot
from mtlib.learners.policy import cost, policy_gradient
from mtlib.learners.preconditioned import meta_sgd
from mtlib.metrics import accuracy, auroc, macro_f1
from mtlib.models import detection
from mtlib.nets import conv4, mlp, two_halves
from mtlib.norm import calibrate
from mtlib.objective import default_chunk, default_threads
from mtlib.run.checkpoint import load_params, save_params
from mtlib.run.copies import evaluating
from mtlib.run.replay import replay
from mtlib.tasks import ClassSet, episodes, mixture
from mtlib.train import early_stopping, fit
from mtlib.transfer import (
    align,
    critics,
    recalibration,
    selection,
    transferability,
    unseen,
    weights,
)

try:
    DEVICE = torch.device(name(), 0)
except Unavailable as reason:
    pytest.skip(str(reason), allow_module_level=True)
ours = pytest.mark.skipif(DEVICE.type != NAME, reason="of the second device alone")


def here(data):
    return move(data, DEVICE)


def places(data):
    found = set()
    over(lambda d: found.add(d.device) or d, data)
    return found


def same(found, expected, atol=1e-9):
    """The same numbers in the same nest; `found` is on the device, or a plain number."""
    if isinstance(expected, torch.Tensor):
        assert found.device == DEVICE
        assert torch.allclose(found.cpu(), expected, rtol=atol, atol=atol, equal_nan=True)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for k, v in expected.items():
            same(found[k], v, atol)
    elif isinstance(expected, tuple | list):
        for a, b in zip(found, expected, strict=True):
            same(a, b, atol)
    else:
        assert found == pytest.approx(expected, abs=atol)


def agrees(objective, phi, data, atol=1e-9):
    """Value and gradient of an objective are the CPU's, with its data and φ on the device, itself not; gives the CPU's."""
    torch.manual_seed(0)
    expected = objective.value_and_grad(phi, data)
    torch.manual_seed(0)
    same(objective.value_and_grad(here(phi), here(data)), expected, atol)
    torch.manual_seed(0)
    same(objective.value(here(phi), here(data)), expected[0], atol)
    return expected


# The device itself ----------------------------------------------------------------------------


@ours
@pytest.mark.parametrize(
    "mixed",
    [
        lambda a, b: a + b,
        lambda a, b: a @ b.mT,
        lambda a, b: torch.cat([a, b]),
        lambda a, b: torch.stack([a.sum(), b.sum()]),
        lambda a, b: b.gather(0, a.long()),
        lambda a, b: b[a.long()],
        lambda a, b: b.sum().add_(a.sum()),
        lambda a, b: torch.rand(2, device=DEVICE, generator=torch.Generator()),
        lambda a, b: nn.functional.conv1d(a, b[..., None]),
    ],
)
def test_the_second_device_refuses_operands_of_two_devices(mixed):
    with pytest.raises(RuntimeError, match=r"device|indices"):
        mixed(torch.zeros(2, 2, device=DEVICE), torch.ones(2, 2))


@ours
def test_the_second_device_takes_what_cuda_takes():
    """Numbers without axes and indices of the CPU; draws that its seed determines; and float64, but on request."""
    a = torch.arange(4.0, device=DEVICE)
    assert (a * torch.tensor(2.0))[torch.tensor([1])].item() == 2
    draws = [
        torch.rand(3, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(s)).tolist()
        for s in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]
    with without_float64(), pytest.raises(TypeError, match="no float64"):
        a.double()
    assert a.double().dtype == torch.float64


# Learners -------------------------------------------------------------------------------------


def made(row, dtype=torch.float64):
    """The learner, and one of a copy of the network that is on the device."""
    net = conv4(WAYS, width=4, size=16, seed=0).to(dtype)
    torch.manual_seed(0)
    on_cpu = row.make(net)
    torch.manual_seed(0)
    return on_cpu, row.make(copy.deepcopy(net).to(DEVICE))


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_a_learner_gives_the_cpus_numbers(row):
    """Wherever its network is: all follows φ. (L-BFGS stops near its optimum; where, is up to the rounding of features.)"""
    learner, moved = made(row)
    phi, data = learner.init(), images(tasks=2)
    atol = 1e-6 if row is ROWS["lp_ft"] else 1e-9
    expected = agrees(bilevel(learner, row.loss), phi, data, atol)
    same(moved.init(), phi)
    same(bilevel(moved, row.loss).value_and_grad(moved.init(), here(data)), expected, atol)
    with pytest.MonkeyPatch.context() as patch:  # by the plain equations both round alike
        patch.setenv("MTLIB_PLAIN", "1")
        agrees(bilevel(learner, row.loss), phi, data)
    support, query = here(over(lambda d: d[0], data))
    theta = moved.adapt(moved.init(), support)
    assert places(theta) == {DEVICE}
    assert moved.predict(theta, query.x).device == DEVICE


@ours
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_a_learner_needs_no_float64_on_the_device(row):
    learner, _ = made(row, torch.float32)
    phi, data = learner.init(), over(lambda d: d.float(), images(tasks=2))
    objective = bilevel(learner, row.loss)
    value, grads = objective.value_and_grad(phi, data)
    with without_float64():
        found, gradient = objective.value_and_grad(here(phi), here(data))
        assert torch.isfinite(found) and list(gradient) == list(grads)
        assert found.item() == pytest.approx(value.item(), rel=1e-2, abs=1e-3)


@pytest.mark.parametrize(
    "way",
    [unrolled, first_order, secant, checkpointed, implicit(2.0), multi_step([0.25, 0.75])],
    ids=["unrolled", "first_order", "secant", "checkpointed", "implicit", "multi_step"],
)
def test_a_hypergradient_gives_the_cpus_numbers(way):
    learner = maml(seeded(lambda: mlp(3, (8,), 2)), mse_loss, 0.1, 2, strength=2.0)
    agrees(bilevel(learner, mse_loss, way), learner.init(), vectors())


def test_one_task_at_a_time_gives_the_same_numbers():
    learner, data = maml(convolutional(), cross_entropy, 0.1, 2), images()
    expected = bilevel(learner, cross_entropy).value_and_grad(learner.init(), data)
    for chunk in (1, 2):
        objective = bilevel(learner, cross_entropy, chunk=chunk)
        same(objective.value_and_grad(here(learner.init()), here(data)), expected)


def test_off_the_cpu_all_tasks_run_as_one_program_on_one_thread(monkeypatch):
    monkeypatch.delenv("MTLIB_PLAIN", raising=False)
    phi, data = here(parameters(convolutional())), here(images())
    assert (default_chunk(phi, 3), default_threads(phi, data, 1)) == (3, 1)


def test_problems_beside_meta_learning_give_the_cpus_numbers():
    net, data = seeded(lambda: mlp(3, (8,), 2)), vectors()
    seeds = over(lambda d: d[0], data.support)
    starts = over(lambda d: d[:1], data)
    first = Batch(flat(parameters(net))[None, None], data.support.y[:1])
    agrees(
        bilevel(weight_decay(net, mse_loss, 0.1, 2), mse_loss),
        weight_decay(net, mse_loss, 0.1, 2).init(),
        data,
    )
    learner = reweighted(net, mse_loss, 0.1, 2, examples=6)
    agrees(bilevel(learner, mse_loss), learner.init(), data)
    learner = weighted_ridge(torch.tensor([0, 0, 1]), 6)
    agrees(bilevel(learner, mse_loss), over(torch.Tensor.double, learner.init()), data)
    learner = distilled(net, mse_loss, 0.1, 2, seeds)
    agrees(bilevel(learner, mse_loss), learner.init(), Episode(first, starts.query))


def test_a_policy_gives_the_cpus_numbers():
    learner = policy_gradient(seeded(lambda: mlp(2, (8,), 2)), walk, 0.3, 0.1, 2)
    data = over(lambda d: d.double(), navigation(5, 4, 2, seed=3)(0))
    agrees(bilevel(learner, cost), learner.init(), data)


def test_a_head_of_its_own_and_lora_multiplied_out():
    net = seeded(lambda: mlp(3, (8,), 2))
    head = fresh_head(finetune(net, mse_loss, 0.1, 2), net, seed=3)
    agrees(bilevel(head, mse_loss), head.init(), vectors())
    torch.manual_seed(0)
    learner = lora(net, mse_loss, 0.1, 2)
    support = over(lambda d: d[0], vectors().support)
    theta = learner.adapt(learner.init(), support)
    found = learner.adapt(here(learner.init()), here(support))
    same(merged(found), merged(theta))


def test_recomputed_steps_are_in_the_mode_of_the_first_pass():
    """Off the CPU the backward pass is another thread: dropout stays off, and autocast on, as they were."""
    net = two_halves(nn.Sequential(nn.Linear(3, 50), nn.Dropout(0.5)), nn.Linear(50, 1))
    x = here(normal(5, 3).float())

    def loss(phi):
        return apply(net)(phi, x).square().mean()

    for mode in (nullcontext, evaluating, partial(torch.autocast, DEVICE.type, torch.bfloat16)):
        found = []
        for way in (loss, partial(replay, loss)):
            torch.manual_seed(0)
            phi = {k: v.requires_grad_() for k, v in here(parameters(net)).items()}
            with mode():
                value = way(phi)
            found.append(torch.autograd.grad(value, [*phi.values()]))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# Transfer -------------------------------------------------------------------------------------

NET, SETS = classified(lambda: mlp(4, (6,), 3))
TWO = over(lambda d: d[:2], SETS)
DOUBLE = seeded(lambda: mlp(4, (6,), 6))


def critic(inputs, outputs):
    return seeded(lambda: nn.Linear(inputs, outputs), seed=2)


PENALTIES = {
    "coral": align.coral(),
    "mcc": align.mcc(),
    "mmd": align.mmd(),
    "jan": align.jan(),
    "entropy": align.entropy(),
    "information": align.information(),
    "afn": align.afn(),
    "bsp": align.bsp(),
    "toward": toward(parameters(NET), 0.5),
    "dann": critics.dann(CRITIC := critic(6, 3)),
    "cdan": critics.cdan(WIDE := critic(18, 3)),
    "mdd": critics.mdd(SECOND := critic(6, 3)),
}
CRITICS = {"dann": CRITIC, "cdan": WIDE, "mdd": SECOND}


@pytest.mark.parametrize("of", PENALTIES)
def test_a_penalty_gives_the_cpus_numbers(of):
    phi = parameters(NET) | (critics.adversary(CRITICS[of]) if of in CRITICS else {})
    phi = {k: v + 0.1 for k, v in phi.items()}
    agrees(joint(NET, cross_entropy, (1, 0, 1), [PENALTIES[of]]), phi, SETS)


OBJECTIVES = {
    "joint": (joint(NET, cross_entropy), {}),
    "weights": (joint(NET, cross_entropy, torch.tensor([0.5, 0.2, 0.3], device=DEVICE)), {}),
    "columns": (joint(NET, cross_entropy, columns=[slice(0, 3)] * 3), {}),
    "uncertainty": (weights.uncertainty(NET, cross_entropy), weights.log_variances(3)),
    "gradnorm": (weights.gradnorm(NET, cross_entropy), weights.balances(torch.ones(3).double())),
    "pcgrad": (weights.pcgrad(NET, cross_entropy), {}),
    "irm": (unseen.irm(NET, cross_entropy, 1.0), {}),
    "vrex": (unseen.vrex(NET, cross_entropy, 1.0), {}),
    "group_dro": (unseen.group_dro(NET, cross_entropy), unseen.group_weights(3)),
}


@pytest.mark.parametrize("of", OBJECTIVES)
def test_an_objective_over_data_sets_gives_the_cpus_numbers(of):
    objective, own = OBJECTIVES[of]
    agrees(objective, {**parameters(NET), **own}, SETS)


def test_adversaries_with_networks_of_their_own():
    anchor = {**parameters(NET), **critics.adversary(critic(6, 2))}
    agrees(critics.adda(NET, parameters(NET), critic(6, 2)), anchor, TWO)
    both = joint(DOUBLE, critics.both_halves(cross_entropy), (1, 0), [critics.mcd(DOUBLE)])
    agrees(both, parameters(DOUBLE), TWO)


def test_domains_not_seen():
    stream = unseen.held_out(lambda step: SETS, seed=0)
    on_device = unseen.held_out(lambda step: here(SETS), seed=0)
    same(on_device(0), stream(0))
    agrees(unseen.mldg(NET, cross_entropy, 0.1, 0.5), parameters(NET), stream(0))
    for mix in (unseen.mixup, unseen.domain_mixup):
        same(mix(lambda step: here(SETS), 0.5, 0)(1), mix(lambda step: SETS, 0.5, 0)(1))


JUDGED = {
    "h_score": lambda f, y: transferability.h_score(f, y),
    "nce": lambda f, y: transferability.nce((f[:, 0] > 0).long(), y),
    "nce, one of the CPU": lambda f, y: transferability.nce((f[:, 0] > 0).long(), y.cpu()),
    "leep": lambda f, y: transferability.leep(f.softmax(1), y),
    "logme": lambda f, y: transferability.logme(f, y),
    "logme, targets": lambda f, y: transferability.logme(f, f[:, :2]),
    "log_evidence": lambda f, y: transferability.log_evidence(f, f[:, 0], 1.0, 2.0),
    "transrate": lambda f, y: transferability.transrate(f, y),
    "a_distance": lambda f, y: transferability.a_distance(f, f + 1),
    "entropy": lambda f, y: selection.entropy(f),
    "information": lambda f, y: selection.information(f),
    "snd": lambda f, y: selection.snd(f),
    "density_ratio": lambda f, y: selection.density_ratio(f, f + 1, f).tolist(),
    "dev": lambda f, y: selection.dev(f[:, 0].abs(), f[:, 1].abs()),
    "dev, one of the CPU": lambda f, y: selection.dev(f[:, 0].abs(), f[:, 1].abs().cpu()),
    "interval": lambda f, y: interval(f[:, 0])[:2],
    "in_the_large": lambda f, y: recalibration.in_the_large(f[:, 0], (y > 0).float(), 0.5),
    "revised": lambda f, y: recalibration.revised(
        f, f[:, 0], (y > 0).float(), f.new_ones(4)
    ).tolist(),
}


@pytest.mark.parametrize("of", JUDGED)
def test_scores_of_features_are_the_cpus(of):
    f, y = normal(30, 4).float(), torch.arange(30) % 3
    expected = JUDGED[of](f, y)
    same(JUDGED[of](here(f), here(y)), expected, atol=1e-6)
    if DEVICE.type == NAME:
        with without_float64():
            same(JUDGED[of](here(f), here(y)), expected, atol=1e-6)


@pytest.mark.parametrize("metric", [accuracy, macro_f1, auroc])
def test_metrics_are_the_cpus(metric):
    prediction, y = normal(30, 3), torch.eye(3, dtype=torch.float64).repeat(10, 1)
    same(metric(here(prediction), here(y)), metric(prediction, y))


def test_detection_on_the_device():
    boxes, labels = torch.tensor([[4.0, 4, 20, 28], [30, 8, 44, 20]]), torch.tensor([0, 1])
    y = detection.targets(boxes, labels, 2, 48, 64)
    same(detection.targets(here(boxes), here(labels), 2, 48, 64), y, atol=1e-6)
    maps = torch.cat([20 * (y[:2] - 0.9), y[2:]])[None]
    loss = detection.centre_loss(2)
    same(loss(here(maps), here(y[None])), loss(maps, y[None]), atol=1e-5)
    found, on_device = detection.decode(maps, 2), detection.decode(here(maps), 2)
    same([tuple(d) for d in on_device], [tuple(d) for d in found], atol=1e-5)
    photographs = ([here(boxes)], [here(labels)], 2)
    expected = detection.average_precision(found, [boxes], [labels], 2)
    assert torch.equal(detection.average_precision(on_device, *photographs), expected)
    nothing = [detection.Detections(*(d[:0] for d in on_device[0]))]
    assert detection.average_precision(nothing, *photographs).tolist() == [0, 0]
    (judged, _), counts = detection.judge(on_device, *photographs), torch.ones(1, 1)
    same(detection.resampled(judged, here(counts)).tolist(), expected[:1].tolist())


# Training and judging -------------------------------------------------------------------------


DROPS = two_halves(nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3)), nn.Linear(8, 3)).double()


def training(steps=6, **options):
    """A joint run whose objective draws random numbers from torch."""
    data = Batch(SETS.x.flatten(0, 1), SETS.y.flatten(0, 1))
    stream = mixture(data, batch=8, seed=0)
    objective = joint(DROPS, cross_entropy)
    return fit(objective, parameters(DROPS), stream, steps, progress=False, **options)


def test_fit_and_its_checkpoint_on_the_device(tmp_path):
    """φ is there afterwards; resuming is exact, also where the file was written on the CPU's side of things."""
    whole = training(device=DEVICE)
    assert places(whole.params) == {DEVICE}
    file = tmp_path / "run.safetensors"
    training(device=DEVICE, checkpoint=file, steps=3)
    resumed = training(device=DEVICE, checkpoint=file)
    assert resumed.losses == whole.losses
    assert all(torch.equal(v, whole.params[k]) for k, v in resumed.params.items())
    assert places(load_params(file)) == {torch.device("cpu")}
    same(whole.params, load_params(file))


def test_fit_gives_the_cpus_numbers_and_starts_where_phi_is():
    learner, data = meta_sgd(seeded(lambda: mlp(3, (8,), 2)), mse_loss, 0.1, 2), vectors()
    options = {
        "steps": 4,
        "rates": {"lr.": 1e-4},
        "moves": ("lr.", "head."),
        "stop": early_stopping(lambda phi: float(flat(phi).sum()), every=2, patience=9),
        "progress": False,
    }
    objective = bilevel(learner, mse_loss)
    expected = fit(objective, learner.init(), lambda step: data, **options)
    found = fit(objective, here(learner.init()), lambda step: data, **options)
    same(found.params, expected.params)
    same(found.losses, expected.losses)
    assert found.best.step == expected.best.step


def test_torchs_random_state_is_as_it_was():
    torch.manual_seed(3)
    before = torch.rand(3, device=DEVICE)
    torch.manual_seed(3)
    training(device=DEVICE)
    mlp(3, (4,), 2, seed=5)
    net = copy.deepcopy(NET).to(DEVICE)
    fresh_head(finetune(net, cross_entropy, 0.1, 1), net, seed=5)
    assert torch.equal(torch.rand(3, device=DEVICE), before)


@ours
def test_fit_needs_no_float64_on_the_device(tmp_path):
    with without_float64():
        net = mlp(4, (6,), 3, seed=0)
        sets = over(lambda d: d.float(), SETS)
        options = {"device": DEVICE, "progress": False, "checkpoint": tmp_path / "run.safetensors"}
        stop = early_stopping(lambda phi: float(flat(phi).sum()), every=2, patience=9)
        for steps in (2, 4):
            w = torch.tensor([0.2, 0.3, 0.5], device=DEVICE)
            objective = joint(net, cross_entropy, w, [align.mmd()])
            run = fit(objective, parameters(net), lambda step: sets, steps, stop=stop, **options)
        assert len(run.losses) == 4


@pytest.mark.parametrize(
    "make", [protonet, lambda net: maml(net, cross_entropy, 0.1, 3)], ids=["protonet", "maml"]
)
def test_evaluate_gives_the_cpus_numbers(make):
    learner = make(seeded(lambda: mlp(30, (16,), 5)))
    draws = episodes(planted(), 5, 1, 5, tasks=4, seed=1)

    def stream(step):
        return over(lambda d: d.double(), draws(step))

    def on_device(step):
        return here(stream(step))

    expected = evaluate(learner, learner.init(), stream, 8, progress=False)
    for given in (stream, on_device):
        found = evaluate(learner, here(learner.init()), given, 8, progress=False)
        assert found.draw == expected.draw and found.values.device.type == "cpu"
        assert torch.allclose(found.values, expected.values, atol=1e-9)
    same(
        answers(learner, here(learner.init()), stream(0)),
        answers(learner, learner.init(), stream(0)),
    )


def test_classes_that_are_on_the_device():
    data = planted()
    moved = ClassSet(here(data.items), *data[1:])
    draw = episodes(moved, 5, 1, 5, tasks=2, seed=1)(0)
    same(draw, episodes(data, 5, 1, 5, tasks=2, seed=1)(0))
    learner = protonet(mlp(30, (16,), 5, seed=0))

    def score(data):
        stream = episodes(data, 5, 1, 5, tasks=4, seed=1)
        return evaluate(learner, learner.init(), stream, 8, progress=False)

    mask = torch.arange(len(data.names)) % 2 == 0
    for items, keep in ((data, here(mask)), (moved, mask), (moved, here(mask))):
        assert torch.equal(items.select(keep).items.cpu(), data.select(mask).items)
    kept = data.select(range(8))
    expected = over_classes(score, kept)
    assert over_classes(score, moved.select(range(8))).mean == pytest.approx(
        expected.mean, abs=1e-6
    )


def test_norms_and_what_is_carried_over(tmp_path):
    net, x = convolutional(), [normal(6, 1, 16, 16, seed=s) for s in (0, 1)]
    phi = calibrate(net, parameters(net), x)
    found = calibrate(net, here(parameters(net)), here(x))
    same(found, phi)
    headless = {k: v for k, v in parameters(net).items() if not k.startswith("head.")}
    found_without = calibrate(net, here(headless), here(x))
    same(found_without, phi)
    assert places(found_without) == {DEVICE}
    with evaluating():
        same(as_is(net).predict(found, here(x[0])), as_is(net).predict(phi, x[0]))
    same(centred(net, here(phi), here(x[0])), centred(net, phi, x[0]))
    torch.manual_seed(0)
    begun = start(simpleshot(seeded(lambda: conv4(5, width=4, size=16))), here(phi)).params
    assert places(begun) == {DEVICE}
    other = load(convolutional(), found)
    same(here(parameters(other.eval())), phi)
    save_params(tmp_path / "phi.safetensors", found)
    assert all(
        torch.equal(v, found[k].cpu()) for k, v in load_params(tmp_path / "phi.safetensors").items()
    )


def test_exact_risks_take_a_network_on_the_device():
    net = mlp(1, (8,), 1, seed=0)
    moved = copy.deepcopy(net).to(DEVICE)
    assert risk_of(lambda x: moved(here(x))) == pytest.approx(risk_of(net), abs=1e-4)


def test_amortised_learners_answers_at_a_point():
    learner = ROWS["cnp"].make(convolutional())
    data = over(lambda d: d[0], images())
    phi = learner.init()
    expected = point(learner).predict(learner.adapt(phi, data.support), data.query.x)
    moved = here(data)
    same(point(learner).predict(learner.adapt(here(phi), moved.support), moved.query.x), expected)
