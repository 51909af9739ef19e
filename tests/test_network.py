"Networks and the walk: what it visits, keeps and refuses, precision of copies, widths that are none."

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from ff_research.backprop import EndToEnd
from ff_research.data import centred, load
from ff_research.labels import labelled, overlay
from ff_research.layers import FFConv, FFLinear, Layer, Merge, normalise, prepare
from ff_research.network import Network, activities, look, reading, ready, run_layer, twin, walk
from ff_research.readout import linear_probe
from ff_research.strategies import STRATEGIES
from ff_research.streams import Streams
from ff_research.training import train

IMAGES = load("digits")
ZEROS = Streams(torch.zeros(2, 3), None, (2,))


def passing(height, layer, xs, s, t):
    return xs[0], xs[0]


def identities(count):
    return Network([nn.Identity() for _ in range(count)])


def test_known_and_last_choose_the_layers_that_are_visited():
    seen = []

    def visit(height, layer, xs, s, t):
        seen.append((height, t))
        return xs[0], xs[0]

    outs = walk(identities(4), ZEROS, visit, known={1: torch.ones(2, 3)}, last=3)
    assert seen == [(2, 0), (3, 0)] and list(outs) == [3] and torch.equal(outs[3], torch.ones(2, 3))


@pytest.mark.parametrize("deep", [1, 2, 4])
def test_outputs_are_kept_as_long_as_a_layer_reads_them(deep):
    layers = [nn.Identity() for _ in range(6)] + [Merge((-1, -deep))]
    assert sorted(walk(Network(layers), ZEROS, passing)) == list(range(8 - deep, 8))


def test_streams_that_are_drawn_anew_go_on_and_end_skips():
    def before(s, height):
        return replace(s, x=s.x + 1) if height == 2 else s

    assert torch.equal(walk(identities(3), ZEROS, passing, before)[3], torch.ones(2, 3))
    with pytest.raises(ValueError, match="cannot cross"):
        walk(Network([nn.Identity(), nn.Identity(), Merge((-1, -3))]), ZEROS, None, before)


def test_a_layer_that_reads_itself_gets_its_activity_of_the_iteration_before():
    given = []

    class Echo(Layer):
        reads = (-1, 0)

        def forward(self, x, own):
            given.append(own)
            return x if own is None else own + 1

        def hand_on(self, h):
            return 10 * h

    network = Network([Echo()], iterations=2, inputs="plain")
    x = torch.ones(2, 3)
    assert torch.equal(walk(network, ready(network, x))[1], 10 * (x + 2))
    assert given[0] is None and torch.equal(given[1], x) and torch.equal(given[2], x + 1)


@pytest.mark.parametrize("widths", [[], [64.0, 10], ["64", "10"], [64, -3], [64, True], [64, FFLinear(64, 3)]])
def test_widths_that_are_none(widths):
    with pytest.raises(ValueError, match="widths"):
        Network(widths)


def test_numbers_of_numpy_are_widths():
    assert Network(np.array([64, 10])).layers[0].units == 10


def test_images_that_share_pixels_are_read_by_any_layer():
    x, y = IMAGES.x_train[:3], IMAGES.y_train[:3]
    few = labelled(x, torch.stack([y, (y + 1) % 10]), 10)
    for network in (Network([64, 20]), Network([FFConv(1, 2)]), Network([FFConv(1, 2), FFLinear(128, 5)])):
        out = network(few)
        assert len(out) == 6 and torch.allclose(out, network(few.dense()), atol=1e-5)
        standardised = Network(list(network.layers), inputs="standardised")
        assert torch.allclose(standardised(few), standardised(few.dense()), atol=1e-5)


def test_activities_to_a_power_and_of_triangles():
    network = Network([64, 30, 20])
    raw, power = activities(network, IMAGES.x_test, False), activities(network, IMAGES.x_test, power=2)
    assert all(torch.allclose(p, normalise(h**2), atol=1e-5) for p, h in zip(power, raw))
    with pytest.raises(ValueError, match="normalised=True"):
        activities(network, IMAGES.x_test, normalised=False, power=2)
    triangles = Network([64, 30, 20], triangle=True)
    assert (triangles.inputs, network.inputs) == ("standardised", "normalised")
    assert all(h.mean(1).abs().max() < 1e-5 for h in activities(triangles, IMAGES.x_test))


def test_reading_puts_modules_back_after_an_error():
    network = Network([FFConv(1, 2, norm="batch", dropout=0.5), FFConv(2, 2)]).train()
    network.layers[1].eval()
    modes = [module.training for module in network.modules()]
    with pytest.raises(KeyError), reading(network):
        assert not any(module.training for module in network.modules()) and not torch.is_grad_enabled()
        raise KeyError
    assert [module.training for module in network.modules()] == modes and torch.is_grad_enabled()


