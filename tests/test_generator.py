"""Learned negatives: what a generator makes, that it learns from one layer alone, that it is saved and resumed, and what
becomes of it.
"""

from dataclasses import replace

import pytest
import torch

import ff_research as ff
from ff_research.convolution import conv
from ff_research.data import as_float
from ff_research.generator import GeneratorStrategy, goodness_of, packed, unpacked, watch
from ff_research.measures import measure
from ff_research.network import Network
from ff_research.recipes import RECIPES, load_recipes
from ff_research.strategies import STRATEGIES, make_strategy
from ff_research.training import train

QUIET = dict(precision="fp32", device="cpu", progress=False, batch_size=50)
KINDS = [dict(makes=makes, each=each) for makes in ("images", "masks") for each in (False, True)]
each_kind = pytest.mark.parametrize("options", KINDS, ids=str)


@pytest.fixture(scope="module")
def few(digits):
    return replace(digits, x_train=digits.x_train[:200], y_train=digits.y_train[:200])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_it_is_registered():
    assert ff.STRATEGIES["generator"] is GeneratorStrategy is STRATEGIES["generator"]
    assert repr(make_strategy("generator", 10, makes="masks")).startswith("GeneratorStrategy(10, makes='masks', each=F")


@each_kind
def test_negatives_are_images_and_the_network_stays_as_it_is(options, digits):
    x, y, network = digits.x_train[:20], digits.y_train[:20], Network([64, 12, 12])
    strategy, kept, state = GeneratorStrategy(10, **options), x.clone(), torch.get_rng_state()
    before = [p.clone() for p in network.parameters()]
    for asked in (None, network):
        strategy.begin(network, x[:2])
        made = strategy.generate(x, y, asked, seeded())
        assert made.shape == x.shape and made.dtype == torch.float32 and not made.requires_grad
        assert 0 <= made.min() and made.max() <= 1 and (made != as_float(x)).flatten(1).any(1).all()
        assert torch.equal(made, GeneratorStrategy(10, **options).generate(x, y, None, seeded()))
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters()))
    assert torch.equal(x, kept) and torch.equal(torch.get_rng_state(), state)


def test_a_mask_mixes_two_images(digits):
    x, strategy = as_float(digits.x_train[:10]), GeneratorStrategy(10, makes="masks")
    strategy.begin(Network([64, 5]), x[:2])
    strategy.weights.zero_()  # a mask of one half everywhere
    made = strategy.generate(x, digits.y_train[:10], None, seeded())
    shifts = [(x + x.roll(-k, 0)) / 2 for k in range(1, 10)]
    assert any(torch.allclose(made, mixed) for mixed in shifts)


def test_a_step_is_adam_on_the_loss(digits):
    "One update against torch's Adam on the same loss, written out."
    x, network = as_float(digits.x_train[:20]), Network([64, 30, 30])
    strategy, other = GeneratorStrategy(10, lr=0.01), GeneratorStrategy(10, lr=0.01)
    strategy.begin(network, x[:2])
    other.begin(network, x[:2])
    weights = other.weights.clone().requires_grad_()
    adam, generator = torch.optim.Adam([weights], lr=0.01), seeded(1)
    for _ in range(3):
        z = torch.randn(20, 64, generator=generator)
        made = other.made(weights, z, x, None, 1)
        h, real = (network.layers[0](network.prepare(rows)).square().sum(1) for rows in (made, x))
        loss = torch.nn.functional.softplus(4 - 4 * h / real.mean().detach()).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    generator = seeded(1)
    for _ in range(3):
        strategy.generate(x, digits.y_train[:20], network, generator)
    torch.testing.assert_close(strategy.weights, weights.detach(), rtol=1e-4, atol=1e-5)


@each_kind
def test_layers_and_their_generator_know_nothing_of_what_stands_above(options, few):
    found = []
    for last in (20, 30):
        network, strategy = Network([64, 25, 25, last]), GeneratorStrategy(10, **options)
        train(network, few, strategy, 1, lr=1e-3, **QUIET)
        ends = strategy.places[1 if options["each"] else 0].stop  # up to the generator of layer 2
        found.append([p for layer in network.layers[:2] for p in layer.parameters()] + [strategy.weights[:ends]])
    assert all(torch.equal(a, b) for a, b in zip(*found))


