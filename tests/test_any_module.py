"""Networks and losses that users bring: recurrent, with attention, with choices by values; right to second order.

The right values are plain torch autograd in float64, one task after the other, on a copy of the module that takes the
inner steps itself.
"""

from __future__ import annotations

import threading
import warnings
from functools import partial

import pytest
import torch
from problems import largest, slope_gap
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import (
    cross_entropy,
    embedding_bag,
    mse_loss,
    scaled_dot_product_attention,
)
from torch.optim import LBFGS, SGD, Adam, SparseAdam
from torch.optim.lr_scheduler import (
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LinearLR,
    MultiplicativeLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from torch.optim.swa_utils import SWALR, AveragedModel
from torch.utils.data import DataLoader, TensorDataset

from mtlib.bilevel import bilevel, first_order, implicit, secant
from mtlib.core import Batch, Episode, Learner, parameters, take, ways
from mtlib.evaluate import evaluate
from mtlib.joint import joint
from mtlib.learners.gradient import anil, maml
from mtlib.learners.lora import lora
from mtlib.learners.metric import protonet
from mtlib.nets import two_halves
from mtlib.objective import Batched, over_tasks, whole
from mtlib.run.attention import NO_CUDNN, NO_FASTPATH, Switch
from mtlib.run.fast import MATH
from mtlib.tasks import mixture, one_hot
from mtlib.train import fit

RATE, STEPS, WIDTH = 0.1, 2, 8
IN_A_LOOP = pytest.mark.filterwarnings(
    "ignore:tasks run in a loop", "ignore:an embedding with padding_idx"
)


class Body(nn.Module):
    """(N, 7, 3) -> (N, WIDTH): modules by name, and what they compute."""

    def __init__(self, compute, **modules):
        super().__init__()
        self.compute = compute
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.compute(self, x)


def recurrent(kind):
    return Body(lambda m, x: m.cell(x)[0][:, -1], cell=kind(3, WIDTH, batch_first=True))


def spectral(norm):
    return Body(lambda m, x: m.line(x.mean(1)).tanh(), line=norm(nn.Linear(3, WIDTH))).eval()


def attending(**options):
    a = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
    return Body(
        lambda m, x: m.a(*[m.line(x)] * 3, **options)[0].mean(1), line=nn.Linear(3, WIDTH), a=a
    )


def layer(dropout=0.0):
    return nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=dropout, batch_first=True)


def encoder():
    return Body(lambda m, x: m.layer(m.line(x)).mean(1), line=nn.Linear(3, WIDTH), layer=layer())


def padded(m, x):
    """The last one or two places of each row are padding."""
    mask = torch.arange(7) >= 6 - (torch.arange(len(x)) % 2)[:, None]
    mask = mask.to(x.device)
    z = m.layers(m.line(x), src_key_padding_mask=mask)
    return z[:, :5].mean(1)


def masked(m, x):
    z = m.line(x.mean(1))
    return torch.stack([r[r > 0].sum() * r for r in z])


def chosen(m, x):
    z = m.line(x.mean(1))
    return z.tanh() if z.mean() > 0 else z.sin()


def vision(m, x):
    """A block of a vision transformer, as timm writes it."""
    z = m.line(x)
    q, k, v = m.qkv(m.norm1(z)).reshape(len(z), 7, 3, 2, WIDTH // 2).permute(2, 0, 3, 1, 4)
    z = z + m.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(len(z), 7, WIDTH))
    return (z + m.mlp(m.norm2(z))).mean(1)