def test_copies_in_low_precision():
    mixed = Network([FFConv(1, 4), FFLinear(256, 20)])
    low = twin(mixed, "bf16", "cpu")
    assert low.layers[0].conv.weight.dtype == torch.float32 and low.layers[1].weight.dtype == torch.bfloat16
    assert activities(low, IMAGES.x_test[:5])[0].dtype == torch.bfloat16  # a convolution runs under autocast
    assert twin(mixed, "fp32", "cpu") is mixed and twin(low, "bf16", "cpu") is low
    assert Network([64, 10]).bfloat16()(IMAGES.x_test[:5]).dtype == torch.bfloat16
    classifier = Network([64, 20])
    classifier.head = nn.Linear(20, 10)
    assert twin(classifier, "bf16", "cpu").head.weight.dtype == torch.bfloat16
    assert classifier.head.weight.dtype == classifier.layers[0].weight.dtype == torch.float32


def test_a_layer_without_inputs_yet_runs_in_low_precision():
    "A recurrent layer reads None at first."

    class Optional(Layer):
        reads = (0,)

        def forward(self, own):
            return torch.ones(2, 3) if own is None else own

    assert torch.equal(run_layer(Optional(), [None], "bf16"), torch.ones(2, 3))


def test_how_a_network_is_printed():
    assert repr(Network([FFLinear(64, 10)], iterations=4, learn_at=(1, 2))).startswith(
        "Network(\n  iterations=4, learn_at=(1, 2), read_at=(4,)"
    )
    assert "iterations" not in repr(Network([64, 10]))


def test_a_network_without_weights_has_a_type_and_a_device():
    network = Network([Merge((-1,))])
    assert network.dtype == torch.float32 and network.device.type == "cpu"
    h, out = look(network)(1, network.layers[0], [torch.ones(2, 3)], ZEROS, 0)
    assert torch.equal(h, out)


def test_a_network_centres_after_negatives_are_made(digits):
    "Same as images that were centred beforehand, but for rounding; a label has a tenth of their energy."
    strategy = STRATEGIES["label_embedding"](10)
    network = Network([64, 50], inputs="centred")
    with pytest.raises(ValueError, match="has seen no images yet"):
        network(digits.x_test[:2])
    network.see(digits, strategy.label_pixels)
    strategy.begin(network, digits.x_train[:2])
    before = centred(digits, 10.0)
    labels = digits.y_train[None, :9]
    rows = network.prepare(strategy.write(digits.x_train[:9], labels).x).dense()
    expected = prepare(overlay(before.x_train[:9], labels[0], 10), 64)
    torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-5)
    dense = network.prepare(strategy.create_positive(digits.x_train[:9], labels[0]))
    torch.testing.assert_close(dense, expected, rtol=1e-4, atol=1e-5)
    assert strategy.strength == pytest.approx((network.energy / 10).sqrt().item())


@pytest.mark.parametrize("name", ["hard_mining", "self_contrastive", "masking", "adversarial", "all_labels"])
def test_every_kind_of_strategy_trains_a_network_that_centres(name, digits, tmp_path):
    few = replace(digits, name="few", x_train=digits.x_train[:300], y_train=digits.y_train[:300])
    quiet = dict(epochs=2, progress=False, device="cpu", precision="bf16", lr=1e-3)
    network = Network([64, 40, 40], inputs="centred")
    train(network, few, STRATEGIES[name](10), checkpoint=tmp_path / "a", **quiet)
    again = Network([64, 40, 40], inputs="centred")
    train(again, few, STRATEGIES[name](10), checkpoint=tmp_path / "a", **quiet)  # all there: loaded, mean image too
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), again.state_dict().values()))
    assert torch.equal(again.center, network.center) and linear_probe(network, few)["test"]["layer_1"] < 60


def test_backpropagation_in_bf16_centres_on_the_same_mean_image_as_forward_forward(digits):
    network = Network([64, 30], inputs="centred")
    network.see(digits)
    network.head = nn.Linear(30, 10)
    learner = EndToEnd(network, "sgd", 0.01, 0.0, "bf16")
    assert torch.equal(learner.twin.center, network.center) and learner.twin.center.dtype == torch.float32
    assert {p.dtype for p in learner.copies} == {torch.bfloat16} and {p.dtype for p in learner.master} == {
        torch.float32
    }
    low = twin(network, "bf16", "cpu")
    assert torch.equal(learner.twin.prepare(digits.x_test), low.prepare(digits.x_test))
