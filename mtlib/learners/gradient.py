"""Learners that adapt by gradient descent on the support set."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mtlib.core import (
    Batch,
    Learner,
    Loss,
    Params,
    Point,
    Steps,
    apply,
    expect,
    fixed,
    over,
    parameters,
    require,
    risk,
    ways,
)

Rate = float | Tensor | Params | Callable[[int], Any]
"""One step size, or one per entry of θ, or a function of the step that gives either."""

Rule = Callable[[Params, Any], tuple[Params, Any]]
"""`rule(gradient, state)` -> (direction, state): how a step is made from a gradient; `state` is None at first."""

Pull = Callable[[Params, Params, Any], Tensor]
"""`pull(theta, anchor, x)` -> scalar: what holds θ near where it began, or its features of x in some shape."""

Value = Callable[[Params, Batch], Callable[[Params], Tensor]]
"""`value(phi, support)` -> L, the loss that the inner steps go down: L(θ) for the entries that move."""


def maml(
    net: nn.Module,
    loss: Loss,
    lr: Rate,
    steps: int,
    strength: float = 0.0,
    rule: Rule | None = None,
) -> Learner:
    """Model-agnostic meta-learning: every parameter takes a few gradient steps on the support set.

    θ₀ = φ,  θ ← θ − α ∇_θ [ L^S(θ) + ½λ‖θ − φ‖² ]  for `steps` steps; λ = `strength` (0 for MAML, above
    0 the inner problem of iMAML). `rule` is another way of stepping: `momentum()`, `adam()`.

    ```pycon
    >>> from mtlib.nets import mlp
    >>> learner = maml(mlp(1, (8,), 1, seed=0), nn.functional.mse_loss, lr=0.1, steps=5)
    >>> phi, support = learner.init(), Batch(torch.ones(3, 1), torch.ones(3, 1))
    >>> theta = learner.adapt(phi, support)
    >>> before, after = (learner.predict(p, support.x) - 1 for p in (phi, theta))
    >>> bool(after.abs().max() < before.abs().max())
    True

    ```

    {cite}`finn2017maml,rajeswaran2019imaml`
    """
    pull = proximal(strength) if strength else None
    return descent(net, loss, lr, steps, adapted="", pull=pull, rule=rule)


def anil(net: nn.Module, loss: Loss, lr: Rate, steps: int, rule: Rule | None = None) -> Learner:
    """Almost no inner loop: MAML whose inner steps move the head alone; the body is shared as it is.

    θ_head ← θ_head − α ∇_head L^S(θ). {cite}`raghu2020rapid`
    """
    return descent(net, loss, lr, steps, adapted="head.", rule=rule)


def boil(net: nn.Module, loss: Loss, lr: Rate, steps: int, rule: Rule | None = None) -> Learner:
    """Body only in the inner loop: MAML whose inner steps move the body alone; the head is shared as it is.

    θ_body ← θ_body − α ∇_body L^S(θ). {cite}`oh2021boil`
    """
    return descent(net, loss, lr, steps, adapted="body.", rule=rule)


def descent(
    net: nn.Module,
    loss: Loss,
    lr: Rate,
    steps: int,
    adapted: str,
    pull: Pull | None = None,
    rule: Rule | None = None,
) -> Learner:
    """Gradient descent on the entries of φ whose names start with `adapted`; the others stay φ's.

    Raises ValueError if `steps` < 0, or no entry has such a name.
    """
    begin = moving(net, adapted)
    init = partial(parameters, net)
    return inner_loop(init, begin, apply(net), loss, lr, steps, rule=rule, pull=pull, net=net)


def moving(net: nn.Module, adapted: str = "") -> Callable[[Params, Batch], Params]:
    """begin(φ, S) for the network's parameters whose names start with `adapted`: they move, from φ's values.

    Those that are frozen when it is called stay. Raises ValueError if there is none, or all of them are frozen.
    """
    expect(isinstance(adapted, str), "adapted, a prefix of parameters' names", adapted)
    own = weights(net)
    names = [k for k in own if k.startswith(adapted)]
    if not names:
        raise ValueError(
            f"expected a network with parameters named {adapted}*, got {list(own)[:5]}"
        )

    return _Moving(net, names, adapted)  # type: ignore[return-value]


class _Moving(NamedTuple):
    """What `moving` gives."""

    net: nn.Module
    names: list[str]
    adapted: str

    def __call__(self, phi: Params, support: Batch) -> Params:
        require(phi, self.names)
        still = fixed(self.net)
        point = {k: phi[k] for k in self.names if k not in still}
        if not point:
            raise ValueError(
                f"expected parameters named {self.adapted}* that may move; all {len(self.names)} are frozen (requires_grad=False)"
            )
        return point


def inner_loop(
    init: Callable[[], Params],
    begin: Callable[[Params, Batch], Params],
    f: Callable[[Params, Any], Tensor],
    loss: Loss,
    lr: Rate,
    steps: int,
    *,
    rule: Rule | None = None,
    pull: Pull | None = None,
    net: nn.Module | None = None,
) -> Learner:
    """The general case: θ₀ = begin(φ, S) are the entries that move, f(θ, x) predicts with all of them.

    θ ← θ − α rule(∇_θ [ L^S(θ) + R(θ, θ₀, S) ]) with R = `pull`; the entries of φ that are not in θ₀ travel along.
    `begin` leaves out what is frozen in `net`, as `moving` does.
    Raises ValueError as `check_descent` does.
    """
    check_descent(loss, lr, steps, rule)
    expect(made(f), "f, a function (theta, x) -> prediction", f)
    value = support_loss(f, loss, begin if pull else None, pull)
    adapt = descending(begin, value, lambda phi: lr, steps, lambda phi: rule)
    return Learner(init, adapt, f, net=net)


def minibatches(learner: Learner, size: int) -> Learner:
    """The same learner, whose inner steps see mini-batches of the support set in turn, in a fixed order.

    Step j of N rows has the rows j mod k, j mod k + k, j mod k + 2k, …, with k = ⌊N / `size`⌋ (1 at least): `size` rows where k
    divides N. Of the rows that `episodes` draws, sorted by class, `size` = ways gives one item of each class. With `secant`
    as the hypergradient and a rate ε that is Reptile, φ ← φ + ε (1/T) Σ_i (θ_i,K − φ). {cite}`nichol2018reptile`

    ```pycon
    >>> from mtlib.nets import mlp
    >>> learner = minibatches(maml(mlp(1, (8,), 1, seed=0), nn.functional.mse_loss, 0.1, steps=5), size=2)
    >>> rows = torch.arange(6.0)[:, None]
    >>> part_of(Batch(rows, rows), 2, step=4).x[:, 0]
    tensor([1., 4.])

    ```

    Raises ValueError if the learner has no inner steps, or unless `size` is a whole number of at least 1.
    """
    expect(isinstance(learner, Learner), "a learner, such as maml(net, loss, lr, steps)", learner)
    adapt = learner.adapt
    if not isinstance(adapt, Steps):
        raise ValueError(
            f"expected a learner with inner steps, an `adapt` that is a `Steps`, got {type(adapt).__name__}"
        )
    check_steps(size, "size", 1)

    def one(phi: Params, support: Batch, number: int, point: Point) -> Point:
        return adapt.step(phi, part_of(support, size, number), number, point)

    return learner._replace(adapt=adapt._replace(step=one))


def part_of(support: Batch, size: int, step: int) -> Batch:
    """The mini-batch of about `size` rows that inner step `step` of `minibatches` sees."""
    expect(isinstance(support, Batch), "a support set, Batch(x, y)", support)
    check_steps(size, "size", 1)
    check_steps(step, "step")
    k = max(1, len(support.y) // size)
    return over(lambda d: d[step % k :: k], support)  # type: ignore[no-any-return]


def support_loss(
    f: Callable[[Params, Any], Tensor],
    loss: Loss,
    begin: Callable[[Params, Batch], Params] | None = None,
    pull: Pull | None = None,
) -> Value:
    """L^S(θ) + R(θ, θ₀, S), where θ has the entries that move and φ the others; R = `pull`."""

    return _SupportLoss(f, loss, begin, pull)  # type: ignore[return-value]


class _SupportLoss(NamedTuple):
    """What `support_loss` gives."""

    f: Callable[[Params, Any], Tensor]
    loss: Loss
    begin: Callable[[Params, Batch], Params] | None
    pull: Pull | None

    def __call__(self, phi: Params, support: Batch) -> Callable[[Params], Tensor]:
        expect(isinstance(support, Batch), "a support set, Batch(x, y)", support)
        anchor = {**phi, **self.begin(phi, support)} if self.begin else {}

        def inner(theta: Params) -> Tensor:
            whole = {**phi, **theta}
            value = risk(self.loss, self.f(whole, support.x), support.y)
            return value + self.pull(whole, anchor, support.x) if self.pull else value

        return inner


def descending(
    begin: Callable[[Params, Batch], Params],
    value: Value,
    lr: Callable[[Params], Rate],
    steps: int,
    rule: Callable[[Params], Rule | None] = lambda phi: None,
) -> Steps:
    """Gradient descent as an `adapt`: θ ← θ − α ∇_θ L(θ) from θ₀ = begin(φ, S), with L = value(φ, S), α = lr(φ).

    A `rule`, which may depend on φ too, is another way of stepping. Raises ValueError unless `steps` is a whole number of
    at least 0, or where a rate has the name of no entry.
    """
    check_steps(steps)
    for f in (begin, value, lr, rule):
        expect(made(f), "begin(phi, S), value(phi, S), lr(phi) and rule(phi), each a function", f)

    start: Any = _Start(begin)
    one: Any = _Step(value, lr, rule)
    return Steps(start, one, steps, descent=lambda phi, support: (value(phi, support), lr(phi)))


class _Start(NamedTuple):
    """Where `descending` begins: at begin(φ, S), and no rule has a state yet."""

    begin: Callable[[Params, Batch], Params]

    def __call__(self, phi: Params, support: Batch) -> Point:
        return self.begin(phi, support), None

    def plainly(self) -> list[str] | None:
        """The network's weights that move, from φ's own values, unless they are frozen; None where it begins elsewhere."""
        return self.begin.names if type(self.begin) is _Moving else None


class _Step(NamedTuple):
    """The inner steps of `descending`."""

    value: Value
    lr: Callable[[Params], Rate]
    rule: Callable[[Params], Rule | None]

    def __call__(self, phi: Params, support: Batch, number: int, point: Point) -> Point:
        a = self.rate(phi, number)
        if isinstance(a, dict) and (stray := [k for k in a if k not in point[0] and k not in phi]):
            raise ValueError(
                f"expected rates of entries of θ; no entry is named {stray[:5]}, but {list(point[0])[:5]} move"
            )
        return step(self.value(phi, support), point, a, number, self.rule(phi))

    def rate(self, phi: Params, number: int) -> Any:
        """α of this step: of all entries, or by their names."""
        a = self.lr(phi)
        return a(number) if callable(a) else a

    def plainly(self, phi: Params) -> tuple[Callable[[Params, Any], Tensor], Loss] | None:
        """(f, loss) where a step is θ ← θ − α ∇loss(f(θ, x), y) and no more; None elsewhere."""
        value = self.value
        if type(value) is not _SupportLoss or value.pull or self.rule(phi):
            return None
        return value.f, value.loss


def descend(
    loss: Callable[[Params], Tensor], theta: Params, lr: Rate, steps: int, rule: Rule | None = None
) -> Params:
    """Gradient descent, differentiable in everything: θ ← θ − α ∇L(θ), `steps` times.

    `lr` is one rate, or a rate per entry of θ (a dict: discriminative rates, Meta-SGD), or a function of
    the step that gives either. With a `rule`, θ ← θ − α rule(∇L(θ)): momentum, Adam, a curvature.
    Raises ValueError as `check_descent` does.
    """
    check_descent(loss, lr, steps, rule)
    point: Point = (theta, None)
    for number in range(steps):
        point = step(loss, point, lr, number, rule)
    return point[0]


def step(
    loss: Callable[[Params], Tensor], point: Point, lr: Rate, number: int, rule: Rule | None = None
) -> Point:
    """Inner step `number`: θ ← θ − α ∇L(θ), or along rule(∇L(θ)).

    Raises ValueError where a rate is no rate, an entry of θ has none, or its rate another shape.
    """
    theta, state = point
    u = ways.gradient(loss, theta)
    if rule:
        u, state = rule(u, state)
    a = lr(number) if callable(lr) else lr
    check_rate(a)
    rates = a if isinstance(a, dict) else dict.fromkeys(theta, a)
    if rates is a and (without := [k for k in theta if k not in a]):
        raise ValueError(
            f"expected a rate for each entry that moves; none for {without[:5]}, but for {list(a)[:5]}"
        )
    moved: Params = ways.along(theta, rates, u)  # θ − αu
    for k, v in moved.items():
        if v.shape != theta[k].shape:
            raise ValueError(
                f"expected one rate for {k!r}, or one for each of its numbers {tuple(theta[k].shape)}; got rates of shape "
                f"{tuple(torch.as_tensor(rates[k]).shape)}"
            )
    return moved, state


def weights(net: nn.Module) -> Params:
    """A network's own parameters, as they are: not copies. Raises ValueError where it is no network."""
    expect(isinstance(net, nn.Module), "a network, an nn.Module", net)
    return {k: v.detach() for k, v in net.named_parameters()}


