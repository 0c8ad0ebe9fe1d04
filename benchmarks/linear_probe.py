"""A linear probe on cached features against epochs that run the frozen body again: seconds and objectives, as JSON.

    python benchmarks/linear_probe.py            # 1,000 images of 32×32, 20 epochs, a random four-block body
    python benchmarks/linear_probe.py --repeats 9

Both minimise L(z Wᵀ + b, y) + ½λ‖W‖² on the same features. Runs alternate in one process; medians are reported.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import OrderedDict

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from mtlib.book.results import provenance
from mtlib.core import Batch, features, parameters
from mtlib.learners.finetune import linear_probe
from mtlib.nets import conv4
from mtlib.tasks import one_hot

STRENGTH, RATES = 0.01, (0.01, 0.03, 0.1)


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--images", type=int, default=1000)
    ask.add_argument("--epochs", type=int, default=20)
    ask.add_argument("--repeats", type=int, default=5)
    ask.add_argument("--batch", type=int, default=100)
    given = ask.parse_args()
    torch.manual_seed(0)
    body = conv4(ways=10, size=32, channels=3)
    z, phi = features(body), parameters(body)
    x = torch.rand(given.images, 3, 32, 32)
    y = one_hot(torch.randint(10, (given.images,)), 10)

    def cached() -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([z(phi, part) for part in x.split(given.batch)])

    held = cached()
    head = nn.Sequential(OrderedDict(body=nn.Identity(), head=nn.Linear(held.shape[1], 10)))

    def objective(w: torch.Tensor, b: torch.Tensor) -> float:
        return (cross_entropy(held @ w.mT + b, y) + 0.5 * STRENGTH * (w * w).sum()).item()

    def probe() -> float:
        theta = linear_probe(head, strength=STRENGTH, iterations=500).adapt({}, Batch(cached(), y))
        return objective(theta["probe.weight"], theta["probe.bias"])

    def epochs(rate: float) -> float:
        w, b = (
            torch.zeros(10, held.shape[1], requires_grad=True),
            torch.zeros(10, requires_grad=True),
        )
        rule = torch.optim.SGD([w, b], lr=rate, momentum=0.9)
        for _ in range(given.epochs):
            for part, target in zip(x.split(given.batch), y.split(given.batch), strict=True):
                with torch.no_grad():
                    f = z(phi, part)
                rule.zero_grad()
                (cross_entropy(f @ w.mT + b, target) + 0.5 * STRENGTH * (w * w).sum()).backward()
                rule.step()
        return objective(w.detach(), b.detach())

    rate = min(RATES, key=epochs)  # the loop gets its best rate, untimed
    seconds: dict[str, list[float]] = {"probe": [], "epochs": []}
    values = {}
    for _ in range(given.repeats):
        for name, run in (("probe", probe), ("epochs", lambda: epochs(rate))):
            began = time.perf_counter()
            values[name] = run()
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    report = {
        "setting": {**vars(given), "rate": rate},
        "seconds": medians,
        "objective": values,
        "ratio": medians["epochs"] / medians["probe"],
        "provenance": provenance(),
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
