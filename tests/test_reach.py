"""Reach: against the transfer errors and a brute-force count of distances; what is frozen, what has no answer."""

import json
from dataclasses import replace

import pytest
import torch

from ff_research.data import load
from ff_research.network import Network
from ff_research.reach import CHANGES, reach_row, readings, sensitivity
from ff_research.readout import features
from ff_research.strategies import STRATEGIES
from ff_research.training import train
from ff_research.transfer import refit, transfer_errors

CPU = dict(precision="fp32", device="cpu")


@pytest.fixture(scope="module")
def network(digits):
    network = Network([64, 40, 30, 20])
    train(network, digits, STRATEGIES["label_embedding"](10), epochs=3, progress=False, **CPU)
    return network


def test_usual_and_plain_readings_are_the_transfer_errors(digits, network):
    before = {name: t.clone() for name, t in network.state_dict().items()}
    read = readings(network, digits, neutral_label=10, **CPU)
    for kind, label in (("usual", 10), ("plain", False)):
        expected = transfer_errors(network, digits, neutral_label=label, **CPU)
        for part in ("test", "validation"):
            assert {name: read[kind][part][name] for name in expected[part]} == expected[part]
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())


def test_a_network_with_triangles_is_read_by_what_its_layers_hand_on(digits):
    network = Network([64, 30, 20], triangle=True)
    read = readings(network, digits, neutral_label=False, **CPU)
    assert read["usual"] == transfer_errors(network, digits, neutral_label=False, **CPU) != read["length"]


def test_all_layers_together_are_read_and_only_layers_that_were_asked_for(digits, network):
    read = readings(network, digits, neutral_label=False, layers=["layers_1_to_3", "layer_2"], **CPU)
    assert all(set(found[part]) == {"layers_1_to_3", "layer_2"} for found in read.values() for part in found)
    assert set(read) == {"usual", "length"}
    with pytest.raises(ValueError, match="layer_4.*layer_"):
        readings(network, digits, neutral_label=False, layers=["layer_4"], **CPU)


def test_two_layers_have_nothing_joined(digits):
    assert set(readings(Network([64, 20, 20]), digits, neutral_label=False, **CPU)["usual"]["test"]) == {
        "layer_1",
        "layer_2",
    }


def test_length_reads_what_normalisation_takes_away():
    "Images that differ in brightness only: the normalised activity is the same for all, its length tells the class."
    y = torch.arange(240) % 2
    x = torch.full((240, 1, 8, 8), 0.25) * (1 + y.view(-1, 1, 1, 1))
    images = replace(load("digits"), name="lamps", x_train=x, y_train=y, x_test=x, y_test=y, num_classes=2)
    network = Network([64, 10, 10])
    network.prepare = lambda x: x.flatten(1)  # as an image net without normalised inputs would
    read = readings(network, images, neutral_label=False, **CPU)
    assert read["length"]["test"]["layer_1"] == 0
    assert read["usual"]["test"]["layer_1"] is None or read["usual"]["test"]["layer_1"] > 40


def test_a_silent_layer_has_no_error(digits):
    network = Network([64, 20, 20, 20])
    with torch.no_grad():
        network.layers[2].bias.fill_(-1e6)
    read = readings(network, digits, neutral_label=False, **CPU)
    assert read["usual"]["test"]["layer_3"] is None and read["usual"]["test"]["layer_2"] < 80
    row = reach_row(network, None, [digits], neutral_label=False, **CPU)["digits"]
    assert row["layers"]["dead_units"][2] == 1 and row["layers"]["effective_rank"][2] == 0


@pytest.mark.parametrize("classes", [None, 10])
@pytest.mark.parametrize("change", CHANGES)
def test_sensitivity_is_the_ratio_of_mean_squared_distances(digits, network, change, classes):
    x = digits.x_test[:50].float() / 255 if digits.x_test.dtype == torch.uint8 else digits.x_test[:50]
    moved = CHANGES[change](x, torch.Generator().manual_seed(3))
    found = sensitivity(network, x, change, classes, seed=3, **CPU)
    for a, b, s in zip(features(network, x, classes, **CPU), features(network, moved, classes, **CPU), found):
        apart = torch.cdist(a.double(), a.double()).square().sum() / (50 * 49)
        assert s == pytest.approx(((a - b).double().square().sum(1).mean() / apart).item(), rel=1e-3)


def test_sensitivity_does_not_touch_the_images_and_knows_its_limits(digits, network):
    x = digits.x_test[:20]
    before = x.clone()
    assert sensitivity(network, x, lambda z, g: z, **CPU) == [0, 0, 0]
    assert (
        sensitivity(network, x, "noise", seed=1, **CPU)
        == sensitivity(network, x, "noise", seed=1, **CPU)
        != sensitivity(network, x, "noise", seed=2, **CPU)
    )
    assert torch.equal(x, before)
    same = x[:1].repeat(5, 1, 1, 1)
    assert all(s != s for s in sensitivity(network, same, lambda z, g: z, **CPU))
    with pytest.raises(ValueError, match="at least two"):
        sensitivity(network, x[:1], "shift", **CPU)
    with pytest.raises(ValueError, match="shift"):
        sensitivity(network, x, "shft", **CPU)


def test_a_row_is_ready_for_json_and_refits_the_target(digits, network):
    colour = refit(digits, (3, 9, 9), name="other")
    row = reach_row(network, digits.shape, {"other": colour}, neutral_label=10, samples=100, **CPU)
    assert json.loads(json.dumps(row)) == row and set(row["other"]) == {"errors", "layers", "sensitivity"}
    assert all(len(values) == 3 for part in ("layers", "sensitivity") for values in row["other"][part].values())
    with pytest.raises(ValueError, match="pixels"):
        reach_row(network, None, [colour], neutral_label=10, **CPU)
    with pytest.raises(ValueError, match="two targets of one name"):
        reach_row(network, None, [digits, digits], neutral_label=10, **CPU)


def test_nan_is_an_error_and_not_a_row(digits):
    network = Network([64, 20, 20])
    with torch.no_grad():
        network.layers[1].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        reach_row(network, None, [digits], neutral_label=False, **CPU)
