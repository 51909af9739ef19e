"""Self-contrast in convolutions and SoftHebb: oracles, who is paired where, what learns, what stays put, files, recipes."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import ff_research as ff
from ff_research.layers import FFConv, FFLinear, standardise
from ff_research.learners import Learner
from ff_research.network import NETWORKS, Network, activities
from ff_research.readout import features, fit_ridge, linear_probe
from ff_research.recipes import RECIPES
from ff_research.runs import run
from ff_research.selfcontrast import (
    POOLS,
    ContrastMapsStrategy,
    SelfContrastConv,
    SoftHebbConv,
    SoftWinners,
    contrast_loss,
    paired_convolution,
    pooled_by,
    scff,
    soft_hebb_change,
    softhebb,
)
from ff_research.strategies import STRATEGIES, scff_loss
from ff_research.streams import Paired, Streams
from ff_research.training import train

WHERE = dict(device="cpu", precision="fp32")
QUIET = dict(progress=False, **WHERE)
WIDTHS = (8, 16, 32)
SCFF = dict(schedule="greedy", optimizer="adamw", lr_schedule="constant", batch_size=50)
HEBB = dict(lr=[0.08, 0.005, 0.01], lr_schedule="constant", batch_size=10)


def drawn(count):
    return torch.Generator().manual_seed(count)


@pytest.fixture(scope="module")
def few(digits):
    return replace(digits, x_train=digits.x_train[:200], y_train=digits.y_train[:200])


def hebbian(shape, seed=0, widths=WIDTHS):
    return softhebb(shape, widths, seed, beta=[1.0, 0.65, 0.25][: len(widths)], power=[0.7, 1.4, 1.0][: len(widths)])


# Oracles


def official(a, b, weight, bias):
    "The program's layer on a pair of padded images: joined, standardised, each half convolved by the same kernel."
    x = torch.cat([a, b], 1)
    x = x - x.mean((1, 2, 3), keepdim=True)
    x = x / (1e-10 + x.std((1, 2, 3), keepdim=True))
    half = a.shape[1]
    return F.conv2d(x[:, :half], weight, bias) + F.conv2d(x[:, half:], weight, bias)


@pytest.mark.parametrize("kernel, channels", [(5, 3), (3, 7), (1, 2)])
def test_a_pair_is_convolved_as_the_program_does_it_and_so_is_its_gradient(kernel, channels):
    g = drawn(kernel)
    x = 3 * torch.randn(6, channels, 9, 8, generator=g) + 1
    partner = torch.tensor([2, 3, 4, 5, 0, 1])
    layer = SelfContrastConv(channels, 5, kernel, generator=g)
    weight, bias = (p.detach().clone().requires_grad_() for p in (layer.weight, layer.bias))
    padded = F.pad(x, [kernel // 2] * 4, mode="reflect")
    expected = torch.cat(
        [official(padded, padded, weight, bias), official(padded, padded[partner], weight, bias)]
    ).relu()
    h = layer(Paired(x, partner))
    torch.testing.assert_close(h, expected, rtol=1e-4, atol=1e-5)
    h.square().mean().backward()
    expected.square().mean().backward()
    torch.testing.assert_close(layer.weight.grad, weight.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.bias.grad, bias.grad, rtol=1e-4, atol=1e-5)


def test_a_pair_differs_from_the_sum_of_its_images_by_bias_scale_and_a_constant_for_each_channel():
    g = drawn(1)
    a, b, weight = (
        torch.randn(*shape, generator=g, dtype=torch.float64) for shape in [(4, 3, 8, 8)] * 2 + [(5, 3, 3, 3)]
    )
    z = official(a, b, weight, None)
    plain = F.conv2d(a + b, weight) / torch.cat([a, b], 1).std((1, 2, 3), keepdim=True)
    torch.testing.assert_close((z - plain).std((2, 3)), torch.zeros(4, 5, dtype=torch.float64), atol=1e-9, rtol=0)


def test_an_image_beside_itself_is_read_as_the_image_alone():
    x, layer = torch.rand(5, 3, 12, 12, generator=drawn(2)), SelfContrastConv(3, 6, 5, generator=drawn(3))
    alone, pair = layer(x), layer(Paired(x, torch.tensor([1, 2, 3, 4, 0])))[:5]
    torch.testing.assert_close(pair, 2 * alone, rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(layer.hand_on(layer(Paired(x, torch.arange(5)))), layer.hand_on(alone).repeat(2, 1, 1, 1),
                               rtol=2e-2, atol=1e-3)  # fmt: skip


def test_each_image_is_convolved_once(monkeypatch):
    rows, plain = [], F.conv2d

    def counted(x, *args):
        rows.append(len(x))
        return plain(x, *args)

    monkeypatch.setattr(F, "conv2d", counted)
    x = torch.rand(5, 1, 8, 8, generator=drawn(2))
    assert len(SelfContrastConv(1, 4)(Paired(x, torch.tensor([1, 2, 3, 4, 0])))) == 10 and rows == [5]


def test_two_views_of_an_image_make_a_pair_too():
    g = drawn(4)
    one, other = torch.rand(2, 4, 3, 8, 8, generator=g).unbind()
    partner, layer = torch.tensor([1, 2, 3, 0]), SelfContrastConv(3, 5, generator=g)
    a, b = (F.pad(x, [1] * 4, mode="reflect") for x in (one, other))
    expected = torch.cat([official(a, b, layer.weight, layer.bias), official(a, b[partner], layer.weight, layer.bias)])
    torch.testing.assert_close(layer(Paired(one, partner, other)), expected.relu(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ["triangle", "relu"])
@pytest.mark.parametrize("pool", POOLS)
def test_what_is_handed_on(activation, pool):
    layer = SelfContrastConv(3, 6, pool=pool, activation=activation, generator=drawn(5))
    x = torch.rand(4, 3, 8, 8, generator=drawn(6))
    z = paired_convolution(F.pad(x, [1] * 4, mode="reflect"), layer.weight, layer.bias)
    a = (z - z.mean(1, keepdim=True) if activation == "triangle" else z).clamp(min=0)
    a = {
        "max4": lambda: F.max_pool2d(a, 4, 2, 1),
        "max2": lambda: F.max_pool2d(a, 2),
        "avg2": lambda: F.avg_pool2d(a, 2),
        "none": lambda: a,
    }[pool]()
    a = a - a.mean((1, 2, 3), keepdim=True)
    expected = a / a.square().mean((1, 2, 3), keepdim=True).sqrt()
    torch.testing.assert_close(layer.hand_on(layer(x)), expected, rtol=1e-3, atol=1e-4)


def test_the_loss_is_the_papers_and_for_one_position_that_of_fully_connected_layers():
    g_pos, g_neg = 8 * torch.rand(2, 7, 12, generator=drawn(7)).unbind()[0], 8 * torch.rand(7, 12, generator=drawn(8))
    expected = sum(
        torch.log1p((5 - p).exp()).mean() / 7 + torch.log1p((n - 9).exp()).mean() / 7 + 0.01 * (p**2).sum().sqrt() / 7
        for p, n in zip(g_pos, g_neg)
    )
    torch.testing.assert_close(contrast_loss(g_pos, g_neg, 5.0, 9.0, 0.01), expected)
    options = dict(theta_pos=1.0, theta_neg=2.0, penalty=0.1, scale=4.0)
    torch.testing.assert_close(
        contrast_loss(g_pos[:, :1], g_neg[:, :1], **options), scff_loss(g_pos[:, 0], g_neg[:, 0], **options)
    )


def test_the_objective_reads_the_goodness_of_each_position():
    layer = SelfContrastConv(1, 6, generator=drawn(9))
    objective = ContrastMapsStrategy(10).objective(layer, 2)
    h = layer(Paired(torch.rand(4, 1, 8, 8, generator=drawn(10)), torch.tensor([1, 2, 3, 0])))
    s = Streams(h, None, (4, 4))
    g = objective.goodness(h, s)
    torch.testing.assert_close(g, h.square().mean(1).flatten(1))
    torch.testing.assert_close(objective.loss(g, s), contrast_loss(*g.chunk(2), 5.0, 9.0, 0.0007))


def test_a_rate_falls_after_so_many_updates_and_a_layer_has_its_own_weight_decay():
    x, partner = torch.rand(6, 1, 8, 8, generator=drawn(11)), torch.tensor([1, 2, 3, 4, 5, 0])
    found = []
    for decay in (0.5, 1.0):
        layer = SelfContrastConv(1, 4, decay=decay, every=2, weight_decay=0.1, generator=drawn(12))
        objective = ContrastMapsStrategy(10).objective(layer, 1)
        settings = ("plain_sgd", 0.1, 0.1 if decay == 1 else 7.0, "fp32")
        learner = layer.learner(objective, *settings) if decay != 1 else Learner(layer, objective, *settings)
        for step in range(5):
            learner.activity([Paired(x, partner)])
            learner.learn(Streams(x, None, (6, 6)), factor=1.0 if decay != 1 else 0.5 ** (step // 2))
        found.append(layer.weight.detach())
    assert torch.equal(*found) and int(layer.learner(objective, *settings).updates) == 0


# Who is paired where


def test_pairs_begin_where_the_flags_say_and_no_image_is_its_own_partner():
    strategy = ContrastMapsStrategy(10)
    assert [strategy.begins(height) for height in (1, 2, 3, 4)] == [1, 1, 3, 4]
    assert [ContrastMapsStrategy(10, pairs=(False,)).begins(height) for height in (1, 2, 3)] == [1, 1, 1]
    x = torch.rand(6, 3, 8, 8, generator=drawn(13))
    s = strategy.streams(x, torch.zeros(6, dtype=torch.long))
    assert s.sizes == (6,) and s.x is x
    assert strategy.before(s, 1, 3, drawn(1)) is s and strategy.before(s, 2, 3, drawn(1)) is s
    for _ in range(20):
        paired = strategy.before(s, 3, 3, drawn(1))
        assert paired.sizes == (6, 6) and len(paired.x) == 12 and (paired.x.partner != torch.arange(6)).all()
    torch.testing.assert_close(paired.x.images, standardise(x.flatten(1)).view_as(x))
    two = Streams(torch.cat([x, -x]), s.y, (6, 6))  # layer 2 reads both streams, layer 3 pairs the positives anew
    assert strategy.before(two, 2, 2, drawn(1)) is two
    torch.testing.assert_close(strategy.before(two, 3, 1, drawn(1)).x.images, paired.x.images)


def test_flips_are_drawn_for_each_image_and_only_while_learning(digits):
    x, y = digits.x_train[:200], digits.y_train[:200]
    strategy = ContrastMapsStrategy(10, flip=True)
    one, again, other = (strategy.streams(x, y, None, drawn(seed)).x for seed in (1, 1, 2))
    mirrored = (one != x).flatten(1).any(1)
    assert torch.equal(one, again) and not torch.equal(one, other) and 60 < mirrored.sum() < 140
    assert torch.equal(one[mirrored], x[mirrored].flip(-1))
    assert torch.equal(strategy.write(x).x, strategy.create_positive(x, y))


@pytest.mark.parametrize("flip", [False, True])
def test_frozen_layers_are_computed_once_unless_images_are_flipped(flip, few, monkeypatch):
    calls, forward = [], SelfContrastConv.forward

    def counted(self, x):
        calls.append(self.channels)
        return forward(self, x)

    monkeypatch.setattr(SelfContrastConv, "forward", counted)
    strategy = ContrastMapsStrategy(10, pairs=(True, True), flip=flip)
    train(scff(few.shape, (5, 6)), few, strategy, epochs=3, lr=1e-3, **SCFF, **QUIET)
    assert calls.count(6) == 12 and calls.count(5) == 12 + 1 + 12 * flip  # 3 epochs of 4 batches; then once, or each


# What learns


def probe(network, images):
    return linear_probe(network, images, neutral_label=False, joined=1, fit=fit_ridge, **WHERE)["test"]


@pytest.mark.parametrize("method", ["scff", "softhebb"])
def test_a_narrow_network_is_read_better_than_its_random_start(method, digits):
    total = {"random": 0.0, "trained": 0.0}
    for seed in range(3):
        network = hebbian(digits.shape, seed) if method == "softhebb" else scff(digits.shape, WIDTHS, seed)
        total["random"] += probe(network, digits)["layer_3"] / 3
        if method == "softhebb":
            train(network, digits, STRATEGIES["softhebb"](10), epochs=1, seed=seed, **HEBB, **QUIET)
        else:
            options = SCFF | dict(epochs=[2, 2, 2], lr=[0.05, 0.03, 0.03])
            train(network, digits, ContrastMapsStrategy(10), seed=seed, **options, **QUIET)
        total["trained"] += probe(network, digits)["layer_3"] / 3
    assert total["trained"] < total["random"] - (3.0 if method == "scff" else 6.0), total


def test_streams_part_where_images_are_paired_anew(digits):
    history = train(scff(digits.shape, (8, 16)), digits, ContrastMapsStrategy(10, pairs=(True, True)), epochs=2, lr=3e-3,
                    **SCFF, **QUIET)  # fmt: skip
    assert all(epoch["separation"][0] > 0.9 for epoch in history.epochs[1::2])


def test_soft_hebb_brings_the_lengths_of_weights_to_one(digits):
    network = softhebb(digits.shape, (8,))
    history = train(network, digits, STRATEGIES["softhebb"](10), epochs=4, **HEBB | dict(lr=0.08), **QUIET)
    lengths = network.layers[0].weight.detach().flatten(1).norm(dim=1)
    assert history.epochs[0]["loss"][0] > 3 and (lengths - 1).abs().mean() < 0.1, lengths
    assert 1 / 8 < history.epochs[-1]["g_pos"][0] <= 1


def test_the_change_of_soft_hebb_position_by_position():
    g = drawn(14)
    x, weight, beta = torch.randn(3, 2, 6, 5, generator=g), torch.randn(4, 2, 3, 3, generator=g), 0.6
    u = F.conv2d(x, weight)
    patches = F.unfold(x, 3).transpose(1, 2).flatten(0, 1)  # [positions, 18]
    flat, sums = weight.flatten(1), u.flatten(2).transpose(1, 2).flatten(0, 1)
    change = torch.zeros_like(flat)
    for patch, here in zip(patches, sums):
        y = -(beta * here).exp() / (beta * here).exp().sum()
        y[here.argmax()] *= -1
        change += y[:, None] * (patch - here[:, None] * flat)
    found = soft_hebb_change(x, u, weight, beta)
    torch.testing.assert_close(found.flatten(1), change / change.abs().max(), rtol=1e-4, atol=1e-5)
    assert found.abs().max() <= 1.0001


def test_a_hebbian_step_has_a_rate_that_depends_on_the_length():
    layer = SoftHebbConv(1, 4, generator=drawn(15))
    before, x = layer.weight.detach().clone(), torch.rand(5, 1, 8, 8, generator=drawn(16))
    learner = layer.learner(SoftWinners(), "sgd", 0.1, 0.3, "fp32")
    learner.activity([x])
    expected = soft_hebb_change(learner.x, learner.u, before, 1.0)
    rate = 0.1 * 0.5 * (before.flatten(1).norm(dim=1) - 1).abs().sqrt()
    learner.learn(Streams(x, None, (5,)), factor=0.5)
    torch.testing.assert_close(layer.weight.detach(), before + rate[:, None, None, None] * expected)


# What stays put


def state(layer):
    return {key: value.clone() for key, value in layer.state_dict().items()}


@pytest.mark.parametrize("make, name, options", [
    (lambda shape: scff(shape, WIDTHS), "scff", dict(optimizer="adamw", lr=3e-3, batch_size=50)),
    (hebbian, "softhebb", HEBB),
])  # fmt: skip
def test_other_layers_keep_every_bit_while_one_learns(make, name, options, few):
    network, seen = make(few.shape), []

    def keep(epoch, network):
        seen.append([state(layer) for layer in network.layers])

    keep(-1, network)
    train(network, few, STRATEGIES[name](10), epochs=1, schedule="greedy", after_epoch=keep, **options, **QUIET)
    for epoch, (a, b) in enumerate(zip(seen, seen[1:])):
        assert [not all(torch.equal(x[k], y[k]) for k in x) for x, y in zip(a, b)] == [i == epoch for i in range(3)]
    if name == "softhebb":
        assert [int(layer.norm.num_batches_tracked) for layer in network.layers] == [20, 20, 20]


@pytest.mark.parametrize("name", ["scff", "softhebb"])
def test_layers_above_do_not_change_what_a_layer_learns(name, few):
    found = []
    for count in (1, 2):
        make = hebbian if name == "softhebb" else lambda shape, seed, widths: scff(shape, widths, seed, pool="max4")
        network = make(few.shape, 0, WIDTHS[:count])
        if name == "softhebb":
            network.layers[0].pool = "max4"
        options = (
            dict(lr=0.05, batch_size=20) if name == "softhebb" else dict(lr=1e-2, batch_size=50, optimizer="adamw")
        )
        start = torch.Generator().manual_seed(0)
        with torch.no_grad():
            network.layers[0].weight.copy_(torch.randn(network.layers[0].weight.shape, generator=start))
            if name == "scff":
                network.layers[0].bias.zero_()
        train(network, few, STRATEGIES[name](10), epochs=2, **options, **QUIET)
        found.append(network.layers[0].weight)
    assert torch.equal(*found)


@pytest.mark.parametrize("method", ["scff", "flipped", "softhebb"])
def test_a_stopped_run_goes_on_bit_for_bit(method, few, tmp_path):
    def made():
        rates = dict(decay=[0.7, 0.8, 1.0], every=[3, 2, 5], weight_decay=[1e-4, 1e-4, 3e-4])
        return hebbian(few.shape) if method == "softhebb" else scff(few.shape, WIDTHS, **rates)

    def strategy():
        return (
            STRATEGIES["softhebb"](10) if method == "softhebb" else ContrastMapsStrategy(10, flip=method == "flipped")
        )

    options = HEBB | dict(epochs=3) if method == "softhebb" else SCFF | dict(epochs=[2, 2, 2], lr=3e-3)
    for stop in (1, 3) if method != "softhebb" else (1,):
        whole, first, second = made(), made(), made()

        class Stopped(Exception):
            pass

        def die(epoch, network, stop=stop, error=Stopped):
            if epoch + 1 == stop:
                raise error

        train(whole, few, strategy(), **options, **QUIET)
        path = tmp_path / f"{stop}.safetensors"
        with pytest.raises(Stopped):
            train(first, few, strategy(), checkpoint=path, after_epoch=die, **options, **QUIET)
        torch.manual_seed(99)
        train(second, few, strategy(), checkpoint=path, **options, **QUIET)
        a, b = whole.state_dict(), second.state_dict()
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# Files, sizes, other layers, recipes


@pytest.mark.parametrize("method", ["scff", "softhebb", "mlp"])
def test_a_saved_network_predicts_the_same(method, few, tmp_path):
    network = {"scff": lambda: scff(few.shape, WIDTHS, decay=0.9, weight_decay=1e-4), "softhebb": lambda: hebbian(few.shape),
               "mlp": lambda: Network([64, 20, 20])}[method]()  # fmt: skip
    options = HEBB if method == "softhebb" else dict(lr=3e-3, optimizer="adamw")
    train(network, few, STRATEGIES["softhebb" if method == "softhebb" else "scff"](10), epochs=1, **options, **QUIET)
    ff.fit_readout(network, few, **WHERE)
    ff.save(network, tmp_path / "n.safetensors")
    again = ff.load_network(tmp_path / "n.safetensors")
    assert torch.equal(ff.predict(network, few.x_test, **WHERE), ff.predict(again, few.x_test, **WHERE))
    assert repr(again.strategy) == repr(network.strategy) and repr(again.objectives) == repr(network.objectives)
    assert repr(again.layers) == repr(network.layers)


@pytest.mark.parametrize("name", ["scff", "softhebb"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 13, 13), (3, 20, 32), (1, 28, 28)])
def test_images_of_any_size(name, shape):
    x = torch.rand(12, *shape, generator=drawn(17))
    images = ff.from_arrays("noise", x, torch.arange(12) % 3, x_test=x[:6], y_test=torch.arange(6) % 3)
    network = NETWORKS[name](shape, (4, 6, 8))
    train(network, images, STRATEGIES[name](3), epochs=1, lr=1e-3, batch_size=4, **QUIET)
    sides = [a.shape[2:] for a in activities(network, images.x_test)]
    assert all(torch.isfinite(p).all() for p in network.parameters())
    read = features(network, images.x_test, **WHERE)
    assert [f.shape[1] for f in read] == [
        c * max(1, round(h / 2)) * max(1, round(w / 2)) for c, (h, w) in zip((4, 6, 8), sides)
    ]


def test_sizes_of_the_papers_network():
    network = scff((3, 32, 32), (96, 384, 1536))
    assert [layer.weight.shape[2] for layer in network.layers] == [5, 3, 3]
    shapes = [tuple(a.shape[1:]) for a in activities(network, torch.rand(2, 3, 32, 32))]
    assert shapes == [(96, 16, 16), (384, 8, 8), (1536, 4, 4)]
    assert [f.shape[1] for f in features(network, torch.rand(2, 3, 32, 32), **WHERE)] == [6144] * 3


@pytest.mark.parametrize("name", ["scff", "softhebb"])
@pytest.mark.parametrize("make", [
    lambda: Network([64, 20, 20, 20]),
    lambda: Network([FFConv(1, 8, norm="batch"), FFConv(8, 8, pool=2), FFLinear(8 * 16, 20)]),
])  # fmt: skip
def test_the_strategies_train_other_layers_too(name, make, few):
    network = make()
    before = [p.clone() for p in network.layers.parameters()]
    train(network, few, STRATEGIES[name](10), epochs=1, lr=1e-3, optimizer="adamw", **QUIET)
    assert all(torch.isfinite(p).all() for p in network.parameters())
    assert not all(torch.equal(a, b) for a, b in zip(before, network.layers.parameters()))


def test_other_strategies_train_these_layers(few):
    network = scff(few.shape, (8, 16))
    for name in ("label_embedding", "mono_forward", "image_mixing"):
        train(network, few, STRATEGIES[name](10), epochs=1, lr=1e-3, optimizer="adamw", **QUIET)
        assert all(torch.isfinite(p).all() for p in network.parameters())


def test_wrong_input_is_refused_in_words(few):
    strategy = ContrastMapsStrategy(10)
    for call, words in [
        (lambda: SelfContrastConv(1, 4, pool="max3"), "max4, max2, avg2, none"),
        (lambda: SelfContrastConv(1, 4, activation="tanh"), "triangle or relu"),
        (lambda: SoftHebbConv(1, 4, pool="max3"), "max4"),
        (lambda: SelfContrastConv(3, 4)(torch.rand(2, 1, 8, 8)), r"\[rows, 3, height, width\]"),
        (lambda: SoftHebbConv(3, 4)(torch.rand(2, 1, 8, 8)), r"\[rows, 3, height, width\]"),
        (lambda: SelfContrastConv(1, 4, 5)(torch.rand(2, 1, 2, 2)), "too small to be reflected by 2"),
        (lambda: pooled_by(torch.rand(1, 1, 1, 4), "avg2"), "too small for pool='avg2'"),
        (lambda: scff((1, 8, 8), (4, 4), kernel=[3, 3, 3]), "kernel has 3 entries for 2 layers"),
        (lambda: softhebb((1, 8, 8), (4, 4), power=[1.0]), "power has 1 entries for 2 layers"),
        (lambda: train(scff((1, 8, 8), (4,)), few, strategy, epochs=1, batch_size=1, **QUIET), "no second image"),
        (lambda: train(scff((3, 8, 8), (4,)), few, strategy, epochs=1, **QUIET), "first layer takes 3; build it"),
        (lambda: scff((1, 8, 8), ()), "widths is empty"),
        (lambda: STRATEGIES["scff"](10, thetas=()), "an entry for each layer"),
        (lambda: STRATEGIES["scff"](10, thetas=(1.0, 2.0)), r"\(theta_pos, theta_neg\) of each layer"),
        (lambda: STRATEGIES["scff"](10, pairs=True), "pairs=True: expected an entry"),
        (
            lambda: train(softhebb((1, 8, 8), (4,)), few, STRATEGIES["local_classifier"](10), epochs=1, **QUIET),
            "own rule",
        ),
        (lambda: train(scff((1, 8, 8), (4,)), few, strategy, epochs=1, collaboration="all", **QUIET), "between layers"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()


@pytest.mark.parametrize("name", ["scff-digits", "softhebb-digits"])
def test_the_recipe_for_digits_learns(name):
    row = run(RECIPES[name], 0, progress=False, **WHERE)
    start = run(RECIPES[name].vary(method="random", epochs=0, lr=0.001, name="start"), 0, progress=False, **WHERE)
    assert row["errors"]["test"]["probe"]["layer_3"] < start["errors"]["test"]["probe"]["layer_3"], (row, start)
    assert row["config"]["network"] == name.split("-")[0] and row["images_per_second"] > 0


@pytest.mark.parametrize("name", ["scff-cifar10", "softhebb-cifar10", "cifar10-conv-self-contrast"])
def test_recipes_hold_the_papers_settings(name):
    r = RECIPES[name]
    network = NETWORKS[r.network.name]((3, 32, 32), r.network.widths, **dict(r.network.options))
    assert network(torch.rand(2, 3, 32, 32)).shape[0] == 2
    if name == "scff-cifar10":
        assert (r.optimizer.lr, r.schedule.epochs, r.optimizer.batch_size) == ((1e-2, 2e-3, 2e-4), (6, 4, 21), 50)
        assert [(layer.decay, layer.every) for layer in network.layers] == [(0.7, 1000), (0.8, 100), (1.0, 500)]
        assert STRATEGIES[r.strategy.name](10, **dict(r.strategy.options)).flip
