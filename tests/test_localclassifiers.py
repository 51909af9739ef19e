"""Local classifiers: heads and losses against closed forms and autograd, learning, locality, files, recipes."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import ff_research as ff
from ff_research.convolution import conv
from ff_research.data import from_arrays
from ff_research.localclassifiers import (
    HEADS,
    LocalClassifier,
    LocalClassifierStrategy,
    prediction_loss,
    seen_by,
    similarity,
    similarity_loss,
)
from ff_research.objectives import ChannelCompetition, ProjectionObjective
from ff_research.readout import linear_probe, scores_errors
from ff_research.recipes import RECIPES, Recipe
from ff_research.runs import run
from ff_research.strategies import STRATEGIES
from ff_research.streams import Streams
from ff_research.training import train

WHERE = dict(precision="fp32", device="cpu")
QUIET = WHERE | dict(progress=False)
ADAM = dict(optimizer="adamw", lr=1e-2, lr_schedule="cosine", weight_decay=0.0, batch_size=128)
PREDSIM = dict(loss="predsim", head="flat", side=2)


@pytest.fixture(scope="module")
def few(digits):
    "Enough to compare weights."
    return replace(digits, x_train=digits.x_train[:256], y_train=digits.y_train[:256], x_test=digits.x_test[:60],
                   y_test=digits.y_test[:60])  # fmt: skip


def made(seed=0, widths=(8, 16, 16), **options):
    return conv((1, 8, 8), widths, seed, pool=[0, 2, 2][: len(widths)], inputs="centred", **options)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Losses


def test_against_all_wrong_labels_is_cross_entropy_and_against_one_is_less():
    "FF with every wrong label under a softmax of the goodness is the cross-entropy of the goodness."
    g, y = 3 * drawn(50, 10).double(), torch.arange(50) % 10
    wrong = torch.stack([row[torch.arange(10) != k] - row[k] for row, k in zip(g, y)])
    torch.testing.assert_close(torch.log1p(wrong.exp().sum(1)).mean(), F.cross_entropy(g, y))
    torch.testing.assert_close(prediction_loss(g.log_softmax(1), y), F.cross_entropy(g, y))
    assert (F.softplus(wrong).max(1).values <= F.cross_entropy(g, y, reduction="none") + 1e-12).all()


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_scores_and_loss_of_a_head_are_those_of_plain_modules(head, smoothing):
    h, y = drawn(6, 5, 4, 4), torch.tensor([0, 1, 2, 2, 1, 0])
    own = LocalClassifier(5, 3, head=head, side=2, smoothing=smoothing)
    loss, g = own(h, Streams(h, y, (6,)))
    options = dict(label_smoothing=smoothing)
    if head == "patches":
        z = F.conv2d(h, own.weight[..., None, None], own.bias)  # a 1 x 1 convolution to the classes
        every = F.cross_entropy(z, y[:, None, None].expand(-1, 4, 4), **options)
        torch.testing.assert_close(loss, every)
        pooled = F.linear(h.mean((2, 3)), own.weight, own.bias)
        difference = g - pooled  # the same for all classes: one order
        torch.testing.assert_close(difference, difference[:, :1].expand(-1, 3))
        assert loss >= F.cross_entropy(pooled, y, **options)
    else:
        rows = h.mean((2, 3)) if head == "pooled" else F.avg_pool2d(h, 2).flatten(1)
        z = F.linear(rows, own.weight, own.bias)
        torch.testing.assert_close(g, z)
        torch.testing.assert_close(loss, F.cross_entropy(z, y, **options))


def test_rows_without_a_label_do_not_count():
    for options in (dict(), dict(head="patches", smoothing=0.1), dict(beta=0.9)):
        h, own = drawn(6, 5, 4, 4), LocalClassifier(5, 3, **options)
        y = torch.tensor([0, 1, 2, 0, -100, -100])
        whole, masked = own(h[:4], Streams(h, y[:4], (4,)))[0], own(h, Streams(h, y, (6,)))[0]
        torch.testing.assert_close(whole, masked)


def test_two_relatives_are_special_cases():
    h, own, other = drawn(6, 20, 3, 3), LocalClassifier(20, 10, bias=False), ProjectionObjective(20, 10)
    own.weight.data.copy_(other.projection.data)
    torch.testing.assert_close(own.scores(h), other.scores(h))
    own.weight.data.copy_(torch.eye(10).repeat_interleave(2, 1) / 2)
    torch.testing.assert_close(own.scores(h), ChannelCompetition(10, power=1).scores(h))


def test_similarity_is_a_correlation():
    h = drawn(7, 12)
    torch.testing.assert_close(similarity(h), torch.corrcoef(h))
    torch.testing.assert_close(similarity(3 * h + 5), torch.corrcoef(h))
    maps = drawn(7, 6, 3, 3)
    torch.testing.assert_close(similarity(maps), torch.corrcoef(maps.flatten(2).std(2)))
    torch.testing.assert_close(similarity(maps[..., :1, :1]), torch.corrcoef(maps[..., 0, 0]))
    y = torch.tensor([0, 0, 1, 2])
    one_hot = F.one_hot(y, 3).float()
    target = torch.where(y[:, None] == y, 1.0, -0.5)
    torch.testing.assert_close(similarity(one_hot), target)
    assert similarity_loss(one_hot, y, 3) < 1e-10
    torch.testing.assert_close(similarity_loss(h[:4], y, 3), F.mse_loss(torch.corrcoef(h[:4]), target))


def test_similarity_of_silent_maps_has_a_finite_gradient():
    h = torch.zeros(4, 5, 3, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(similarity_loss(h, torch.tensor([0, 1, 0, 1]), 2), h)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("options", [dict(), dict(head="flat", side=2), PREDSIM, dict(head="patches", smoothing=0.1)])
def test_one_step_is_that_of_plain_autograd(options, digits):
    "Every layer and its head after one step of descent, from PyTorch's own functions."
    images = replace(digits, x_train=digits.x_train[:60], y_train=digits.y_train[:60])
    x, y, lr, strategy = images.x_train, images.y_train, 0.3, LocalClassifierStrategy(10, **options)
    plain, network = (conv((1, 8, 8), [6, 8], pool=[2, 2]) for _ in range(2))
    expected = []
    h = plain.prepare(x)
    for depth, layer in enumerate(plain.layers, start=1):
        head, bn = strategy.objective(layer, depth), layer.batch_norm
        z = F.batch_norm(layer.conv(h), None, None, bn.weight, bn.bias, training=True)
        a = F.max_pool2d(z.relu(), 2)
        seen = F.adaptive_avg_pool2d(a, 2).flatten(1) if "side" in options else a.mean((2, 3))
        logits = F.linear(seen, head.weight, head.bias)
        loss = F.cross_entropy(logits, y)
        if options.get("head") == "patches":
            logits = F.conv2d(a, head.weight[..., None, None], head.bias)
            places = y[:, None, None].expand(-1, *a.shape[2:])
            loss = F.cross_entropy(logits, places, label_smoothing=0.1)
        if "loss" in options:
            spread = F.conv2d(a, head.similar, padding=1).flatten(2).std(2)
            target = torch.where(y[:, None] == y, 1.0, -1 / 9)
            loss = 0.01 * loss + 0.99 * F.mse_loss(torch.corrcoef(spread), target)
        parameters = [*layer.parameters(), *head.parameters()]
        expected += [p.detach() - lr * d for p, d in zip(parameters, torch.autograd.grad(loss, parameters))]
        h = a.detach()
    descent = dict(lr=lr, lr_schedule="constant", weight_decay=0.0, optimizer="plain_sgd", batch_size=60)
    train(network, images, strategy, 1, **descent, **QUIET)
    found = [p for pair in zip(network.layers, network.objectives) for module in pair for p in module.parameters()]
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a.detach(), b, rtol=1e-3, atol=2e-5)


# The network


def test_pooling_averages_or_strides():
    x = drawn(3, 4, 8, 8)
    layers = {how: conv((4, 8, 8), [6], pooling=how).layers[0] for how in ("max", "average", "stride")}
    for layer in layers.values():
        layer.load_state_dict(layers["max"].state_dict())
    z = F.relu(layers["max"].eval().batch_norm(layers["max"].conv(x)))
    for layer, expected in zip(layers.values(), (F.max_pool2d(z, 2), F.avg_pool2d(z, 2), z[..., ::2, ::2])):
        torch.testing.assert_close(layer.eval()(x), expected)
    row = conv((4, 8, 8), [6], norm="row", pool=[2]).layers[0]
    out = row.hand_on(row(x))
    torch.testing.assert_close(out.square().mean((1, 2, 3)), torch.ones(3), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 9, 7), (3, 12, 10)])
@pytest.mark.parametrize("options", [dict(), PREDSIM, dict(head="patches")])
def test_images_of_any_size_train_and_are_read(shape, options):
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(40, *shape, generator=g), torch.arange(40) % 4
    images = from_arrays("own", x[:30], y[:30], x[30:], y[30:])
    network = conv(shape, [8, 8], pool=2, pooling="average", inputs="centred")
    train(network, images, LocalClassifierStrategy(4, **options), 1, **QUIET)
    assert set(scores_errors(network, images, **WHERE)) == {"layer_1", "layer_2", "sum"}


def test_what_does_not_fit_is_said(few):
    def own(**options):
        return LocalClassifierStrategy(10, **options)

    for call, words in [
        (lambda: own(head="pool"), "did you mean 'pooled'"),
        (lambda: own(loss="sim"), "pred"),
        (lambda: own(smoothing=1.0), "smoothing=1.0: expected a share"),
        (lambda: own(beta=-0.1), "beta=-0.1: expected a share"),
        (lambda: LocalClassifier(5, 3, head="flat").scores(torch.ones(2, 5)), "takes 80 numbers, .* has 5"),
        (lambda: LocalClassifier(5, 3).scores(torch.ones(2, 6, 2, 2)), "takes 5 numbers, .* has 6"),
        (lambda: conv((1, 8, 8), [4], pooling="mean"), "max"),
        (lambda: conv((1, 3, 3), [4, 4]), "3 x 3 are too small"),
        (lambda: train(conv((3, 8, 8), [4]), few, own(), 1, **QUIET), "first layer takes 3; build it"),
        (lambda: linear_probe(conv((3, 8, 8), [4]), few), "first layer takes 3; build it"),
        (lambda: own(head="flat", side=0), "side=0"),
        (lambda: own(head="flat", side=2.5), "side=2.5"),
        (lambda: conv((1, 8, 8), [-3]), "channels=-3"),
        (lambda: conv((1, 8, 8), [4], kernel=0), "kernel=0"),
        (lambda: conv((1, 8, 8), [4], pool=2.5), "pool=2.5"),
        (lambda: conv((1, 8, 8), []), "widths is empty"),
        (lambda: conv((1, 4, 4), [4, 4, 4, 4], kernel=2, pool=0), "side of 0; pool in fewer layers, or take odd"),
        (lambda: train(conv((1, 8, 8), [4], norm="row"), few, own(loss="predsim"), 1, micro_batch=4, **QUIET),
         "means over images"),
        (lambda: train(ff.Network([torch.nn.Linear(64, 5)]), few, own(), 1, **QUIET), "attribute `units`"),
        (lambda: Recipe(name="own", data="digits").vary(strategy="local_classifier", strategy_options=(("haed", 1),)),
         "did you mean 'head'"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=words):
            call()


def test_heads_read_as_many_numbers_as_they_have_weights():
    h = drawn(2, 6, 5, 5)
    shapes = {head: tuple(seen_by(h, head, 3).shape) for head in HEADS}
    assert shapes == {"pooled": (2, 1, 6), "flat": (2, 1, 54), "patches": (2, 25, 6)}
    assert all(LocalClassifier(6, 4, head=head, side=3).weight.shape == (4, shapes[head][2]) for head in HEADS)


# Learning


def test_the_recipe_on_digits_learns():
    errors = run("mono-forward-digits", 0, probe=False, **QUIET)["errors"]["test"]["scores"]
    assert errors["layer_3"] <= 4.5 and errors["sum"] <= 5.5, errors
    assert errors["layer_1"] > 20, "a first layer by averaged channels cannot do that"


@pytest.mark.parametrize("options, most", [(dict(head="flat", side=2), 4), (PREDSIM, 11)])
def test_the_other_heads_and_losses_learn(options, most, digits):
    network = made(widths=(16, 32, 32))
    train(network, digits, LocalClassifierStrategy(10, **options), 5, **QUIET | ADAM)
    errors = scores_errors(network, digits, **WHERE)
    assert errors["layer_3"] <= most, errors


@pytest.mark.parametrize("options", [dict(), dict(loss="predsim"), dict(head="flat"), dict(head="patches", bias=False)])
def test_a_fully_connected_network_learns_with_every_option_fused_or_by_autograd(options, digits):
    class ByAutograd(ff.FFLinear):
        def forward(self, *xs):
            return super().forward(*xs)

    def layers(cls):
        return [cls(a, 60, generator=torch.Generator().manual_seed(a)) for a in (64, 60)]

    networks = [ff.Network(layers(cls), inputs="centred") for cls in (ff.FFLinear, ByAutograd)]
    strategy = STRATEGIES["local_classifier"](10, **options)
    for network in networks:  # few steps, in which rounding does not grow
        part = replace(digits, x_train=digits.x_train[:300], y_train=digits.y_train[:300])
        train(network, part, strategy, 1, lr=0.05, optimizer="plain_sgd", batch_size=100, **QUIET)
    for a, b in zip(*(network.parameters() for network in networks)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    train(networks[0], digits, strategy, 6, **QUIET | ADAM)
    assert scores_errors(networks[0], digits, **WHERE)["layer_1"] <= 9


# Local, resumed, saved


@pytest.mark.parametrize("options", [dict(), PREDSIM])
def test_a_layer_learns_the_same_whatever_stands_above_it(options, few):
    states = []
    for widths in ((8, 16), (8, 16, 16)):
        network = made(widths=widths)
        train(network, few, LocalClassifierStrategy(10, **options), 1, **QUIET | ADAM)
        states.append([m.state_dict() for i in range(2) for m in (network.layers[i], network.objectives[i])])
    for a, b in zip(*states):
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_frozen_layers_and_their_heads_keep_every_bit(few):
    network, seen = made(), []

    def keep(epoch, network):
        seen.append([
            {k: v.clone() for module in pair for k, v in module.state_dict(prefix=type(module).__name__).items()}
            for pair in zip(network.layers, network.objectives)
        ])  # fmt: skip

    train(network, few, LocalClassifierStrategy(10), 1, schedule="greedy", after_epoch=keep, **QUIET | ADAM)
    for epoch, (a, b) in enumerate(zip(seen, seen[1:]), start=1):
        assert [not all(torch.equal(x[k], y[k]) for k in x) for x, y in zip(a, b)] == [i == epoch for i in range(3)]
    assert [int(layer.batch_norm.num_batches_tracked) for layer in network.layers] == [2, 2, 2]


@pytest.mark.parametrize("options", [dict(), PREDSIM])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(options, few, tmp_path):
    class Stopped(Exception):
        pass

    def die(epoch, network):
        raise Stopped

    how, path = QUIET | ADAM | dict(epochs=2), tmp_path / "run.safetensors"
    whole, first, second = made(), made(), made()
    train(whole, few, LocalClassifierStrategy(10, **options), **how)
    with pytest.raises(Stopped):
        train(first, few, LocalClassifierStrategy(10, **options), checkpoint=path, after_epoch=die, **how)
    torch.manual_seed(5)
    train(second, few, LocalClassifierStrategy(10, **options), checkpoint=path, **how)
    a, b = whole.state_dict(), second.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


PROGRAM = (
    "import sys, torch, ff_research as ff; n = ff.load_network(sys.argv[1]); "
    "x = torch.load(sys.argv[2]); print(ff.predict(n, x, device='cpu', precision='fp32').tolist())"
)


@pytest.mark.slow
def test_a_saved_network_predicts_the_same_elsewhere(few, tmp_path):
    cases = [
        (dict(pooling="average", norm="row"), dict(head="patches", smoothing=0.1)),
        (dict(pooling="stride", norm="channel"), dict(bias=False)),
        (dict(), PREDSIM),
    ]
    torch.save(few.x_test, tmp_path / "x.pt")
    for i, (network_options, options) in enumerate(cases):
        network, path = made(**network_options), tmp_path / f"{i}.safetensors"
        train(network, few, LocalClassifierStrategy(10, **options), 1, **QUIET | ADAM)
        ff.save(network, path)
        again = ff.load_network(path)
        assert repr(again) == repr(network) and repr(again.strategy) == repr(network.strategy)
        assert torch.equal(ff.predict(again, few.x_test, **WHERE), ff.predict(network, few.x_test, **WHERE))
    told = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path), str(tmp_path / "x.pt")], capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(Path(ff.__file__).parents[1])},
    )  # fmt: skip
    assert told.stdout.strip() == str(ff.predict(network, few.x_test, **WHERE).tolist())


# Recipes


def test_recipes_follow_the_paper_and_change_one_part_at_a_time():
    r = RECIPES["mono-forward-cifar10"]
    assert r.schedule.epochs == 300 and RECIPES["mono-forward-cifar10-60"].schedule.epochs == 60
    o = r.optimizer
    assert (o.name, o.lr, o.lr_schedule, o.weight_decay, o.batch_size) == ("plain_sgd", 0.1, "cosine", 0, 128)
    assert r.network.widths == (64, 128, 256, 512) and dict(r.network.options) == {"pool": 2, "norm": "batch_first"}
    base = RECIPES["cifar10-local-pooled"]
    for name, changed in dict(
        flat="strategy", patches="strategy", row="network", channel="network", average="network", stride="network"
    ).items():
        other = RECIPES[f"cifar10-local-{name}"]
        differs = {field for field, value in base if value != getattr(other, field)} - {"name"}
        assert differs == {changed}, name
    shared = RECIPES["cifar10-conv-local-classifier"]
    assert shared.schedule.epochs == 3 and shared.optimizer == RECIPES["cifar10-conv-channels"].optimizer
