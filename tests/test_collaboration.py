"""Layer collaboration: one step against autograd, what carries no gradient, special cases, resume, functional entropy."""

import contextlib
import copy
import itertools
import math
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from ff_research.collaboration import contributions, layer_goodness, theta_sweep
from ff_research.entropy import (
    entropic,
    entropy_loss,
    entropy_parts,
    functional_entropy,
    goodness_parts,
    log_goodness,
    stream_entropy,
)
from ff_research.goodness import mean_activity, sum_of_squares
from ff_research.layers import normalise, prepare
from ff_research.network import Network
from ff_research.objectives import GoodnessObjective, hinton, symba
from ff_research.readout import label_goodness, per_label_goodness
from ff_research.schedules import SCHEDULES
from ff_research.strategies import STRATEGIES
from ff_research.training import COLLABORATIONS, Diverged, gammas, train

QUIET = dict(precision="fp32", device="cpu", progress=False)
LABELS = STRATEGIES["label_embedding"]
MODES = (None, *COLLABORATIONS)


def weights(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def trained(images, mode, widths=(64, 30, 25, 20), epochs=2, strategy=None, **options):
    network, options = Network(list(widths)), QUIET | dict(epochs=epochs, seed=3, peer=0.03) | options
    history = train(network, images, strategy or LABELS(10), collaboration=mode, **options)
    return weights(network), [epoch | dict(seconds=0) for epoch in history.epochs]


def same(a, b):
    return torch.equal(a[0], b[0]) and a[1] == b[1]


# What a layer receives


@pytest.mark.parametrize("layers", [1, 2, 3, 7])
def test_gammas_are_the_sums_of_the_others(layers):
    g = 1000 * torch.rand(layers, 11, dtype=torch.float64)
    for mode in COLLABORATIONS:
        expected = torch.stack(
            [
                sum(
                    (g[t] for t in range(layers) if (t < i if mode == "previous" else t != i)), torch.zeros(11).double()
                )
                for i in range(layers)
            ]
        )
        torch.testing.assert_close(gammas(g, mode), expected)
    assert torch.equal(gammas(g, "previous")[-1], gammas(g, "all")[-1])


def test_gammas_carry_no_gradient_and_leave_their_input_alone():
    g = torch.rand(3, 4, requires_grad=True)
    before = g.detach().clone()
    for mode in COLLABORATIONS:
        assert not gammas(g * 2, mode).requires_grad and torch.equal(g, before)


def test_a_layer_of_high_goodness_does_not_drown_the_others():
    g = torch.tensor([[1e12], [3.0], [4.0]])
    assert gammas(g, "all")[0].item() == 7.0


# One step

OBJECTIVES = {
    "hinton": hinton(),
    "theta 100": hinton(theta=100.0),
    "symba": symba(),
    "mean_activity": hinton(theta=0.4, scale=5.0, goodness=mean_activity),
    "entropic": entropic(),
}


class OneBatch(LABELS):
    "Keeps what it gave."

    def streams(self, *arguments):
        self.given = super().streams(*arguments)
        return self.given


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_a_step_is_autograds_with_detached_sums(digits, objective, mode):
    "Every layer's update, all from the weights before the step, against plain autograd."
    strategy, lr = OneBatch(10), 0.1
    network = Network([64, 30, 25, 20])
    theirs = copy.deepcopy(network)
    train(
        network,
        digits,
        strategy,
        epochs=1,
        objective=objective,
        collaboration=mode,
        lr=lr,
        weight_decay=0.0,
        batch_size=2000,
        **QUIET,
    )
    x, hs = prepare(strategy.given.x, 64).dense(), []
    for layer in theirs.layers:
        hs.append(layer(x))
        x = normalise(hs[-1]).detach()
    own = [objective(h)[1].detach() for h in hs]
    for i, (layer, h) in enumerate(zip(theirs.layers, hs)):
        received = sum(
            (g for t, g in enumerate(own) if mode and (t < i or (mode == "all" and t > i))), torch.zeros(len(h), 1)
        )
        loss, _ = objective(h, gamma=received)
        grads = torch.autograd.grad(loss, list(layer.parameters()), retain_graph=True)
        for p, grad, mine in zip(layer.parameters(), grads, network.layers[i].parameters()):
            torch.testing.assert_close(mine.detach(), p.detach() - lr * grad, rtol=1e-4, atol=2e-6)


def test_positives_receive_positives_and_negatives_negatives(digits):
    "A layer that answers to its right stream alone: the gamma of a row is made of that row."
    seen = []

    class Spy(GoodnessObjective):
        def local_loss(self, h, s=None, gamma=0.0):
            loss, g = super().local_loss(h, s, gamma)
            seen.append((g.detach().clone(), gamma.clone()))
            return loss, g

    train(
        Network([64, 30, 20]),
        digits,
        LABELS(10),
        epochs=1,
        objective=Spy(theta="units"),
        collaboration="all",
        lr=0.0,
        batch_size=2000,
        **QUIET,
    )
    (g_1, gamma_1), (g_2, gamma_2) = seen
    assert torch.equal(gamma_1, g_2) and torch.equal(gamma_2, g_1) and not torch.allclose(*g_1.chunk(2))


# Runs


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("mode", COLLABORATIONS)
def test_one_layer_alone_is_plain_forward_forward(digits, schedule, mode):
    alone = dict(widths=(64, 30), schedule=schedule)
    assert same(trained(digits, None, **alone), trained(digits, mode, **alone))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_modes_differ_where_they_must(digits, schedule):
    runs = {mode: trained(digits, mode, schedule=schedule)[0] for mode in MODES}
    first = 64 * 30 + 30
    assert torch.equal(runs[None][:first], runs["previous"][:first])  # nothing is below the first layer
    for a, b in itertools.combinations(MODES, 2):
        assert not torch.equal(runs[a], runs[b])
    assert not torch.equal(runs[None][:first], runs["all"][:first])


def test_all_and_previous_are_the_same_for_the_last_layer(digits):
    "With the layers below held still, the last layer learns the same in both modes."
    last = [trained(digits, mode, lr=[0.0, 0.0, 1e-3], weight_decay=0.0)[0] for mode in COLLABORATIONS]
    torch.testing.assert_close(*last, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", COLLABORATIONS)
def test_greedy_receives_the_goodness_of_frozen_layers(digits, mode):
    "The second of three layers, in one step, against autograd."
    strategy = LABELS(10)
    network = Network([64, 30, 25, 20])
    start = copy.deepcopy(network)
    options = dict(
        schedule="greedy", collaboration=mode, lr=[0.0, 0.1, 0.0], weight_decay=0.0, batch_size=2000, **QUIET
    )
    train(network, digits, strategy, epochs=1, seed=5, **options)
    generator = torch.Generator().manual_seed(5)
    for _ in range(2):  # what the run drew: negatives and an order for each layer
        negative = strategy.generate(digits.x_train, digits.y_train, None, generator)
        torch.randperm(len(digits.y_train), generator=generator)
    x = prepare(torch.cat([strategy.create_positive(digits.x_train, digits.y_train), negative]), 64)
    h_1 = start.layers[0](x).detach()
    h_2 = start.layers[1](normalise(h_1))
    h_3 = start.layers[2](normalise(h_2)).detach()
    received = sum_of_squares(h_1) + (sum_of_squares(h_3) if mode == "all" else 0)
    grads = torch.autograd.grad(hinton()(h_2, gamma=received[:, None])[0], list(start.layers[1].parameters()))
    for p, grad, mine in zip(start.layers[1].parameters(), grads, network.layers[1].parameters()):
        torch.testing.assert_close(mine.detach(), p.detach() - 0.1 * grad, rtol=1e-3, atol=1e-5)


def test_rounds_cut_the_epochs(digits):
    plain = trained(digits, None, schedule="greedy", epochs=4)
    assert same(plain, trained(digits, None, schedule="greedy", epochs=4, rounds=1))
    turns = trained(digits, "all", schedule="greedy", epochs=4, rounds=4)
    assert len(turns[1]) == len(plain[1]) == 12 and not torch.equal(
        turns[0], trained(digits, "all", schedule="greedy", epochs=4)[0]
    )


class Convolution(nn.Module):
    def __init__(self, channels_in, channels):
        super().__init__()
        self.channels_in = channels_in
        self.conv = nn.Conv2d(channels_in, channels, 7, padding=3)
        nn.init.normal_(self.conv.weight, std=0.2 / channels_in**0.5, generator=torch.Generator().manual_seed(0))

    def forward(self, x):
        return self.conv(x.view(len(x), self.channels_in, 8, 8)).relu()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("mode", COLLABORATIONS)
def test_other_layers_and_precisions(digits, schedule, mode):
    for network, options in (
        (Network([Convolution(1, 4), Convolution(4, 4)]), dict(optimizer="adamw", lr=3e-3)),
        (Network([64, 30, 30]), dict(precision="bf16")),
    ):
        history = train(network, digits, LABELS(10), epochs=1, schedule=schedule, collaboration=mode, **QUIET | options)
        assert all(math.isfinite(value) for epoch in history.column("loss") for value in epoch)


class PowerCut(Exception):
    pass


class Cut(LABELS):
    "Fails after so many draws of negatives."

    left = 10**9

    def count(self):
        self.left -= 1
        if self.left < 0:
            raise PowerCut

    def streams(self, *arguments):
        self.count()
        return super().streams(*arguments)

    def generate(self, *arguments):
        self.count()
        return super().generate(*arguments)


@pytest.mark.parametrize("mode", COLLABORATIONS)
@pytest.mark.parametrize("schedule, rounds, draws", [("together", 1, 2 * 15 + 7), ("greedy", 1, 6), ("greedy", 2, 9)])
def test_resumed_equals_unbroken(digits, tmp_path, mode, schedule, rounds, draws):
    options, cut = dict(epochs=4, schedule=schedule, rounds=rounds, optimizer="adamw"), Cut(10)
    unbroken = trained(digits, mode, strategy=Cut(10), **options)
    cut.left = draws
    with contextlib.suppress(PowerCut):
        trained(digits, mode, strategy=cut, checkpoint=tmp_path / "run.safetensors", **options)
    assert (tmp_path / "run.safetensors").exists() and cut.left < 0
    assert same(unbroken, trained(digits, mode, strategy=Cut(10), checkpoint=tmp_path / "run.safetensors", **options))


def test_checkpoints_of_plain_runs_do_not_mention_collaboration(digits, tmp_path):
    path = tmp_path / "run.safetensors"
    trained(digits, None, checkpoint=path)
    assert b"collaboration" not in path.read_bytes() and b"rounds" not in path.read_bytes()
    with pytest.raises(ValueError, match="collaboration is None there, 'all' here"):
        trained(digits, "all", checkpoint=path)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(collaboration="al"), "unknown collaboration 'al'; did you mean 'all'?"),
        (dict(collaboration="previuos"), "did you mean 'previous'?"),
        (dict(collaboration=0.7), "unknown collaboration 0.7"),
        (dict(collaboration=True), "unknown collaboration True"),
        (dict(collaboration="all", strategy=STRATEGIES["layer_wise"](10)), "layer_wise draws negatives between layers"),
        (dict(collaboration="all", strategy=STRATEGIES["mono_forward"](10)), "mono_forward has no negatives"),
        (dict(rounds=2), "rounds=2: expected 1, or with schedule='greedy'"),
        (dict(rounds=0, schedule="greedy"), "rounds=0"),
        (dict(rounds=3, schedule="greedy"), "a divisor of epochs=4"),
    ],
)
def test_impossible_settings(digits, options, message):
    network = Network([64, 30, 30])
    start = weights(network).clone()
    with pytest.raises(ValueError, match=re.escape(message)):
        train(network, digits, epochs=4, **dict(strategy=LABELS(10)) | options, **QUIET)
    assert torch.equal(weights(network), start)