def check_descent(loss: object, lr: Rate, steps: int, rule: object = None) -> None:
    """Raise ValueError unless there are a loss, rates of at least 0, a whole number of steps, and a rule or none."""
    expect(made(loss), "a loss, a function such as nn.functional.mse_loss", loss)
    expect(rule is None or made(rule), "a rule, a function such as momentum() or adam()", rule)
    check_steps(steps)
    if not made(lr):
        check_rate(lr)


def made(found: object) -> bool:
    """Whether it can be called, and is no class that would first have to be made."""
    return callable(found) and not isinstance(found, type)


def check_steps(steps: int, name: str = "steps", least: int = 0) -> None:
    """Raise ValueError unless it is a whole number of at least `least`."""
    whole = isinstance(steps, Integral) and not isinstance(steps, bool) and steps >= least
    if not whole:
        raise ValueError(f"expected a whole number: {name} of at least {least}, got {steps!r:.60}")


def at_least_zero(**numbers: Any) -> None:
    """Raise ValueError unless each is a finite number of at least 0; tensors, which may be learned, pass."""
    for name, number in numbers.items():
        if not isinstance(number, Tensor):
            real = isinstance(number, Real) and not isinstance(number, bool)
            if not (real and 0 <= number < math.inf):
                raise ValueError(f"expected a finite {name} of at least 0, got {number!r:.60}")