NEEDS_LOOP = {
    "LSTM": lambda: recurrent(nn.LSTM),
    "GRU": lambda: recurrent(nn.GRU),
    "RNN": lambda: recurrent(nn.RNN),
    "boolean mask": lambda: Body(masked, line=nn.Linear(3, WIDTH)),
    "a choice by values": lambda: Body(chosen, line=nn.Linear(3, WIDTH)),
}
TOGETHER = {
    "spectral norm, old": lambda: spectral(nn.utils.spectral_norm),
    "spectral norm": lambda: spectral(nn.utils.parametrizations.spectral_norm),
    "MultiheadAttention": lambda: attending(need_weights=False),
    "MultiheadAttention with its weights": lambda: attending(),
    "MultiheadAttention, evaluation": lambda: attending(need_weights=False).eval(),
    "TransformerEncoderLayer": encoder,
    "TransformerEncoderLayer, evaluation": lambda: encoder().eval(),
    "TransformerEncoder with padding": lambda: Body(
        padded,
        line=nn.Linear(3, WIDTH),
        layers=nn.TransformerEncoder(layer(), 2, enable_nested_tensor=False),
    ),
    "scaled_dot_product_attention": lambda: Body(
        lambda m, x: scaled_dot_product_attention(*[m.line(x)[:, None]] * 3).mean((1, 2)),
        line=nn.Linear(3, WIDTH),
    ),
    "a block of a vision transformer": lambda: Body(
        vision,
        line=nn.Linear(3, WIDTH),
        qkv=nn.Linear(WIDTH, 3 * WIDTH),
        out=nn.Linear(WIDTH, WIDTH),
        norm1=nn.LayerNorm(WIDTH),
        norm2=nn.LayerNorm(WIDTH),
        mlp=nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH)),
    ),
}
BODIES = NEEDS_LOOP | TOGETHER


def network(name):
    torch.manual_seed(1)
    return two_halves(BODIES[name](), nn.Linear(WIDTH, 2)).double()


def episodes(tasks=3, rows=4, seed=0) -> Episode:
    g = torch.Generator().manual_seed(seed)
    y = one_hot(torch.arange(rows) % 2, 2, torch.float64).expand(tasks, -1, -1)
    x = torch.rand(2, tasks, rows, 7, 3, generator=g, dtype=torch.float64)
    return Episode(Batch(x[0], y), Batch(x[1], y))


def by_hand(net, data, loss=cross_entropy, first=False, adapted=""):
    """(value, gradient) of MAML, by plain autograd: the module called with θ by torch, one task after the other."""
    phi = {k: v.detach().clone().requires_grad_() for k, v in net.named_parameters()}
    total, tasks = 0.0, len(data.query.y)
    with sdpa_kernel(SDPBackend.MATH):
        for t in range(tasks):
            (xs, ys), (xq, yq) = take(data, t)
            theta = dict(phi)
            for _ in range(STEPS):
                moving = {k: v for k, v in theta.items() if k.startswith(adapted)}
                inner = loss(functional_call(net, theta, (xs,)), ys)
                g = torch.autograd.grad(inner, list(moving.values()), create_graph=not first)
                theta |= {k: v - RATE * d for (k, v), d in zip(moving.items(), g, strict=True)}
            total = total + loss(functional_call(net, theta, (xq,)), yq) / tasks
        grads = torch.autograd.grad(total, list(phi.values()))
    return total.detach(), dict(zip(phi, grads, strict=True))


def agree(ours, right, tolerance=1e-12):
    assert abs(ours[0] - right[0]) <= tolerance
    assert largest({k: ours[1][k] for k in right[1]}, right[1]) <= tolerance
    assert max(v.abs().max() for v in right[1].values()) > 1e-6


# The gradient is plain torch's ---------------------------------------------------------------------


@IN_A_LOOP
@pytest.mark.parametrize("name", BODIES)
def test_maml_is_exact_to_second_order(name):
    net, data = network(name), episodes()
    learner = maml(net, cross_entropy, RATE, STEPS)
    right = by_hand(net, data)
    for chunk in (None, 1, 2):
        agree(
            bilevel(learner, cross_entropy, chunk=chunk).value_and_grad(parameters(net), data),
            right,
        )
    assert MATH._saved is None and NO_FASTPATH._saved is None


@IN_A_LOOP
@pytest.mark.parametrize("name", BODIES)
def test_first_order_joint_and_a_part_of_the_network_are_exact(name):
    net, data = network(name), episodes()
    phi = parameters(net)
    inner = anil(net, cross_entropy, RATE, STEPS)
    agree(
        bilevel(inner, cross_entropy).value_and_grad(phi, data),
        by_hand(net, data, adapted="head."),
    )
    learner = maml(net, cross_entropy, RATE, STEPS)
    agree(
        bilevel(learner, cross_entropy, first_order).value_and_grad(phi, data),
        by_hand(net, data, first=True),
    )
    leaves = {k: v.detach().clone().requires_grad_() for k, v in net.named_parameters()}
    value = sum(
        cross_entropy(functional_call(net, leaves, (x,)), y) / 3
        for x, y in zip(*data.query, strict=True)
    )
    grads = torch.autograd.grad(value, list(leaves.values()))
    agree(
        joint(net, cross_entropy).value_and_grad(phi, data.query),
        (value.detach(), dict(zip(leaves, grads, strict=True))),
    )