def test_a_diverging_run_says_where(digits):
    with pytest.raises(Diverged, match="epoch 1, layer"):
        train(Network([64, 30, 30]), digits, LABELS(10), epochs=2, collaboration="all", lr=1e12, **QUIET)


def test_one_objective_for_each_layer(digits):
    shared, own = (weights_with(digits, objective) for objective in (hinton(theta=40.0), [hinton(theta=40.0)] * 2))
    assert torch.equal(shared, own) and not torch.equal(
        shared, weights_with(digits, [hinton(theta=40.0), hinton(theta=80.0)])
    )
    with pytest.raises(ValueError, match="3 objectives: expected one, or one for each of the 2 layers"):
        weights_with(digits, [hinton()] * 3)


def weights_with(digits, objective):
    network = Network([64, 30, 30])
    train(network, digits, LABELS(10), epochs=1, objective=objective, collaboration="previous", **QUIET)
    return weights(network)


# Who does the work


def test_layer_goodness_sums_to_the_readout(digits):
    for network in (Network([64, 30, 20, 10]), Network([Convolution(1, 4), Convolution(4, 4)])):
        g = layer_goodness(network, digits.x_test[:70], 10, batch_size=32, precision="fp32", device="cpu")
        assert g.shape == (len(network.layers), 70, 10)
        for first in (1, 2):
            torch.testing.assert_close(
                g[first - 1 :].sum(0),
                label_goodness(network, digits.x_test[:70], 10, first=first, precision="fp32", device="cpu"),
            )


