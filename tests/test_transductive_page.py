"""The page on transductive learners: whom it asks, and that its counterparts are inductive."""

from __future__ import annotations

import torch
from pages import run_until

from mtlib.core import Batch, take
from mtlib.learners.metric import protonet
from mtlib.learners.transductive import entropy_finetune


def test_who_is_asked_and_what_a_counterpart_is(small):
    page = run_until("transductive", "asked")
    data = page["test_set"]
    whole, two = (page["asked"](data, how, seed=3)(0) for how in ("15 of each", "two classes"))
    assert torch.equal(whole.support.x, two.support.x)
    assert whole.query.y.sum(1).tolist() == [[15.0] * 5] * len(whole.query.y)
    assert two.query.y.sum(1).tolist() == [[15.0, 15, 0, 0, 0]] * len(two.query.y)
    assert torch.equal(whole.query.x[:, :30], two.query.x)
    # alone or together, an inductive learner answers the same; and with no step the two tunings agree
    net, phi = page["stored"](protonet(page["network"](0)).init(), 0)
    support, query = take(two, 0)
    for name in ("class means", "class means, cosine", "fine-tuning"):
        make, settings = page["METHODS"][name]
        learner = make(net, settings[0])
        theta = learner.adapt({**learner.init(), **phi}, support)
        together = learner.predict(theta, query.x[:4])
        alone = torch.cat([learner.predict(theta, x[None]) for x in query.x[:4]])
        assert torch.allclose(together, alone, rtol=1e-4, atol=1e-5), name
    page["without_entropy"].__globals__["INNER"] = 0
    plain = page["without_entropy"](net, 0.1)
    tuned = entropy_finetune(net, torch.nn.functional.cross_entropy, 0.1, 0)
    own = Batch(support.x, support.y)
    a, b = (m.predict(m.adapt({**m.init(), **phi}, own), query.x) for m in (plain, tuned))
    assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
