"""Channel-wise competition: losses against closed forms, the CFSE network against plain modules, learning, locality, files, recipes."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ff_research as ff
from ff_research.channelwise import (
    LOSSES,
    ChannelCompetitionStrategy,
    CompetitionObjective,
    cfse,
    check_shared,
    cwc_loss,
    pvn_loss,
    shareable,
)
from ff_research.convolution import conv
from ff_research.data import from_arrays
from ff_research.goodness import hinton_loss
from ff_research.network import NETWORKS, activities
from ff_research.readout import scores_errors
from ff_research.recipes import RECIPES, Recipe
from ff_research.runs import run
from ff_research.schedules import spans
from ff_research.strategies import STRATEGIES
from ff_research.streams import Streams
from ff_research.training import train

WHERE = dict(precision="fp32", device="cpu")
QUIET = WHERE | dict(progress=False)
ADAM = dict(optimizer="adamw", lr=1e-2, lr_schedule="constant", weight_decay=0.0, batch_size=128)
WINDOWS = spans((0, 1), (0, 2), (0, 2), (0, 3))


@pytest.fixture(scope="module")
def few(digits):
    "Enough to compare weights."
    return replace(digits, x_train=digits.x_train[:256], y_train=digits.y_train[:256], x_test=digits.x_test[:60],
                   y_test=digits.y_test[:60])  # fmt: skip


def made(seed=0):
    return cfse((1, 8, 8), [20, 20, 20, 20], seed, inputs="centred")


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Losses


def test_cwc_is_the_formula_written_out_and_stops_at_its_limit():
    g, y = drawn(7, 10).square().requires_grad_(), torch.arange(7)
    formula = -((g[torch.arange(7), y].exp() + 1e-9) / (g.exp().sum(1) + 1e-9)).log().mean()
    torch.testing.assert_close(cwc_loss(g, y), formula)
    torch.testing.assert_close(cwc_loss(g, y), F.cross_entropy(g, y))
    far = torch.tensor([[60.0, 1.0], [1.0, 70.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(cwc_loss(far, torch.tensor([1, 0])), far)
    assert gradient[0, 0] == gradient[1, 1] == 0 and gradient[0, 1] < -0.4  # beyond the limit nothing pulls


@pytest.mark.parametrize("theta", [0.5, 2.0])
def test_pvn_is_hintons_loss_of_right_and_other_classes(theta):
    g, y = drawn(6, 4).square(), torch.tensor([0, 1, 2, 3, 0, 1])
    right = g[torch.arange(6), y]
    others = torch.stack([row[torch.arange(4) != k].mean() for row, k in zip(g, y)])
    torch.testing.assert_close(pvn_loss(g, y, theta), hinton_loss(right, others, theta))


@pytest.mark.parametrize("loss", LOSSES)
def test_rows_without_a_label_do_not_count(loss):
    h, y, objective = drawn(6, 12, 2, 2), torch.tensor([0, 1, 2, 0, 1, 2]), CompetitionObjective(3, loss=loss)
    whole = objective(h[:4], Streams(h[:4], y[:4], (4,)))[0]
    masked = objective(h, Streams(h, torch.tensor([0, 1, 2, 0, -100, -100]), (6,)))[0]
    torch.testing.assert_close(whole, masked)


@pytest.mark.parametrize("power", [1, 2])
def test_goodness_is_that_of_each_group_and_its_gradient_is_the_closed_form(power):
    h, y = drawn(5, 12, 3, 2).requires_grad_(), torch.tensor([0, 2, 1, 1, 0])
    objective = CompetitionObjective(3, power)
    loss, g = objective(h, Streams(h, y, (5,)))
    by_loop = torch.stack([h[:, 4 * j : 4 * j + 4].pow(power).mean((1, 2, 3)) for j in range(3)], 1)
    torch.testing.assert_close(g, by_loop)
    (gradient,) = torch.autograd.grad(loss, h)
    pull = (g.softmax(1) - F.one_hot(y, 3)).repeat_interleave(4, 1)[..., None, None] / (4 * 3 * 2) / 5
    torch.testing.assert_close(gradient, pull * (2 * h if power == 2 else torch.ones_like(h)))


# The network


def test_the_official_network_has_its_parameters_and_groups():
    network = cfse((3, 32, 32), [20, 80, 240, 480])
    assert [layer.groups for layer in network.layers] == [1, 10, 1, 10]
    assert [layer.pool for layer in network.layers] == [0, 2, 0, 2]
    assert [sum(p.numel() for p in layer.conv.parameters()) for layer in network.layers] == [560, 1520, 173040, 104160]
    assert {layer.batch_norm.eps for layer in network.layers} == {1e-4}
    shapes = [list(h.shape[1:]) for h in activities(network, torch.rand(2, 3, 32, 32))]
    assert shapes == [[20, 32, 32], [80, 16, 16], [240, 16, 16], [480, 8, 8]]


def test_a_block_is_convolution_relu_pool_and_normalisation_in_this_order():
    network = made().train()
    h = drawn(9, 1, 8, 8)
    for i, layer in enumerate(network.layers):
        plain = nn.Conv2d(layer.inputs, 20, 3, padding=1, groups=10 if i % 2 else 1)
        plain.load_state_dict(layer.conv.state_dict())
        modules = [plain, nn.ReLU(), *[nn.MaxPool2d(2)] * (i % 2), nn.BatchNorm2d(20, eps=1e-4)]
        expected = nn.Sequential(*modules)(h)
        torch.testing.assert_close(layer(h), expected)
        h = layer.hand_on(expected.detach())
        assert torch.equal(h, expected)


def test_weights_start_as_those_of_torch():
    layer = cfse((3, 16, 16), [200, 400]).layers[1]
    bound = 1 / math.sqrt(20 * 9)
    for t in (p.detach() for p in layer.conv.parameters()):
        assert t.abs().max() <= bound and t.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_a_separator_reads_the_channels_of_its_own_class_only():
    layer = made().layers[1].eval()
    x = drawn(3, 20, 8, 8)
    other = x.clone()
    other[:, 4:6] += 1  # of class 2
    moved = (layer(x) != layer(other)).flatten(2).any(2).any(0)
    assert moved.nonzero().flatten().tolist() == [4, 5]


def test_widths_are_rounded_to_what_can_be_shared_out():
    assert shareable([64, 128, 256, 512], 10) == [60, 130, 260, 510] and shareable([3], 10) == [10]
    assert RECIPES["cifar10-conv-channels"].network.widths == tuple(shareable([64, 128, 256, 512], 10))
    check_shared([30, 60], 10)


@pytest.mark.parametrize("shape", [(1, 9, 7), (3, 12, 10), (3, 5, 5)])
def test_images_of_any_size_train_and_are_read(shape):
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(40, *shape, generator=g), torch.arange(40) % 4
    images = from_arrays("own", x[:30], y[:30], x[30:], y[30:])
    network = cfse(shape, [8, 8, 16, 16], classes=4, inputs="centred")
    train(network, images, ChannelCompetitionStrategy(4), 1, **QUIET)
    assert set(scores_errors(network, images, **WHERE)) == {"layer_1", "layer_2", "layer_3", "layer_4", "sum"}


def test_what_does_not_fit_is_said(few):
    def fit(network, **options):
        return train(network, few, ChannelCompetitionStrategy(10, **options), 1, **QUIET)

    for call, words in [
        (lambda: cfse((1, 8, 8), [20, 64]), "layer 2 has 64 channels.*take a multiple, such as 60"),
        (lambda: cfse((1, 3, 3), [20, 20, 20, 20]), "3 x 3 are too small"),
        (lambda: fit(conv((1, 8, 8), [20, 25])), "layer 2 has 25 channels.*among 10 classes"),
        (lambda: fit(cfse((3, 8, 8), [20, 20])), "first layer takes 3; build it"),
        (lambda: cfse((1, 8, 8), [0, 20]), "channels=0"),
        (lambda: CompetitionObjective(10, power=0), "unknown power 0"),
        (lambda: fit(made(), loss="softmax"), "softmax"),
        (lambda: CompetitionObjective(10, loss="cvc"), "did you mean 'cwc'|cwc"),
        (lambda: CompetitionObjective(3).scores(torch.ones(2, 10, 2, 2)), "cannot be shared out"),
        (lambda: Recipe(name="own", data="digits").vary(strategy="channel_competition", strategy_options=(("powr", 1),)),
         "did you mean 'power'"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=words):
            call()


# Learning


def test_the_recipe_on_digits_learns_and_names_its_layers():
    row = run("cwcomp-digits", 0, probe=False, **QUIET)
    errors = row["errors"]["test"]["scores"]
    assert errors["layer_4"] <= 4 and errors["sum"] <= 5, errors
    assert errors["layer_1"] > 20, "a first layer by itself cannot do that: were the layers read in the right order?"


@pytest.mark.parametrize("options", [dict(loss="pvn"), dict(power=1), dict(loss="cwc")])
def test_the_other_losses_learn(options, digits):
    network = conv((1, 8, 8), [20, 40], pool=[0, 2], norm="channel", inputs="centred")
    train(network, digits, ChannelCompetitionStrategy(10, **options), 4, **QUIET | ADAM)
    errors = scores_errors(network, digits, **WHERE)
    assert errors["layer_2"] <= 18, errors  # guessing gives 90


def test_a_fully_connected_network_competes_too(digits):
    network = ff.Network([64, 100, 100], inputs="centred")
    train(network, digits, STRATEGIES["channel_competition"](10), 6, **QUIET | ADAM | dict(lr=3e-3))
    assert scores_errors(network, digits, **WHERE)["layer_1"] <= 12


# Local, frozen, resumed, saved


def test_layers_that_do_not_learn_keep_every_bit_and_statistics_move_once_a_batch(few):
    network, seen = made(), []

    def keep(epoch, network):
        seen.append([{k: v.clone() for k, v in layer.state_dict().items()} for layer in network.layers])

    keep(-1, network)
    train(network, few, ChannelCompetitionStrategy(10), 3, schedule=WINDOWS, after_epoch=keep, **QUIET | ADAM)
    for epoch, (a, b) in enumerate(zip(seen, seen[1:])):
        moved = [not all(torch.equal(x[k], y[k]) for k in x) for x, y in zip(a, b)]
        assert moved == WINDOWS(4, 3)[epoch].tolist()
    assert [int(layer.batch_norm.num_batches_tracked) for layer in network.layers] == [2, 4, 4, 6]


def test_a_layer_learns_the_same_whatever_stands_above_it(few):
    states = []
    for widths in ([20, 20], [20, 20, 40, 40]):
        network = cfse((1, 8, 8), widths, inputs="centred")
        train(network, few, ChannelCompetitionStrategy(10), 2, **QUIET | ADAM)
        states.append([network.layers[i].state_dict() for i in range(2)])
    for a, b in zip(*states):
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_read_outs_do_not_depend_on_the_batch(few):
    network = made()
    train(network, few, ChannelCompetitionStrategy(10), 1, **QUIET | ADAM)
    network.train()
    alone = torch.cat([ff.predict(network, few.x_test[i : i + 1], **WHERE) for i in range(10)])
    assert torch.equal(alone, ff.predict(network, few.x_test, **WHERE)[:10])


def test_a_run_that_was_stopped_goes_on_bit_for_bit(few, tmp_path):
    class Stopped(Exception):
        pass

    def die(epoch, network):
        if epoch == 1:
            raise Stopped

    options, path = QUIET | ADAM | dict(schedule=WINDOWS, epochs=3), tmp_path / "run.safetensors"
    whole, first, second = made(), made(), made()
    train(whole, few, ChannelCompetitionStrategy(10), **options)
    with pytest.raises(Stopped):
        train(first, few, ChannelCompetitionStrategy(10), checkpoint=path, after_epoch=die, **options)
    torch.manual_seed(5)
    train(second, few, ChannelCompetitionStrategy(10), checkpoint=path, **options)
    a, b = whole.state_dict(), second.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
def test_a_saved_network_predicts_the_same_elsewhere(few, tmp_path):
    network = made()
    train(network, few, ChannelCompetitionStrategy(10, loss="pvn", theta=1.5, power=1), 1, **QUIET | ADAM)
    ff.save(network, tmp_path / "cw.safetensors")
    again = ff.load_network(tmp_path / "cw.safetensors")
    assert repr(again) == repr(network) and "pvn" in repr(again.objectives[0]) and again.strategy.theta == 1.5
    torch.save(few.x_test, tmp_path / "x.pt")
    program = (
        "import sys, torch, ff_research as ff; n = ff.load_network(sys.argv[1]); "
        "x = torch.load(sys.argv[2]); print(ff.predict(n, x, device='cpu', precision='fp32').tolist())"
    )
    paths = [str(tmp_path / name) for name in ("cw.safetensors", "x.pt")]
    told = subprocess.run(
        [sys.executable, "-c", program, *paths], capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(Path(ff.__file__).parents[1])},
    )  # fmt: skip
    assert told.stdout.strip() == str(ff.predict(network, few.x_test, **WHERE).tolist())


# Recipes


def test_recipes_follow_the_paper():
    ends = dict(cifar10=(11, 16, 21, 25), mnist=(2, 3, 4, 5), fashion=(10, 15, 19, 23))
    for data, expected in ends.items():
        r = RECIPES[f"cwcomp-{data}"]
        assert tuple(end for _, end in r.schedule.spans) == expected and r.schedule.epochs == expected[-1]
        assert (r.optimizer.name, r.optimizer.lr, r.optimizer.lr_schedule) == ("adamw", 0.01, "constant")
        assert (
            r.optimizer.weight_decay == 0 and r.optimizer.batch_size == 128 and r.network.widths == (20, 80, 240, 480)
        )
        short = RECIPES[f"cwcomp-{data}-short"]
        assert short.schedule.epochs <= 4 and short.network == r.network and not short.target
    assert NETWORKS["cfse"] is cfse