def test_contributions(digits):
    network, where = Network([64, 30, 20, 10]), dict(precision="fp32", device="cpu")
    train(network, digits, LABELS(10), epochs=3, lr=0.01, **QUIET)
    found = contributions(network, digits, split="train", **where)
    assert len(found["alone"]) == len(found["without"]) == 3
    for first, error in ((1, found["together"]), (2, found["without"][0]), (3, found["alone"][2])):
        assert abs(error - per_label_goodness(network, digits, split="train", first=first, **where)) < 1e-4
    assert math.isnan(contributions(network, digits, first=3, **where)["without"][0])
    for wrong in (dict(first=0), dict(first=4), dict(split="tset")):
        with pytest.raises(ValueError):
            contributions(network, digits, **wrong, **where)


def test_theta_sweep_leaves_the_test_images_unread(digits):
    blind = replace(digits, x_test=torch.zeros_like(digits.x_test), y_test=torch.zeros_like(digits.y_test))
    a, b = (
        theta_sweep(
            [64, 30, 30], images, LABELS(10), [0.5, 1.0], (0, 1), collaboration="all", epochs=3, lr=0.01, **QUIET
        )
        for images in (digits, blind)
    )
    assert a.shape == (2, 2) and torch.equal(a, b) and a.unique().numel() > 1


