"""The page on transductive learners: whom it asks, what its rows of features are, and that its counterparts are inductive."""

from __future__ import annotations

import json
from textwrap import dedent

import numpy as np
import pytest
import torch
from pages import BOOK, at_small_scale, run_until
from problems import seeded

from mtlib.core import Batch, features, take
from mtlib.evaluate import answers
from mtlib.learners.metric import protonet
from mtlib.learners.transductive import bd_cspn, laplacian_shot
from mtlib.nets import mlp


@pytest.fixture
def net():
    return seeded(lambda: mlp(5, (8,), 3))


@pytest.fixture(scope="module")
def page():
    with at_small_scale():
        yield run_until("transductive", "moving")


def test_who_is_asked(page):
    for how, n in page["ASKED"].items():
        support, query = page["tests"][how](0)
        whole = page["tests"]["15 of each"](0)
        assert torch.equal(support.x, whole.support.x)  # the same episodes
        if how == "uneven":
            assert (query.y.sum((1, 2)) == 19).all() and len(query.y.sum(1).unique(dim=0)) > 1
        else:
            assert query.y.sum(1).tolist() == [[float(k) for k in n]] * len(query.y)
        whose = page["of"][how](0).query  # alphabets go with their drawings
        names = page["test"].names
        known = sorted({name.rpartition("/")[0] for name in names})
        first = 20 * len(page["held"].names)
        of = [
            known.index(names[(i - first) // 20].rpartition("/")[0])
            for i in query.x.flatten().tolist()
        ]
        assert of == whose.x.flatten().long().tolist() and torch.equal(whose.y, query.y)


def test_a_number_stands_for_its_drawing(page):
    """Class means of looked-up features answer as class means of the network do."""
    z, _ = page["looked_up"]("ProtoNet", 3e-3, 0, 1)
    phi = page["trained"]("ProtoNet", 3e-3, 0, 1)
    numbers, pictures = page["tests"]["1 of each"](0), page["streams"](page["test"], 1)
    looked = answers(protonet(page["look"]), {"body.0.weight": z}, numbers)
    seen = answers(protonet(page["net"]), phi, pictures["1 of each"](0))
    assert (looked - seen).abs().max() <= 1e-4 * seen.abs().max()


def test_counterparts_are_inductive_and_transductive_learners_are_not(page):
    z, mean = page["looked_up"]("pre-training", 3e-3, 0, 1)
    phi = {"body.0.weight": z, "centre.mean": mean}
    support, query = take(page["tests"]["15 of each"](0), 0)

    def gap(learner):
        theta = learner.adapt(phi, support)
        alone = torch.cat([learner.predict(theta, x[None]) for x in query.x[:4]])
        return (learner.predict(theta, query.x[:4]) - alone).abs().max()

    look = page["look"]
    assert gap(protonet(look)) <= 1e-4
    none = page["with_parts"]("")((0.0, 1))[0]
    assert gap(none) <= 1e-4 < 1e-3 < gap(laplacian_shot(look)) and gap(bd_cspn(look)) > 1e-3


def test_fine_tuning_is_the_same_without_the_entropy(page):
    """With no step the two agree; with one they differ by the entropy's gradient alone."""
    learner = page["tuned"]
    phi = page["trained"]("pre-training", 3e-3, 0, 1)
    support, query = take(page["streams"](page["test"], 1)["4 of each"](0), 0)
    own = Batch(support.x, support.y)

    def said(which):
        return which.predict(which.adapt({**which.init(), **phi}, own), query.x)

    for steps, alike in ((0, True), (3, False)):
        learner.__globals__["INNER"] = steps
        gap = (said(learner(0.1, False)) - said(learner(0.1, True))).abs().max()
        assert (gap <= 1e-5) == alike
    assert features(page["net"])(phi, query.x).shape == (20, page["WIDTH"])


def test_the_solutions_soft_k_means_is_its_formula(net):
    """With no round ProtoNet; with two, means over all items by their probabilities, twice."""
    cells = json.loads((BOOK / "transductive.ipynb").read_text("utf8"))["cells"]
    text = next(t for c in cells if "def soft_k_means" in (t := "".join(c["source"])))
    code = text[text.index("    def soft_k_means") :].split("\n\nWith no round")[0]
    space = {"torch": torch, "protonet": protonet, "features": features}
    exec(dedent(code), space)
    g = torch.Generator().manual_seed(0)
    own = Batch(torch.randn(6, 5, generator=g).double(), torch.eye(3).double().repeat(2, 1))
    x = torch.randn(9, 5, generator=g).double()
    phi = protonet(net).init()

    def said(learner):
        return learner.predict(learner.adapt(phi, own), x)

    assert torch.equal(said(space["soft_k_means"](net, 0)), said(protonet(net)))
    zs, zq = (features(net)(phi, d).detach().numpy() for d in (own.x, x))
    c = np.stack([zs[own.y[:, k] == 1].mean(0) for k in range(3)])
    for _ in range(2):
        logit = -((zq[:, None] - c[None]) ** 2).sum(-1)
        p = np.exp(logit) / np.exp(logit).sum(1, keepdims=True)
        c = np.stack(
            [
                (zs[own.y[:, k] == 1].sum(0) + (p[:, k : k + 1] * zq).sum(0)) / (2 + p[:, k].sum())
                for k in range(3)
            ]
        )
    expected = -((zq[:, None] - c[None]) ** 2).sum(-1)
    ours = said(space["soft_k_means"](net, 2)).detach().numpy()
    assert np.abs(ours - expected).max() <= 1e-10
