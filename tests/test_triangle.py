"Layers that hand on what lies above the mean: whatever goes up a network reads the same numbers."

import pytest
import torch

from ff_research.backprop import train_backprop
from ff_research.checks import PRECISIONS
from ff_research.diagnostics import diagnose
from ff_research.goodness import sum_of_squares
from ff_research.labels import labelled, neutral, overlay
from ff_research.layers import hand_on, prepare, product, standardise
from ff_research.learners import FusedLearner
from ff_research.network import Network, activities
from ff_research.objectives import hinton
from ff_research.readout import features, label_goodness
from ff_research.strategies import STRATEGIES, make_strategy
from ff_research.streams import Streams
from ff_research.training import train

QUIET = dict(precision="fp32", device="cpu", progress=False)


def written_out(network, x):
    "Goodness and handed-on activity of each layer for images `[batch, …]`, from the definition, in float64."
    t, out = x.flatten(1).double(), []
    t = (t - t.mean(1, keepdim=True)) / t.std(1, keepdim=True, correction=0)
    for layer in network.layers:
        z = t @ layer.weight.double().T + layer.bias.double()
        t = (z - z.mean(1, keepdim=True)).clamp(min=0)
        t = (t - t.mean(1, keepdim=True)) / t.std(1, keepdim=True, correction=0)
        out.append((z.clamp(min=0).square().sum(1), t))
    return out


@pytest.fixture
def network():
    network = Network([64, 30, 20, 25], seed=3, triangle=True)
    for layer in network.layers:  # biases that matter
        layer.bias.data.uniform_(-1, 1, generator=torch.Generator().manual_seed(1))
    return network


@pytest.fixture
def images():
    return torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_read_outs_and_forward_see_the_triangle(network, images):
    truth = written_out(network, images)
    for (goodness, t), raw, handed, feature in zip(
        truth,
        activities(network, images, normalised=False),
        activities(network, images),
        features(network, images, precision="fp32", device="cpu"),
    ):
        assert torch.allclose(sum_of_squares(raw).double(), goodness, rtol=1e-5)
        assert torch.allclose(handed.double(), t, atol=1e-4) and torch.allclose(feature.double(), t, atol=1e-4)
    assert torch.allclose(network(images).double(), truth[-1][1], atol=1e-4)


@pytest.mark.parametrize("triangle", [True, False])
@pytest.mark.parametrize("power", [2, 1.5])
def test_read_outs_may_raise_activities_to_a_power(power, triangle, network, images):
    "Each layer still reads what it reads without the power."
    if not triangle:
        network = Network([64, 30, 20, 25], seed=3)
    plain = activities(network, images)
    for i, (layer, sharp) in enumerate(zip(network.layers, activities(network, images, power=power))):
        x = network.prepare(images) if i == 0 else plain[i - 1]
        z = x.double() @ layer.weight.double().T + layer.bias.double()
        if triangle:
            t = (z - z.mean(1, keepdim=True)).clamp(min=0) ** power
            t = (t - t.mean(1, keepdim=True)) / t.std(1, keepdim=True, correction=0)
        else:
            t = z.clamp(min=0) ** power
            t = t / t.square().mean(1, keepdim=True).sqrt()
        assert torch.allclose(sharp.double(), t, atol=1e-4)
    read = features(network, images, power=power, precision="fp32", device="cpu")
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(read, activities(network, images, power=power)))
    assert all(torch.equal(a, b) for a, b in zip(activities(network, images, power=1), plain))
    with pytest.raises(ValueError, match="normalised=True"):
        features(network, images, normalised=False, power=power)


def test_labels_are_read_from_the_same_layers(network, images):
    found = label_goodness(network, images, 4, first=2, precision="fp32", device="cpu")
    for k in range(4):
        truth = written_out(network, overlay(images, torch.full((40,), k), 4))
        assert torch.allclose(found[:, k].double(), truth[1][0] + truth[2][0], rtol=1e-4)