# Functional entropy


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 2), (5, 40), (3, 4, 17)])
@pytest.mark.parametrize("power", [0, 1, 8])
def test_parts_add_up_and_are_not_negative(shape, power):
    h = 100 * torch.rand(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) ** power
    h = torch.where(torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.2, 0.0, h)
    parts = entropy_parts(h)
    assert all((part >= -1e-9).all() for part in parts.values())
    torch.testing.assert_close(parts["between"] + parts["within"], parts["total"], rtol=0, atol=1e-6)
    torch.testing.assert_close(parts["joint"] + parts["interaction"], parts["within"], rtol=0, atol=1e-6)
    torch.testing.assert_close(functional_entropy(h, dim=(-2, -1)), parts["total"])
    for _ in range(3):  # no test function beats the entropy: E[h phi] <= Ent(h) + E[h] log E[exp(phi)]
        phi = torch.randn(shape, dtype=torch.float64)
        assert (
            (h * phi).mean((-2, -1)) <= parts["total"] + h.mean((-2, -1)) * phi.exp().mean((-2, -1)).log() + 1e-9
        ).all()


def test_entropy_of_extremes():
    assert functional_entropy(torch.zeros(5)) == 0 and functional_entropy(torch.tensor(3.0)) == 0
    assert functional_entropy(torch.tensor([1e300, 1e300], dtype=torch.float64)) == 0
    assert all(part == 0 for part in entropy_parts(torch.zeros(2, 3)).values())
    assert all(torch.isfinite(part) for part in entropy_parts(torch.tensor([[0.0, 0.0], [0.0, 5.0]])).values())
    assert torch.equal(
        functional_entropy(torch.arange(12).view(3, 4), dim=1)[1], functional_entropy(torch.arange(4, 8))
    )
    for bad in ([1.0, -1e-9], [math.nan, 1.0], [math.inf], []):
        with pytest.raises(ValueError, match="at least one"):
            functional_entropy(torch.tensor(bad))
    with pytest.raises(ValueError, match=re.escape("expected goodness [layers, points]")):
        entropy_parts(torch.rand(3))