@each_kind
def test_a_run_that_was_stopped_goes_on_bit_for_bit(options, few, tmp_path):
    class Stopped(Exception):
        pass

    def die(epoch, network):
        raise Stopped

    how, path = QUIET | dict(epochs=2, lr=1e-3), tmp_path / "run.safetensors"
    whole, first, second = (Network([64, 25, 25]) for _ in range(3))
    train(whole, few, GeneratorStrategy(10, **options), **how)
    with pytest.raises(Stopped):
        train(first, few, GeneratorStrategy(10, **options), checkpoint=path, after_epoch=die, **how)
    train(second, few, GeneratorStrategy(10, **options), checkpoint=path, **how)
    a, b = whole.state_dict(), second.state_dict()
    assert "strategy.weights" in a and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_it_is_saved_with_its_network(few, tmp_path):
    network = Network([64, 25, 25])
    train(network, few, GeneratorStrategy(10, "masks"), 1, **QUIET)
    ff.fit_readout(network, few, device="cpu", precision="fp32")
    ff.save(network, tmp_path / "n.safetensors")
    again = ff.load_network(tmp_path / "n.safetensors")
    made = [n.strategy.generate(few.x_test, few.y_test, None, seeded()) for n in (network, again)]
    assert torch.equal(*made)


@pytest.mark.parametrize("options", KINDS[:3], ids=str)
def test_convolutions_take_it_too(options, few):
    network = conv((1, 8, 8), [6, 6], pool=2)
    before = network.layers[1].conv.weight.clone()
    train(network, few, GeneratorStrategy(10, **options), 1, lr=1e-3, **QUIET)
    assert not torch.equal(before, network.layers[1].conv.weight)


def test_what_does_not_fit_is_said(digits, few):
    for options, words in (
        (dict(makes="mask"), "did you mean 'masks'"),
        (dict(noise=0), "noise=0"),
        (dict(lr=1.5), "lr=1.5"),
    ):
        with pytest.raises(ValueError, match=words):
            GeneratorStrategy(10, **options)
    with pytest.raises(ValueError, match="no second image"):
        GeneratorStrategy(10).generate(digits.x_train[:1], digits.y_train[:1])
    with pytest.raises(ValueError, match="draws negatives between layers"):
        train(Network([64, 9, 9]), few, GeneratorStrategy(10, each=True), 1, collaboration="all", **QUIET)


def test_a_text_gives_its_images_back():
    x = torch.rand(3, 1, 4, 4, generator=seeded())
    assert torch.equal(unpacked(packed(x), (1, 4, 4)), (255 * x).round().byte())


def test_images_lose_their_variety_and_masks_copy(digits):
    found = {}
    for makes in ("images", "masks"):
        network, strategy = Network([64, 100]), GeneratorStrategy(10, makes, lr=3e-3)
        train(network, digits, strategy, 8, lr=1e-3, peer=0.03, **QUIET)
        found[makes] = watch(strategy, digits.x_train[:100])[0]
    hybrid = watch(STRATEGIES["image_mixing"](10), digits.x_train[:100])[0]
    assert found["images"]["variety"] < 0.3 and found["masks"]["distance"] < hybrid["distance"] / 2, found


def test_the_generator_learns_to_be_loud(digits):
    "Against a layer that stays as it is, its negatives come to have the goodness of real images."
    x, network, strategy = as_float(digits.x_train[:100]), Network([64, 50]), GeneratorStrategy(10, lr=3e-3)
    strategy.begin(network, x[:2])
    with torch.no_grad():
        real = goodness_of(network, 1, x).mean()
        ratio = [
            (
                goodness_of(network, 1, strategy.generate(x, digits.y_train[:100], network, seeded(i))).mean() / real
            ).item()
            for i in range(60)
        ]
    assert ratio[-1] > max(1.1, 1.2 * ratio[0]), ratio[::10]


def test_its_course_is_a_measure(tmp_path):
    (own,) = load_recipes(write(tmp_path), recipes=RECIPES).values()
    row = measure("negatives", own, 0, folder=tmp_path, device="cpu", precision="fp32")
    course = row["negatives"]["course"]
    assert [entry["epoch"] for entry in course] == [0, 1, 2]
    assert unpacked(course[0]["images"], (8, 8)).shape == (8, 8, 8)
    with pytest.raises(ValueError, match="no negatives to look at"):
        measure("negatives", "digits-mono-forward", 0, folder=tmp_path, device="cpu", precision="fp32")


def write(folder):
    path = folder / "mine.toml"
    path.write_text('[mine]\nlike = "generator-digits"\nschedule = { epochs = 2 }\nreadout = { probes = "ridge" }\n')
    return path
