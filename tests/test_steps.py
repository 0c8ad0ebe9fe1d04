"""An `adapt` that goes in steps is one value: what it does and the way that it goes cannot disagree; torch's private names are a seam."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from problems import convolutional, images, largest, normal, seeded, vectors
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from mtlib.bilevel import bilevel, checkpointed, multi_step
from mtlib.core import Batch, Episode, Steps, parameters, take
from mtlib.learners.context import cavia, protomaml
from mtlib.learners.finetune import finetune, fresh_head, l2_sp, lp_ft
from mtlib.learners.gradient import adam, anil, boil, maml, momentum
from mtlib.learners.hyper import distilled, flat, reweighted, weight_decay
from mtlib.learners.lora import lora
from mtlib.learners.policy import cost, policy_gradient
from mtlib.learners.preconditioned import learned, meta_curvature, meta_sgd, per_step_rates
from mtlib.nets import mlp
from mtlib.run.cost import peak_memory

ROOT = Path(__file__).resolve().parent.parent


def net():
    return seeded(lambda: mlp(3, (6,), 2))


def classes(rows=6) -> Episode:
    """Three tasks of two classes."""
    y = torch.eye(2, dtype=torch.float64)[torch.arange(rows) % 2].expand(3, -1, -1)
    return Episode(*(Batch(normal(3, rows, 3, seed=s), y) for s in (1, 2)))


def starts() -> Episode:
    """Tasks of data distillation: the support x is a start of the network."""
    x = torch.stack([flat(parameters(seeded(lambda: mlp(3, (6,), 2), s))) for s in range(3)])
    return Episode(Batch(x[:, None], torch.zeros(3, 1, 1).double()), classes().query)


def worlds() -> Episode:
    """Tasks of a policy: draws of the actions, and where the goal lies."""
    x = torch.cat([normal(3, 5, 4, 2), normal(3, 1, 1, 2, seed=1).expand(3, 5, 4, 2)], -1)
    return Episode(*(Batch(x, torch.ones(3, 5, 4).double()) for _ in range(2)))


def walk(state, action, goal):
    return state + action, -((state + action - goal) ** 2).sum(-1)


def learning_one_rate():
    same = net()

    def make(phi):
        return anil(same, mse_loss, phi["lr.all"], 3, rule=momentum(0.5))

    return learned({"lr.all": torch.tensor(0.1).double()}, make)


def policies():
    return policy_gradient(seeded(lambda: mlp(2, (5,), 2)), walk, 0.5, 0.01, 3)


CE, MSE = cross_entropy, mse_loss
STEPPING = {  # learner, loss, data
    "maml": (lambda: maml(net(), MSE, 0.05, 3), MSE, vectors),
    "maml with adam": (lambda: maml(net(), MSE, 0.01, 3, rule=adam()), MSE, vectors),
    "held near φ": (lambda: maml(net(), MSE, 0.05, 3, strength=0.5), MSE, vectors),
    "anil": (lambda: anil(net(), MSE, 0.05, 3), MSE, vectors),
    "boil": (lambda: boil(net(), MSE, 0.05, 3), MSE, vectors),
    "cavia": (lambda: cavia(net(), MSE, 0.05, 3), MSE, vectors),
    "lora": (lambda: lora(net(), MSE, 0.05, 3), MSE, vectors),
    "protomaml": (lambda: protomaml(net(), CE, 0.05, 3), CE, classes),
    "meta-sgd": (lambda: meta_sgd(net(), MSE, 0.05, 3), MSE, vectors),
    "a rate per step": (lambda: per_step_rates(net(), MSE, 0.05, 3), MSE, vectors),
    "meta-curvature": (lambda: meta_curvature(net(), MSE, 0.05, 3), MSE, vectors),
    "learned": (learning_one_rate, MSE, vectors),
    "fresh head": (lambda: fresh_head(maml(net(), CE, 0.05, 3), net(), seed=1), CE, classes),
    "fresh head, body alone": (lambda: fresh_head(boil(net(), CE, 0.05, 3), net(), 1), CE, classes),
    "fresh head, L2-SP": (
        lambda: fresh_head(finetune(net(), CE, 0.05, 3, l2_sp(0.1)), net()),
        *(CE, classes),
    ),
    "LP-FT": (lambda: lp_ft(net(), CE, 0.05, 3), CE, classes),
    "weight decay": (lambda: weight_decay(net(), MSE, 0.05, 4), MSE, vectors),
    "reweighted": (lambda: reweighted(net(), MSE, 0.05, 4, examples=6), MSE, vectors),
    "distilled": (lambda: distilled(net(), CE, 0.1, 4, take(classes().support, 0)), CE, starts),
    "policy": (policies, cost, worlds),
}


@pytest.mark.parametrize("name", STEPPING)
def test_the_way_ends_where_adapt_does(name):
    make, _, data = STEPPING[name]
    learner, episode = make(), data()
    phi, support = learner.init(), take(episode, 0).support
    *_, last = learner.adapt.path(phi, support)
    assert largest(last, learner.adapt(phi, support)) == 0
    moved = [k for k in last if k not in phi or not torch.equal(last[k], phi[k])]
    assert moved, "nothing moved: the test would see nothing"


@pytest.mark.parametrize("name", STEPPING)
def test_checkpoints_serve_all_that_goes_in_steps(name):
    make, loss, data = STEPPING[name]
    learner, episode = make(), data()
    phi = learner.init()
    value, grads = bilevel(learner, loss).value_and_grad(phi, episode)
    again, other = bilevel(learner, loss, checkpointed).value_and_grad(phi, episode)
    assert (value - again).abs() <= 1e-12
    zero = {k: torch.zeros_like(v) for k, v in phi.items()}
    assert largest({**zero, **grads}, {**zero, **other}) <= 1e-10
    assert any(g.abs().max() > 1e-8 for g in grads.values())


def test_an_adapt_that_is_replaced_leaves_no_way_behind():
    learner = maml(net(), MSE, 0.05, 3)._replace(adapt=lambda phi, support: phi)
    for hypergradient in (checkpointed, multi_step([0.5, 0.5])):
        with pytest.raises(ValueError, match=r"expects a learner with inner steps, e\.g\. maml"):
            bilevel(learner, MSE, hypergradient)
    assert not hasattr(learner, "path") and not hasattr(learner, "inner")


def test_fewer_steps_are_a_shorter_way():
    learner, support = maml(net(), MSE, 0.05, 3), take(vectors(), 0).support
    assert isinstance(learner.adapt, Steps)
    short = learner.adapt._replace(steps=1)
    _, first, *_ = learner.adapt.path(learner.init(), support)
    assert largest(short(learner.init(), support), first) == 0


def passed_on(learner, loss):
    return checkpointed(learner, loss)


def inside_another(learner, loss):
    task = checkpointed(learner, loss)
    return lambda phi, episode: 1.0 * task(phi, episode)


@pytest.mark.parametrize("wrapper", [passed_on, inside_another])
def test_a_wrapper_around_checkpoints_saves_the_same_memory(wrapper):
    learner, data = maml(seeded(lambda: mlp(8, (16, 16), 2)), MSE, 0.01, 20), vectors(2, 512, 8)
    phi = learner.init()
    unrolled, own, wrapped = (
        peak_memory(bilevel(learner, MSE, h).value_and_grad, phi, data)
        for h in (None, checkpointed, wrapper)
    )
    assert wrapped <= 1.05 * own < 0.5 * unrolled


def test_checkpoints_of_convolutions_agree():
    learner, data = fresh_head(anil(convolutional(), CE, 0.1, 3), convolutional(), 2), images()
    plain, kept = (
        bilevel(learner, CE, h).value_and_grad(learner.init(), data)[1]
        for h in (None, checkpointed)
    )
    assert largest(plain, kept) <= 1e-12


# The seam ------------------------------------------------------------------------------------

HIDDEN = """
import sys, types
import torch, torch.func, torch._functorch.eager_transforms, torch.utils._python_dispatch, torch.overrides
names = {names!r}