def test_entropy_loss_at_the_edges():
    silent = torch.zeros(4, requires_grad=True)
    for g_neg in (torch.zeros(4), torch.full((4,), 1e9)):
        loss = entropy_loss(silent, g_neg)
        assert torch.isfinite(loss) and torch.isfinite(torch.autograd.grad(loss, silent)[0]).all()
    assert torch.isfinite(log_goodness(torch.zeros(2, 5))).all()


def test_entropic_objective_trains_without_a_threshold(digits):
    "Also in both modes of collaboration; read by the logarithm, since the layers have no common scale."
    for mode in MODES:
        network = Network([64, 60, 60])
        train(network, digits, LABELS(10), epochs=10, objective=entropic(), collaboration=mode, lr=0.1, **QUIET)
        error = per_label_goodness(
            network,
            digits,
            first=1,
            goodness=log_goodness if mode is None else sum_of_squares,
            precision="fp32",
            device="cpu",
        )
        assert error < 40, (mode, error)


def test_an_account_of_goodness_is_that_of_its_parts(digits):
    network = Network([64, 30, 25, 20], seed=5)
    where = dict(precision="fp32", device="cpu")
    found, g = goodness_parts(network, digits, **where), layer_goodness(network, digits.x_test, 10, **where).double()
    assert found["sum"] == contributions(network, digits, **where) and found["log"] == contributions(
        network, digits, goodness=log_goodness, **where
    )
    assert found["goodness"] == pytest.approx(g.mean((1, 2)).tolist())
    whole = (
        torch.xlogy(g / g.mean(), g / g.mean()).mean().item()
    )  # functional entropy of the goodness by its mean, from the definition
    assert found["entropy"]["total"] == pytest.approx(whole, abs=1e-9)
    each = [torch.xlogy(h / h.mean(), h / h.mean()).mean().item() for h in g.transpose(0, 1)]
    assert found["labels"]["total"] == pytest.approx(sum(each) / len(each), abs=1e-9)
    for parts in (found["entropy"], found["labels"]):
        assert parts["total"] == pytest.approx(parts["between"] + parts["joint"] + parts["interaction"], abs=1e-6)
    scaled = copy.deepcopy(network)
    with torch.no_grad():
        for layer in scaled.layers:
            layer.weight *= 7  # all layers louder alike: entropies by the mean stay
    again = goodness_parts(scaled, digits, **where)
    assert again["labels"] == pytest.approx(found["labels"], abs=1e-5) and again["goodness"] == pytest.approx(
        [49 * v for v in found["goodness"]], rel=1e-4
    )


def test_an_account_of_silence_holds_no_nan(digits):
    network = Network([64, 10, 10])
    with torch.no_grad():
        for layer in network.layers:
            layer.weight.zero_()
    found = goodness_parts(network, digits, precision="fp32", device="cpu")
    assert all(math.isfinite(v) for part in ("entropy", "labels") for v in found[part].values()) and found[
        "goodness"
    ] == [0, 0]


def test_entropy_of_the_streams(digits):
    network, x, y = Network([64, 30, 20], seed=5), digits.x_test[:50], digits.y_test[:50]
    wrong, where = (y + 3) % 10, dict(precision="fp32", device="cpu")
    found = stream_entropy(network, x, y, wrong, 10, **where)
    g = layer_goodness(network, x, 10, **where).double()
    for name, labels in (("pos", y), ("neg", wrong)):
        for i, layer in enumerate(g):
            h = layer[torch.arange(50), labels]
            assert found[f"g_{name}"][i] == pytest.approx(h.mean().item())
            assert found[f"entropy_{name}"][i] == pytest.approx((functional_entropy(h) / h.mean()).item(), abs=1e-9)
    same = stream_entropy(network, x[:1].expand(20, -1, -1, -1), y[:1].expand(20), y[:1].expand(20), 10, **where)
    assert same["entropy_pos"] == pytest.approx([0, 0], abs=1e-9) and same["entropy_pos"] == same["entropy_neg"]