@pytest.mark.parametrize("precision, close", [("fp32", 1e-5), ("bf16", 0.03)])
@torch.no_grad()
def test_a_layer_that_learns_hands_on_the_triangle_of_before_its_step(network, images, precision, close):
    layer, x = network.layers[0], prepare(images, 64, PRECISIONS[precision], "standardised")
    learner = FusedLearner(layer, hinton(), "sgd", 0.01, 0.0, precision)
    expected = hand_on(learner.twin, learner.twin(x)).clone()
    before = layer.weight.clone()
    learner.activity([x])
    learner.learn(Streams(x, None, (20, 20)))
    handed = learner.hand_on()
    assert (handed - expected).float().square().mean().sqrt() < close and not torch.equal(layer.weight, before)
    assert torch.allclose(handed.float().mean(1), torch.zeros(40), atol=0.01)


def test_shared_pixels_are_standardised_like_images_written_out(images):
    y = torch.arange(40) % 10
    shared, written = (
        prepare(labelled(images, torch.stack([y, (y + 1) % 10]), 10), 64, how="standardised"),
        [overlay(images, y, 10), overlay(images, (y + 1) % 10, 10)],
    )
    weight = torch.randn(7, 64, generator=torch.Generator().manual_seed(2))
    dense = torch.cat([standardise(x.flatten(1)) for x in written])
    assert torch.allclose(product(shared, weight, torch.zeros(7)), dense @ weight.T, atol=1e-4)
    assert torch.allclose(
        prepare(neutral(images, 10), 64, how="standardised"), standardise(neutral(images, 10).flatten(1)), atol=1e-6
    )


@pytest.mark.parametrize(
    "schedule, collaboration", [("together", None), ("together", "all"), ("greedy", None), ("greedy", "all")]
)
def test_every_schedule_trains_such_layers(schedule, collaboration, digits):
    network = Network([64, 60, 60], seed=0, triangle=True)
    history = train(
        network,
        digits,
        make_strategy("label_embedding", 10),
        epochs=6,
        lr=3e-3,
        batch_size=50,
        schedule=schedule,
        collaboration=collaboration,
        **QUIET,
    )
    assert min(history.epochs[-1]["separation"]) > 0.65  # chance is 0.5


def test_backpropagation_passes_through_the_triangle(digits):
    network = Network([64, 60, 60], seed=0, triangle=True)
    losses = [epoch["loss"][0] for epoch in train_backprop(network, digits, epochs=5, batch_size=50, **QUIET).epochs]
    assert losses[-1] < 0.5 * losses[0]


def test_own_layers_have_no_triangle():
    class Own(torch.nn.Linear):
        units = 3

    with pytest.raises(ValueError, match="triangle"):
        Network([Own(4, 3)], triangle=True)


@pytest.mark.parametrize("precision, close", [("fp32", 1e-5), ("bf16", 0.05)])
@pytest.mark.parametrize("name", ["image_mixing", "self_contrastive", "label_embedding"])
def test_training_reads_images_as_the_read_outs_do(name, precision, close, digits):
    seen = {}

    class Watched(STRATEGIES[name]):
        def streams(self, *args):
            seen["inputs"] = super().streams(*args)
            return seen["inputs"]

        def before(self, s, height, top, generator):
            if height == 2:
                seen["handed"] = s.x.clone()
            return s

    strategy = Watched(10)
    network = Network([64, 60, 30], seed=0, triangle=True)
    train(network, digits, strategy, epochs=1, lr=0.0, batch_size=50, precision=precision, device="cpu", progress=False)
    expected = activities(network, seen["inputs"])[0]
    assert (seen["handed"].float() - expected).square().mean().sqrt() < close


def test_diagnostics_draw_the_untrained_network_in_the_same_form(digits):
    "An untrained network is as hard to tell apart as itself, and not as one that hands on something else."
    strategy = make_strategy("image_mixing", 10)
    for triangle in (True, False):
        start = Network([64, 30, 20, 25], seed=3, triangle=triangle)
        found = diagnose(start, digits, strategy, seed=3, precision="fp32", device="cpu")
        assert found["negatives"]["hardness_untrained"] == found["layers"]["overlap"]
    other = Network([64, 30, 20, 25], seed=3, triangle=True)
    found = diagnose(other, digits, strategy, seed=4, precision="fp32", device="cpu")
    assert found["negatives"]["hardness_untrained"] != found["layers"]["overlap"]