def check_rate(lr: Rate) -> None:
    """Raise ValueError where a rate, or one of a dict, is a plain number below 0, NaN or infinite."""
    at_least_zero(
        **{f"rate of {k!r}": a for k, a in lr.items()} if isinstance(lr, dict) else {"rate": lr}
    )


def proximity(theta: Params, anchor: Params) -> Tensor:
    """½ Σ ‖θ − anchor‖², over the entries of θ: L2-SP, iMAML and Reptile share it.

    Raises ValueError where the anchor lacks one, or has it in another shape.
    """
    require(anchor, theta)
    for k, v in theta.items():
        if anchor[k].shape != v.shape:
            raise ValueError(
                f"expected an anchor {k} of shape {tuple(v.shape)}, got {tuple(anchor[k].shape)}"
            )
    return 0.5 * sum(((theta[k] - anchor[k]) ** 2).sum() for k in theta)  # type: ignore[return-value]


def proximal(strength: float) -> Pull:
    """½λ‖θ − θ₀‖², every entry alike: the inner problem of iMAML. {cite}`rajeswaran2019imaml`

    Raises ValueError if λ = `strength` < 0.
    """
    at_least_zero(strength=strength)
    return lambda theta, anchor, x: strength * proximity(theta, anchor)


# Rules: how a step is made from a gradient ----------------------------------------------------


