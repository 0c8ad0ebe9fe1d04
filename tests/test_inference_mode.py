"""In `torch.inference_mode` all is as in `torch.no_grad`, or refused: before torch 2.12 `torch.func.grad` gives zeros there."""

from __future__ import annotations

import pytest
import torch
from problems import convolutional, normal, vectors
from test_contract import ROWS, WAYS
from torch.nn.functional import mse_loss

from mtlib.bilevel import bilevel
from mtlib.core import Batch, Episode, over, parameters, take
from mtlib.evaluate import evaluate
from mtlib.joint import joint
from mtlib.learners.finetune import finetune, linear_probe
from mtlib.learners.gradient import maml
from mtlib.nets import mlp
from mtlib.tasks import one_hot
from mtlib.train import fit
from mtlib.transfer.unseen import irm, vrex


def images(rows, tasks=2) -> Batch:
    y = one_hot(torch.arange(rows) % WAYS, WAYS, torch.float64)
    return Batch(normal(tasks, rows, 1, 16, 16, seed=rows), y.expand(tasks, -1, -1))


def made_inside(tree):
    with torch.inference_mode():
        return over(torch.clone, tree)


def network(outputs=2):
    return mlp(3, (8,), outputs, seed=0).double()


@pytest.mark.parametrize("name", ROWS)
def test_every_learner_adapts_and_predicts_the_same_inside(name):
    learner = ROWS[name].make(convolutional())
    phi, (support, query) = learner.init(), take(Episode(images(6), images(9)), 0)

    def theta_and_answer(phi, support):
        with torch.no_grad():
            theta = learner.adapt(phi, support)
            return {**theta, "answer": learner.predict(theta, query.x)}

    right = theta_and_answer(phi, support)
    with torch.inference_mode():
        inside = theta_and_answer(phi, support)
    own = theta_and_answer(made_inside(phi), support)
    for found in (inside, own):
        assert found.keys() == right.keys()
        assert all(torch.allclose(found[k], v, atol=1e-12) for k, v in right.items())


@pytest.mark.parametrize("make", [finetune, linear_probe])
def test_evaluate_gives_the_same_inside(make):
    net, data = network(), vectors()
    rate = (0.1, 2) if make is finetune else ()
    learner = make(net, mse_loss, *rate)

    def score(phi):
        return evaluate(learner, phi, lambda step: data, 4, mse_loss, progress=False).values

    right = score(parameters(net))
    with torch.inference_mode():
        assert torch.allclose(score(parameters(net)), right, atol=1e-12)
    assert torch.allclose(score(made_inside(parameters(net))), right, atol=1e-12)


@pytest.mark.parametrize("make", [irm, vrex])
def test_an_objective_has_the_same_value_inside(make):
    net, batch = network(), vectors().support
    objective, phi = make(net, mse_loss, 2.0), parameters(net)
    right = objective.value(phi, batch)
    with torch.inference_mode():
        assert torch.allclose(objective.value(phi, batch), right, atol=1e-12)


def test_no_training_inside():
    """A gradient of nothing, and a run that moves nothing, would be silent."""
    net, data = network(), vectors()
    phi = parameters(net)
    outer = bilevel(maml(net, mse_loss, 0.1, 1), mse_loss)
    with torch.inference_mode():
        for objective, drawn in ((outer, data), (joint(net, mse_loss), data.support)):
            with pytest.raises(ValueError, match=r"inference_mode.*Train outside"):
                objective.value_and_grad(phi, drawn)
            with pytest.raises(ValueError, match=r"inference_mode.*Train outside"):
                fit(objective, phi, lambda step, drawn=drawn: drawn, 2, progress=False)


def test_parameters_made_inside_are_trained():
    net, data = network(), vectors()
    objective = bilevel(maml(net, mse_loss, 0.1, 1), mse_loss)
    value, grads = objective.value_and_grad(parameters(net), data)
    again, same = objective.value_and_grad(made_inside(parameters(net)), data)
    assert torch.equal(value, again) and grads.keys() == same.keys()
    assert all(torch.equal(same[k], g) for k, g in grads.items())
