"Networks by a word: recipes name them, feature maps are pooled for probes, what a network centres on is kept in its file."

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import ff_research as ff
from ff_research import readout
from ff_research.convolution import conv
from ff_research.network import NETWORKS, as_features, register_network
from ff_research.optimisers import LR_SCHEDULES, OPTIMIZERS
from ff_research.predictions import scores
from ff_research.readout import features, label_goodness, linear_probe
from ff_research.recipes import Recipe, load_recipes
from ff_research.runs import run
from ff_research.strategies import STRATEGIES
from ff_research.training import train

QUIET = dict(progress=False, device="cpu", precision="fp32")
CONV = dict(name="conv", widths=(20, 40), options=(("pool", (2, 0)), ("norm", "batch_first")))
TINY = Recipe(
    name="tiny-conv",
    data="digits",
    network=CONV,
    strategy=dict(name="mono_forward"),
    schedule=dict(epochs=8, spans=((0, 7), (1, 8))),
    optimizer=dict(name="adamw", lr=0.03, lr_schedule="cosine", weight_decay=0.0, batch_size=50),
)


def test_a_recipe_names_a_network_its_options_and_spans():
    config = TINY.identity()
    assert config["network"] == "conv" and config["network_options"] == [["pool", [2, 0]], ["norm", "batch_first"]]
    assert config["spans"] == [[0, 7], [1, 8]]
    assert "network" not in Recipe(name="plain", data="digits").identity()
    assert TINY.vary(network_options=()).network.options == ()


def test_a_file_takes_the_options_of_a_network_among_its_fields(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        '[a]\ndata = "digits"\nnetwork = { name = "conv", widths = [8, 8], kernel = 5, pool = [2, 0] }\n'
        '[b]\nlike = "a"\nnetwork = { kernel = "none" }\n'
    )
    own = load_recipes(path)
    assert dict(own["a"].network.options) == {"kernel": 5, "pool": (2, 0)}
    assert dict(own["b"].network.options) == {"pool": (2, 0)}


@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(network=dict(name="convv")), "did you mean 'conv'"),
        (dict(network=dict(name="conv", options=(("kernels", 3),))), "did you mean 'kernel'"),
        (dict(network=dict(name="conv", triangle=True)), "fully connected"),
        (dict(schedule=dict(spans=((3, 3),))), "first < end"),
        (dict(schedule=dict(epochs=2, spans=((0, 3),))), "within the 2 epochs"),
        (dict(schedule=dict(name="greedy", spans=((0, 3),))), "'together'"),
        (dict(objective=dict(name="hinton", options=(("goodness", "loudness"),))), "sum_of_squares"),
    ],
)
def test_what_a_recipe_cannot_be(wrong, said):
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        Recipe(name="wrong", data="digits", **wrong)


def test_a_convolutional_recipe_runs_and_its_row_has_the_layers_own_scores():
    row = run(TINY, 0, **QUIET)
    errors = row["errors"]["test"]
    assert set(errors["scores"]) == {"layer_1", "layer_2", "sum"} and errors["scores"]["sum"] < 12
    assert set(errors["probe"]) == {"layer_1", "layer_2"} and errors["probe"]["layer_2"] < 8
    learned = [[v is not None and v != 0 for v in epoch] for epoch in row["curves"]["loss"]]
    assert len(learned) == 8
    again = run(TINY, 0, **QUIET)
    assert again["weights"] == row["weights"] and again["errors"] == row["errors"]


def test_networks_are_registered_once_and_by_name():
    assert {"mlp", "conv"} <= set(NETWORKS)
    with pytest.raises(ValueError, match="belongs to"):

        def conv(shape, widths, seed=0):
            "Another one."

        register_network(conv)
    assert [layer.units for layer in NETWORKS["mlp"]((1, 8, 8), (5, 6)).layers] == [5, 6]


def test_images_too_small_for_the_pooling_are_refused():
    with pytest.raises(ValueError, match="too small: layer 4 pools"):
        conv((1, 8, 8), (4, 4, 4, 4))
    with pytest.raises(ValueError, match="pool has 1 entries for 2 layers"):
        conv((1, 8, 8), (4, 4), pool=[2])