class Without(types.ModuleType):  # a module of torch as it would be without these names
    def __init__(self, module, hidden):
        super().__init__(module.__name__)
        self.__dict__["module"], self.__dict__["hidden"] = module, hidden
    def __getattr__(self, name):
        if name in self.hidden:
            raise AttributeError(name)
        found = getattr(self.module, name)
        below = {{h.removeprefix(name + ".") for h in self.hidden if h.startswith(name + ".")}}
        return Without(found, below) if below else found

real = {{m: sys.modules[m] for m in names}}
for m, hidden in names.items():
    sys.modules[m] = Without(sys.modules[m], set(hidden))
import mtlib.run.fast
sys.modules.update(real)
assert not mtlib.run.fast.COMPLETE and mtlib.run.fast.watched()
import pkgutil, importlib
for found in pkgutil.walk_packages(mtlib.__path__, "mtlib."):
    importlib.import_module(found.name)
import pytest
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


def private_names() -> dict[str, list[str]]:
    text = (ROOT / "mtlib" / "run" / "fast.py").read_text("utf8")
    found: dict[str, list[str]] = {}
    for module, name in re.findall(r'private\("([\w.]+)", "([\w.]+)"\)', text):
        found.setdefault(module, []).append(name)
    return found


@pytest.mark.parametrize("plain", ["0", "1"])
def test_without_torchs_private_names_the_package_imports_and_the_contract_holds(plain):
    names = private_names()
    assert {"torch._C", "torch.overrides", "torch.utils._python_dispatch"} <= names.keys()
    chosen = ["tests/test_contract.py", "-k", "maml"]
    done = subprocess.run(
        [sys.executable, "-c", HIDDEN.format(names=names), *chosen],
        cwd=ROOT,
        env={**os.environ, "MTLIB_PLAIN": plain, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[-1]) > 5


def test_private_names_stand_in_the_seam_alone():
    """`torch._x`, `torch.utils._x`: nothing but run/fast.py asks for them."""
    pattern = re.compile(r"(?:from|import) torch[\w.]*\._\w|torch(?:\.\w+)*\._(?!_)\w|import _\w")
    found = [
        f"{path.name}: {match[0]}"
        for path in (ROOT / "mtlib").rglob("*.py")
        if path.name != "fast.py" and (match := pattern.search(path.read_text("utf8")))
    ]
    assert not found


def test_core_is_a_page_without_private_names():
    text = (ROOT / "mtlib" / "core.py").read_text("utf8")
    assert len(text.splitlines()) <= 310
    assert not re.findall(r"^\s*(?:def|class) _[a-z]|torch\._", text, re.MULTILINE)


def test_a_module_without_body_and_head_still_runs():
    learner, data = maml(nn.Linear(3, 2).double(), MSE, 0.05, 2), vectors()
    assert bilevel(learner, MSE, checkpointed).value_and_grad(learner.init(), data)[0] > 0