def momentum(mu: float = 0.9) -> Rule:
    """m ← μ m + g, and the step goes along m; torch.optim.SGD(momentum=μ). {cite}`polyak1964methods`

    Raises ValueError unless 0 ≤ μ < 1.
    """
    at_least_zero(mu=mu)
    expect(mu < 1, "mu below 1: the steps would grow without end", mu)

    def rule(g: Params, m: Params | None) -> tuple[Params, Params]:
        m = {k: mu * m[k] + g[k] for k in g} if m else g
        return m, m

    return rule


def adam(beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> Rule:
    """m ← β₁m + (1 − β₁)g,  v ← β₂v + (1 − β₂)g²;  the step goes along m̂ / (√v̂ + ε).

    m̂ = m/(1 − β₁ᵗ), v̂ = v/(1 − β₂ᵗ). Where v = 0 the root counts as a constant: its slope is infinite
    there. {cite}`kingma2015adam`
    Raises ValueError unless 0 ≤ β < 1 and ε ≥ 0.
    """
    at_least_zero(beta1=beta1, beta2=beta2, eps=eps)
    expect(max(beta1, beta2) < 1, "beta1 and beta2 below 1", max(beta1, beta2))

    def rule(g: Params, state: Any) -> tuple[Params, Any]:
        zero = {k: torch.zeros_like(v) for k, v in g.items()}
        m, v, t = state or (zero, zero, 0)
        t = t + 1
        m = {k: beta1 * m[k] + (1 - beta1) * g[k] for k in g}
        v = {k: beta2 * v[k] + (1 - beta2) * g[k] ** 2 for k in g}
        u = {k: m[k] / (1 - beta1**t) / (root(v[k] / (1 - beta2**t)) + eps) for k in g}
        return u, (m, v, t)

    return rule


def constant(g: Params, state: None) -> tuple[Params, None]:
    """The gradient as a constant to the outer objective: FOMAML as a rule, for learned rates and starts too."""
    return {k: v.detach() for k, v in g.items()}, None


def root(v: Tensor) -> Tensor:
    """√v, with slope 0 at 0."""
    return torch.where(v > 0, torch.where(v > 0, v, 1.0).sqrt(), 0.0)