@pytest.mark.parametrize("shape", [(1, 9, 13), (3, 32, 32), (3, 20, 17)])
def test_images_of_any_size_and_number_of_channels(shape):
    x = torch.rand(5, *shape)
    f = features(conv(shape, (4, 6), pooled=2), x, **{k: v for k, v in QUIET.items() if k != "progress"})
    assert [part.shape for part in f] == [(5, 16), (5, 24)]


def test_pooled_features_are_means_over_windows():
    h = torch.rand(3, 2, 8, 8)
    torch.testing.assert_close(as_features(h, 2), F.avg_pool2d(h, 4).flatten(1))
    assert torch.equal(as_features(h), h.flatten(1)) and torch.equal(as_features(h, 9), h.flatten(1))
    assert torch.equal(as_features(h.flatten(1), 2), h.flatten(1))


def test_features_larger_than_memory_are_refused_with_the_remedy(monkeypatch):
    monkeypatch.setattr(readout, "LARGEST", 10_000)
    network, x = conv((1, 8, 8), (4, 4), pooled=None), torch.rand(100, 1, 8, 8)
    with pytest.raises(ValueError, match="pooled = 2"):
        features(network, x, device="cpu")
    network.pooled = 1
    assert features(network, x, device="cpu")[0].shape == (100, 4)


def test_a_pooled_network_is_saved_with_its_probe(digits, tmp_path):
    network, few = conv(digits.shape, (8, 12), pool=[2, 0], pooled=2), replace(digits, x_train=digits.x_train[:300])
    few = replace(few, y_train=digits.y_train[:300])
    train(network, few, STRATEGIES["mono_forward"](10), epochs=1, **QUIET)
    ff.fit_readout(network, few, device="cpu")
    ff.save(network, tmp_path / "a.safetensors")
    other = ff.load_network(tmp_path / "a.safetensors")
    assert other.pooled == 2
    assert torch.equal(scores(network, digits.x_test, by="probe"), scores(other, digits.x_test, by="probe"))


@pytest.mark.parametrize("name", ["label_embedding", "image_mixing"])
def test_a_network_that_centres_its_inputs_is_saved_with_what_it_centres_on(digits, tmp_path, name):
    network = ff.Network([64, 30, 30], inputs="centred")
    train(network, digits, STRATEGIES[name](10), epochs=1, **QUIET)
    ff.save(network, tmp_path / "a.safetensors")
    other = ff.load_network(tmp_path / "a.safetensors")
    assert torch.equal(other.center, network.center) and torch.equal(other.energy, network.energy)
    for a, b in zip(*(features(n, digits.x_test[:50], device="cpu") for n in (network, other))):
        assert torch.equal(a, b)


def test_goodness_of_maps_is_their_mean_of_squares_unless_told_otherwise(digits):
    network = conv(digits.shape, (6, 6), pool=[2, 0])
    g = label_goodness(network, digits.x_test[:4], 10, first=1, device="cpu", precision="fp32")
    told = label_goodness(
        network, digits.x_test[:4], 10, first=1, goodness=lambda h: h.square().mean(1), device="cpu", precision="fp32"
    )
    torch.testing.assert_close(g, told)


def test_plain_descent_keeps_nothing_of_the_last_step():
    weight, by_hand = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0])
    optimiser = OPTIMIZERS["plain_sgd"]([weight], [weight], 0.1)
    for grad in (torch.tensor([1.0, -1.0]), torch.tensor([0.5, 0.5])):
        optimiser.accumulate(0, grad)
        optimiser.step(0.1)
        by_hand = by_hand - 0.1 * (grad + 0.1 * by_hand)
    torch.testing.assert_close(weight, by_hand)


def test_cosine_falls_from_one_to_near_zero():
    factors = [LR_SCHEDULES["cosine"](e, 10) for e in range(10)]
    assert factors[0] == 1 and factors[5] == pytest.approx(0.5) and 0 < factors[-1] < 0.03
    assert factors == sorted(factors, reverse=True)


def test_a_probe_reads_pooled_maps(digits):
    network = conv(digits.shape, (8,), pool=0, pooled=4)
    assert 0 < linear_probe(network, digits, neutral_label=False, device="cpu")["test"]["layer_1"] < 15