OTHERS = {
    "secant": (lambda net: maml(net, cross_entropy, RATE, STEPS), secant),
    "implicit": (lambda net: maml(net, cross_entropy, RATE, 20, 1.0), implicit(1.0, 3)),
    "protonet": (protonet, None),
}


@IN_A_LOOP
@pytest.mark.parametrize("way", OTHERS)
@pytest.mark.parametrize("name", ["LSTM", "TransformerEncoderLayer", "boolean mask"])
def test_other_ways_give_together_what_they_give_in_a_loop(name, way):
    net, data = network(name), episodes()
    make, hypergradient = OTHERS[way]
    loop, together = (
        bilevel(make(net), cross_entropy, hypergradient, chunk=c).value_and_grad(
            parameters(net), data
        )
        for c in (1, 3)
    )
    agree(together, loop, 1e-11)


@IN_A_LOOP
@pytest.mark.parametrize("name", ["GRU", "MultiheadAttention"])
def test_lora_has_the_slope_of_finite_differences(name):
    net, data = network(name), episodes()
    learner = lora(net, cross_entropy, RATE, STEPS)
    objective, phi = bilevel(learner, cross_entropy), learner.init()
    grads = objective.value_and_grad(phi, data)[1]
    still = {k: v for k, v in phi.items() if k not in grads}
    with sdpa_kernel(SDPBackend.MATH):
        assert (
            slope_gap(
                lambda moving, data: objective({**still, **moving}, data),
                *({k: phi[k] for k in grads}, data, grads),
            )
            <= 1e-8
        )


@IN_A_LOOP
@pytest.mark.parametrize("name", BODIES)
def test_evaluation_is_that_of_a_loop(name):
    net = network(name)
    learner = maml(net, cross_entropy, RATE, STEPS)

    def values(chunk):
        return evaluate(
            learner, parameters(net), lambda s: episodes(seed=s), 6, _closeness, chunk, False
        ).values

    assert (values(None) - values(1)).abs().max() <= 1e-13


def _closeness(prediction, y):
    return -mse_loss(prediction.softmax(-1), y)


# Where vmap has no rule ----------------------------------------------------------------------------


@pytest.mark.fast
@pytest.mark.parametrize("name", NEEDS_LOOP)
def test_one_warning_says_why_tasks_run_in_a_loop(name):
    net, data = network(name), episodes()
    objective = bilevel(maml(net, cross_entropy, RATE, STEPS), cross_entropy)
    with pytest.warns(UserWarning, match="tasks run in a loop.*vmap.*says") as told:
        objective.value_and_grad(parameters(net), data)
    assert len(told) == 1 and not objective.run.exact
    assert "cannot read x" not in str(told[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        objective.value_and_grad(parameters(net), data)


def item(prediction, y):
    """Focal in a way: the weight of the loss is a number."""
    value = cross_entropy(prediction, y)
    return value * min(1.0, 0.5 + value.item())


def boolean(prediction, y):
    """Only rows that are not yet right count."""
    wrong = prediction.argmax(1) != y.argmax(1)
    return cross_entropy(prediction[wrong], y[wrong]) if wrong.any() else 0 * prediction.sum()


@pytest.mark.fast
@pytest.mark.parametrize("loss", [item, boolean])
def test_losses_with_choices_by_values_run_in_a_loop(loss):
    torch.manual_seed(1)
    net, data = two_halves(nn.Flatten(), nn.Linear(21, 2)).double(), episodes()
    learner = maml(net, loss, RATE, STEPS)
    with pytest.warns(UserWarning, match="tasks run in a loop"):
        agree(
            bilevel(learner, loss).value_and_grad(parameters(net), data), by_hand(net, data, loss)
        )


@pytest.mark.fast
def test_an_error_of_the_users_own_is_the_loops():
    """A wrong shape fails in the loop, too, and with plainer words: no task is stacked there."""
    net, data = two_halves(nn.Flatten(), nn.Linear(20, 2)).double(), episodes()
    objective = bilevel(maml(net, cross_entropy, RATE, STEPS), cross_entropy)
    with pytest.raises(ValueError, match=r"4, 7, 3.*4x21 and 20x2") as told:
        objective.value_and_grad(parameters(net), data)
    assert "vmap" not in str(told.value) and objective.run.exact

    def task(phi, x):
        raise KeyError("a mistake")

    with pytest.raises(KeyError, match="a mistake"):
        over_tasks(task).value_and_grad({"w": torch.ones(2)}, torch.ones(3, 2))


@pytest.mark.fast
def test_the_loop_draws_the_random_numbers_that_chunk_1_draws():
    body = Body(
        lambda m, x: m.cell(m.drop(x))[0][:, -1],
        drop=nn.Dropout(0.5),
        cell=nn.GRU(3, WIDTH, batch_first=True),
    )
    net, data = two_halves(body, nn.Linear(WIDTH, 2)).double(), episodes()
    learner, found = maml(net, cross_entropy, RATE, STEPS), []
    for chunk in (1, None):
        objective = bilevel(learner, cross_entropy, chunk=chunk)
        for _ in range(2):
            torch.manual_seed(5)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="tasks run in a loop")
                found.append(objective.value_and_grad(parameters(net), data))
    for other in found[1:]:
        agree(other, found[0], 1e-15)


@pytest.mark.fast
def test_a_compiled_objective_knows_where_only_a_loop_runs(monkeypatch):
    """The compiler is not asked to stack tasks that vmap could not stack, nor norms that it gets wrong."""
    programs = []
    monkeypatch.setattr(torch, "compile", lambda f, **options: programs.append(f) or f)
    body = Body(
        lambda m, x: nn.functional.layer_norm(m.line(x.mean(1)), (WIDTH,)), line=nn.Linear(3, WIDTH)
    )
    torch.manual_seed(1)
    net, data = two_halves(body, nn.Linear(WIDTH, 2)).double(), episodes()
    objective = bilevel(maml(net, cross_entropy, RATE, STEPS), cross_entropy, compile=True)
    right = by_hand(net, data)
    agree(objective.value_and_grad(parameters(net), data), right)
    agree(objective.value_and_grad(parameters(net), data), right)
    assert len(programs) == 1
    once = bilevel(maml(net, cross_entropy, RATE, STEPS), cross_entropy, first_order, compile=True)
    for _ in range(2):
        agree(once.value_and_grad(parameters(net), data), by_hand(net, data, first=True))


@pytest.mark.fast
def test_fit_resumes_a_run_that_fell_back_to_the_loop(tmp_path):
    net = network("LSTM")
    learner = maml(net, cross_entropy, RATE, STEPS)

    def train(steps, path):
        with pytest.warns(UserWarning, match="tasks run in a loop"):
            return fit(
                *(bilevel(learner, cross_entropy), learner.init(), lambda s: episodes(seed=s)),
                *(steps, lambda p: torch.optim.SGD(p, lr=0.1)),
                checkpoint=path,
                progress=False,
            )

    whole = train(4, tmp_path / "whole.safetensors")
    train(2, tmp_path / "part.safetensors")
    rest = train(4, tmp_path / "part.safetensors")
    assert rest.losses == whole.losses
    assert all(torch.equal(rest.params[k], v) for k, v in whole.params.items())


# Where vmap is wrong without a word ----------------------------------------------------------------


@pytest.mark.fast
@pytest.mark.parametrize("options", [{"padding_idx": 0}, {"scale_grad_by_freq": True}, {}])
def test_embeddings_are_exact_where_vmap_forgets_padding_or_counts_all_tasks(options):
    """torch's vmap keeps the padding of the first task alone, where tasks have weights of their own."""
    torch.manual_seed(0)
    body = Body(lambda m, x: m.words(x).mean(1).tanh(), words=nn.Embedding(6, WIDTH, **options))
    net = two_halves(body, nn.Linear(WIDTH, 2)).double()
    data, phi = episodes(), parameters(net)
    x = (6 * data.query.x[..., 0]).long()
    data = Episode(Batch(x, data.support.y), Batch(x.flip(2), data.query.y))
    learner = maml(net, cross_entropy, RATE, STEPS)
    for objective, right, inexact in (
        (bilevel(learner, cross_entropy), by_hand(net, data), bool(options)),
        (joint(net, cross_entropy), None, "scale_grad_by_freq" in options),
    ):
        draw = data if right else data.query
        right = right or joint(net, cross_entropy, chunk=1).value_and_grad(phi, draw)
        for _ in range(2):
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                agree(objective.value_and_grad(phi, draw), right)
            assert [str(w.message)[:12] for w in told] == ["an embedding"] * inexact
            inexact = False


# Attention -----------------------------------------------------------------------------------------


def bert(attention, batch=4):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        **{"vocab_size": 20, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_labels": 2},
        **{"num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 12},
        **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        attn_implementation=attention,
    )
    return transformers.BertForSequenceClassification(config)


class Words(nn.Module):
    """Token numbers (N, L) -> logits."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(input_ids=x).logits


@IN_A_LOOP
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_transformer_of_hugging_face_is_exact_to_second_order(attention):
    net, data = Words(bert(attention)).double().eval(), episodes()
    data = data._replace(
        **{k: b._replace(x=(20 * b.x[..., 0]).long()) for k, b in data._asdict().items()}
    )
    right = by_hand(net, data)
    learner = maml(net, cross_entropy, RATE, STEPS)
    agree(bilevel(learner, cross_entropy).value_and_grad(parameters(net), data), right)


@pytest.mark.fast
def test_first_derivatives_keep_the_fused_kernels():
    """In a loop, and in evaluation; second derivatives and vmap on a CPU take the math kernel."""
    seen = []

    def compute(m, x):
        seen.append(torch.backends.cuda.flash_sdp_enabled())
        return scaled_dot_product_attention(*[m.line(x)[:, None]] * 3).mean((1, 2))

    net = two_halves(Body(compute, line=nn.Linear(3, WIDTH)), nn.Linear(WIDTH, 2)).double()
    data, phi = episodes(), parameters(net)
    learner = maml(net, cross_entropy, RATE, 1)
    bilevel(learner, cross_entropy, first_order, chunk=1).value_and_grad(phi, data)
    joint(net, cross_entropy, chunk=1).value_and_grad(phi, data.query)
    evaluate(learner, phi, lambda s: episodes(seed=s), 3, _closeness, 1, False)
    assert all(seen)
    seen.clear()
    bilevel(learner, cross_entropy, chunk=1).value_and_grad(phi, data)
    assert seen == [False, True] * 3  # support, query
    seen.clear()
    bilevel(learner, cross_entropy, first_order).value_and_grad(phi, data)
    assert not any(seen) and torch.backends.cuda.flash_sdp_enabled()


@pytest.fixture
def setting():
    """A setting of a process, and a switch that turns it off."""
    now = {"on": True}
    return now, Switch([(lambda: now["on"], lambda v: now.update(on=v), False)])


def test_interleaved_holders_leave_the_setting_as_it_was(setting):
    now, switch = setting
    first, second = switch.held(), switch.held()
    first.__enter__()
    second.__enter__()
    first.__exit__()
    assert not now["on"]
    second.__exit__()
    assert now["on"]
    now["on"] = False  # by the user
    with switch.held(), switch.held():
        assert not now["on"]
    assert not now["on"]


def test_threads_that_hold_a_switch_leave_it_as_it_was(setting):
    now, switch = setting
    wrong = []

    def work():
        for _ in range(300):
            with switch.held():
                if now["on"]:
                    wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong and now["on"] and not switch._holders


def test_errors_and_ctrl_c_let_go_of_a_switch(setting):
    now, switch = setting
    with pytest.raises(KeyError), switch.held():
        raise KeyError
    assert now["on"]
    for when in ("read", "write", "restore"):
        left = [when]

        def interrupted(moment, left=left):
            if moment in left:
                left.remove(moment)
                raise KeyboardInterrupt

        def read(interrupted=interrupted):
            interrupted("read")
            return now["on"]

        def write(value, interrupted=interrupted):
            interrupted("write" if not value else "restore")
            now.update(on=value)

        other = Switch([(read, write, False)])
        with pytest.raises(KeyboardInterrupt), other.held():
            pass
        with other.held():
            assert not now["on"]
        assert now["on"] and not other._holders


def test_who_is_interrupted_on_the_way_out_lets_go_when_it_is_gone(setting):
    now, switch = setting
    held = switch.held()
    held.__enter__()
    assert not now["on"]
    del held
    assert now["on"]


def test_the_switches_are_torchs_own():
    for switch in (MATH, NO_FASTPATH, NO_CUDNN):
        before = [read() for read, _, _ in switch.settings]
        with switch.held():
            assert all(read() == value for read, _, value in switch.settings)
        assert [read() for read, _, _ in switch.settings] == before
    kernels = [torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.mem_efficient_sdp_enabled]
    with MATH.held():
        assert torch.backends.cuda.math_sdp_enabled() and not any(on() for on in kernels)
    assert all(on() for on in kernels)


# No second derivatives -----------------------------------------------------------------------------


def bag(w, x):
    return embedding_bag((x[:, :, 0] * 3).long(), w["e"], mode="mean") @ w["o"]


def distances(w, x):
    return torch.cdist(x.mean(1) @ w["e"][:3], w["e"]) @ w["o"][:1].expand(4, 2)


ONCE = {
    "embedding_bag": (bag, "nn.Embedding"),
    "cdist": (distances, "compute_mode"),
    "hardsigmoid": (
        lambda w, x: nn.functional.hardsigmoid(x.mean(1) @ w["e"][:3]) @ w["o"],
        "relu6",
    ),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # embedding_bag under vmap
@pytest.mark.parametrize("name", ONCE)
def test_what_has_no_second_derivative_is_named_with_what_to_write(name):
    f, advice = ONCE[name]
    torch.manual_seed(0)
    phi = {"e": torch.rand(4, 5).double(), "o": torch.rand(5, 2).double()}

    def steps(phi, support):
        g = ways.gradient(lambda p: cross_entropy(f(p, support.x), support.y), phi)
        return {k: phi[k] - RATE * g[k] for k in phi}

    learner = Learner(lambda: phi, steps, f)
    for chunk in (None, 1):
        with pytest.raises(
            ValueError, match=f"differentiated twice.*{name}.*first_order.*{advice}"
        ):
            bilevel(learner, cross_entropy, chunk=chunk).value_and_grad(phi, episodes())
    assert bilevel(learner, cross_entropy, first_order).value_and_grad(phi, episodes())[1]

    def penalty(phi, data):
        (g,) = torch.autograd.grad(
            cross_entropy(f(phi, data.x), data.y), phi["e"], create_graph=True
        )
        return (g**2).sum()

    with pytest.raises(ValueError, match=f"differentiated twice.*{name}"):
        whole(penalty).value_and_grad(phi, take(episodes().query, 0))


CUDNN = {
    "twice": "the derivative for '_cudnn_rnn_backward' is not implemented. Double backwards is not supported for CuDNN",
    "in evaluation mode": "cudnn RNN backward can only be called in training mode",
}


@pytest.mark.parametrize("message", CUDNN.values(), ids=CUDNN)
def test_recurrent_networks_of_cudnn_run_without_it(message):
    """As a GPU without these derivatives: it fails wherever cuDNN is on, in the task or on the way back."""
    seen = []

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.fused = torch.backends.cudnn.enabled
            seen.append(ctx.fused)
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            if ctx.fused:
                raise NotImplementedError(message)
            return g

    def task(phi, x):
        return torch.rand(()) * (Fused.apply(phi["w"]) * x).sum()

    objective, phi, x = over_tasks(task, chunk=1), {"w": torch.ones(2)}, torch.ones(3, 2)
    for told in (1, 0):
        seen.clear()
        torch.manual_seed(0)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            value, grads = objective.value_and_grad(phi, x)
        torch.manual_seed(0)
        right = sum(torch.rand(()) * 2 / 3 for _ in range(3))
        assert abs(value - right) <= 1e-6 and abs(grads["w"].sum() - right) <= 1e-6
        assert len(warned) == told and seen == [True] * told + [False] * 3
        assert torch.backends.cudnn.enabled

    def adapts(phi, x):
        (g,) = torch.autograd.grad(Fused.apply(phi["w"]).sum(), phi["w"], create_graph=True)
        return (g * x).sum()

    with pytest.warns(UserWarning, match="without cuDNN"):
        assert over_tasks(adapts, vmap=False)({"w": torch.ones(2).requires_grad_()}, x) == 2


def test_a_run_learns_what_the_one_before_found_out():
    before, now = (Batched(lambda phi, x: x) for _ in range(2))
    before.exact, before.without_cudnn = False, True
    now.task = before.task
    now.learn_from(before)
    assert not now.exact and now.without_cudnn


# Optimizers, schedules and streams that `fit` cannot use -------------------------------------------


class Asks(torch.optim.Optimizer):
    """An optimizer whose step takes a closure after all."""

    def __init__(self, entries, lr):
        super().__init__(entries, {"lr": lr})

    def step(self, closure=None):
        closure()


POINTS = Batch(torch.randn(40, 3), torch.arange(40) % 2)
GIVEN = SGD([torch.ones(1)], lr=0.25)
DATA = TensorDataset(*POINTS)
UNFIT = {
    "L-BFGS": ({"optimizer": partial(LBFGS, lr=1.0)}, r"LBFGS.*partial\(torch.optim.Adam, lr=1e-3"),
    "an optimizer": ({"optimizer": GIVEN}, r"partial\(torch.optim.SGD, lr=0.25\)"),
    "a class": ({"optimizer": Adam}, r"partial\(torch.optim.Adam, lr=0.001\)"),
    "a class of one's own": ({"optimizer": Asks}, r"partial\(Asks, lr=0.001\)"),
    "sparse gradients": ({"optimizer": partial(SparseAdam, lr=0.1)}, "dense.*SparseAdam cannot"),
    "a closure": ({"optimizer": partial(Asks, lr=0.1)}, "Asks cannot.*not callable"),
    "a schedule": ({"schedule": StepLR(GIVEN, 3)}, r"lambda o: StepLR\(o, \.\.\.\)"),
    "a class of schedules": ({"schedule": StepLR}, r"step_size.*partial\(StepLR, step_size=10\)"),
    "a plateau": ({"schedule": partial(ReduceLROnPlateau, patience=3)}, "early_stopping"),
    "a plateau that is made": ({"schedule": ReduceLROnPlateau(GIVEN)}, "waits for a metric"),
    "averages": ({"schedule": AveragedModel(nn.Linear(1, 1))}, "got a AveragedModel"),
    "a loader": ({"stream": DataLoader(DATA, 8)}, r"zip\(\*loader.dataset\).*mixture\(Batch"),
    "a data set": ({"stream": DATA}, r"zip\(\*dataset\).*mixture\(Batch"),
    "data": ({"stream": POINTS}, r"mixture\(data, batch=64, seed=0\)"),
    "an iterator": ({"stream": iter(DataLoader(DATA, 8))}, "Iter. Write `lambda step"),
    "a list": ({"stream": [1, 2]}, "got a list. Write `lambda step"),
    "a network": ({"stream": nn.Linear(3, 2)}, "got a Linear"),
    "a function without a step": ({"stream": lambda: 1}, "function of the step"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_fit_says_what_to_write_in_the_place_of_what_it_cannot_use(name):
    given, words = UNFIT[name]
    net = nn.Linear(3, 2)
    with pytest.raises(TypeError, match=words):
        fit(
            joint(net, cross_entropy),
            parameters(net),
            **{"stream": mixture(POINTS, batch=8, seed=0), "steps": 2, "progress": False, **given},
        )


def test_the_line_for_a_loader_is_a_stream():
    x, y = zip(*DataLoader(DATA, 8).dataset, strict=True)
    stream = mixture(Batch(torch.stack(x), torch.as_tensor(y)), batch=64, seed=0)
    assert stream(0).x.shape == (1, 64, 3)


SCHEDULES = {
    "warm restarts": lambda o: CosineAnnealingWarmRestarts(o, 2),
    "one cycle": lambda o: OneCycleLR(o, 0.1, total_steps=6),
    "cyclic": lambda o: CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "a sequence": lambda o: SequentialLR(o, [LinearLR(o), ExponentialLR(o, 0.9)], [2]),
    "averaging": lambda o: SWALR(o, 0.05, anneal_epochs=2),
    "multiplied": lambda o: MultiplicativeLR(o, lambda step: 0.9),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_of_torch_move_as_in_a_loop_of_torchs(name):
    torch.manual_seed(0)
    net = nn.Linear(3, 2).double()
    data = Batch(torch.randn(1, 40, 3).double(), one_hot(POINTS.y[None], 2, torch.float64))
    make = partial(SGD, lr=0.1, momentum=0.9)
    run = fit(
        *(joint(net, cross_entropy), parameters(net), lambda step: data, 5, make, SCHEDULES[name]),
        progress=False,
    )
    rule = make(net.parameters())
    plan = SCHEDULES[name](rule)
    for _ in range(5):
        rule.zero_grad()
        cross_entropy(net(data.x[0]), data.y[0]).backward()
        rule.step()
        plan.step()
    assert largest(run.params, parameters(net)) <= 1e-14
