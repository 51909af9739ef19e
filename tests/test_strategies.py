"""Strategies: what all promise on any images, each one's edges, and checkpoints that hold what a strategy learns."""

import copy
import json

import pytest
import torch
from scipy.stats import chisquare

from ff_research import strategies
from ff_research.backprop import train_backprop
from ff_research.data import Images
from ff_research.goodness import symba_loss
from ff_research.labels import overlay
from ff_research.layers import FFLinear, add_product_gradient, normalise, prepare, product
from ff_research.network import Network, ready
from ff_research.objectives import LabelObjective
from ff_research.readout import label_goodness, per_label_goodness
from ff_research.strategies import (
    STRATEGIES,
    LabelEmbeddingStrategy,
    LabelInFrontStrategy,
    MaskingStrategy,
    PlainPositives,
    Strategy,
    blur_matrix,
    blurred_masks,
    make_strategy,
    other_class,
    partners,
    register,
    shifted,
    unlike,
)
from ff_research.streams import Paired, Streams
from ff_research.training import train

TEN = [
    "label_embedding",
    "class_confusion",
    "hard_mining",
    "image_mixing",
    "masking",
    "random_noise",
    "layer_wise",
    "adversarial",
    "self_contrastive",
    "mono_forward",
]
WITH = [name for name in TEN if STRATEGIES[name].has_negatives]
QUIET = dict(lr=3e-3, optimizer="adamw", precision="fp32", device="cpu", progress=False)

OWN = [name for name, cls in STRATEGIES.items() if cls.__module__ == "ff_research.strategies"]
each = pytest.mark.parametrize("name", [*TEN, "all_labels"])
each_with_negatives = pytest.mark.parametrize("name", WITH)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_registry():
    assert sorted(strategies.TEN) == sorted(TEN) and OWN == [*strategies.TEN, "all_labels"]
    assert [name for name in TEN if STRATEGIES[name].contrasts_labels] == TEN[:3]
    assert all(cls.name == name and cls.__doc__ for name, cls in STRATEGIES.items())


# Any images: classes, channels, sizes, dtypes

SHAPES = {
    "digits": (30, 1, 8, 8, 10),
    "letters, colour, not square": (60, 3, 7, 5, 26),
    "one row": (20, 1, 1, 40, 3),
    "two classes, six pixels": (16, 2, 1, 3, 2),
    "a batch of two": (2, 1, 6, 6, 4),
}


def batch(shape, dtype):
    n, channels, height, width, classes = shape
    x = torch.randint(0, 256, (n, channels, height, width), generator=seeded(1), dtype=torch.uint8)
    if dtype != torch.uint8:
        x = x.to(dtype) / 255
    return x, torch.arange(n) % classes, classes


@each
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_promises(name, shape, dtype):
    x, y, classes = batch(shape, dtype)
    network, strategy = Network([x[0].numel(), 12, 9]), make_strategy(name, classes)
    kept, labels, state = x.clone(), y.clone(), torch.get_rng_state()
    positive = strategy.create_positive(x, y)
    streams = strategy.streams(x, y, network, seeded())
    assert positive.shape == x.shape and positive.dtype == torch.float32
    assert streams.sizes == (len(x),) * (classes if strategy.many_negatives else 1 + strategy.has_negatives)
    assert streams.x.shape == (sum(streams.sizes), *x.shape[1:]) and torch.equal(streams.y, y)
    assert positive.data_ptr() != x.data_ptr()
    if strategy.has_negatives:
        for asked in (network, None):
            negative = strategy.generate(x, y, asked, seeded())
            assert negative.shape == x.shape and negative.dtype == torch.float32 and not negative.requires_grad
            assert 0 <= negative.min() and negative.max() <= 1
            assert (negative != positive).flatten(1).any(1).all()
            negative.zero_()
    positive.zero_()
    assert torch.equal(x, kept) and torch.equal(y, labels) and torch.equal(torch.get_rng_state(), state)


@each_with_negatives
def test_same_seed_same_negatives(name, digits):
    x, y, network = digits.x_train[:50], digits.y_train[:50], Network([64, 20, 20])
    draws = [make_strategy(name, 10).generate(x, y, network, seeded(seed)) for seed in (3, 3, *range(4, 10))]
    assert torch.equal(draws[0], draws[1])
    assert name == "adversarial" or not all(torch.equal(draws[0], other) for other in draws[2:])


def test_no_two_strategies_are_one(digits):
    x, y, network = digits.x_train[:50], digits.y_train[:50], Network([64, 20, 20])
    made = {}
    for name in WITH:
        strategy = make_strategy(name, 10)
        if name == "hard_mining":
            strategy.begin(network, x[:2])
            strategy.bias += torch.arange(10.0)
        made[name] = strategy.generate(x, y, network, seeded(3))
    assert not [(a, b) for i, a in enumerate(WITH) for b in WITH[:i] if torch.equal(made[a], made[b])]


# Odd batches

COPES = ("label_embedding", "all_labels", "hard_mining", "adversarial")  # with blank images and with a single one


@each_with_negatives
@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_blank_batches(name, value):
    x, y, network = torch.full((6, 1, 8, 8), value), torch.arange(6), Network([64, 20, 20])
    strategy = make_strategy(name, 10)
    if name in COPES:
        for asked in (network, None):
            assert (strategy.generate(x, y, asked, seeded()) != strategy.create_positive(x, y)).flatten(1).any(1).all()
    else:
        with pytest.raises(ValueError, match="blank"):
            strategy.generate(x, y, network, seeded())


@each_with_negatives
def test_some_blank_images_are_no_reason_to_stop(name, digits):
    x = digits.x_train[:12].clone()
    x[:4] = 0
    strategy, y = make_strategy(name, 12), torch.arange(12)
    for seed in range(20):
        negative = strategy.generate(x, y, None, seeded(seed))
        assert (negative != strategy.create_positive(x, y)).flatten(1).any(1).all()


@each
def test_batch_of_one(name, digits):
    x, y, network = digits.x_train[:1], digits.y_train[:1], Network([64, 20, 20])
    strategy = make_strategy(name, 10)
    if name in COPES or name == "mono_forward":
        assert strategy.streams(x, y, network, seeded()) is not None
    else:
        for call in (strategy.streams, strategy.generate):
            with pytest.raises(ValueError, match="no second image"):
                call(x, y, network, seeded())


def test_a_batch_of_one_is_named_in_training(digits):
    three = Images("three", digits.x_train[:3], digits.y_train[:3], digits.x_test, digits.y_test, 10)
    with pytest.raises(ValueError, match="batch_size that leaves at least two"):
        train(Network([64, 9]), three, make_strategy("image_mixing", 10), epochs=1, batch_size=1, **QUIET)
    train(Network([64, 9]), three, make_strategy("image_mixing", 10), epochs=1, batch_size=2, **QUIET)


def test_one_class_only(digits):
    with pytest.raises(ValueError, match="same class"):
        make_strategy("class_confusion", 10).generate(digits.x_train[:5], torch.full((5,), 4), None, seeded())


# Parts


def test_other_class_reaches_everyone_and_no_one_else():
    y = torch.tensor([5, 0, 5, 2, 0, 5, 9])
    seen = [set() for _ in y]
    for seed in range(200):
        for i, j in enumerate(other_class(y, seeded(seed)).tolist()):
            seen[i].add(j)
    assert seen == [{j for j in range(7) if y[j] != y[i]} for i in range(7)]


def test_unlike_redraws_only_what_it_must():
    positive, calls = torch.zeros(3, 1, 2, 2), []

    def draw():
        calls.append(1)
        out = torch.full((3, 1, 2, 2), float(len(calls)))
        if len(calls) < 3:
            out[1] = 0  # equal twice
        return out

    assert unlike(positive, draw)[:, 0, 0, 0].tolist() == [1, 3, 1] and len(calls) == 3
    with pytest.raises(ValueError, match="image 0 of the batch"):
        unlike(positive, lambda: positive + 1e-8)


@pytest.mark.parametrize("size", [1, 2, 3, 17])
def test_blur_keeps_mean_and_forgets(size):
    step = blur_matrix(size, 1)
    assert torch.allclose(step.sum(1), torch.ones(size)) and torch.equal(step, step.T)
    assert torch.allclose(blur_matrix(size, 3000), torch.full((size, size), 1 / size), atol=1e-3)
    assert torch.equal(blur_matrix(size, 0), torch.eye(size))


def test_masks_are_balanced_even_where_ties_are_frequent():
    for height, width, blurs in ((1, 1, 1), (3, 5, 1), (8, 8, 1), (8, 8, 2)):
        share = blurred_masks(40_000 // (height * width), height, width, blurs, generator=seeded()).float().mean()
        assert abs(share - 0.5) < 0.02, (height, width, blurs)


def test_mixing_takes_whole_pixels_of_all_channels():
    x = torch.rand(9, 3, 10, 10, generator=seeded())
    own = make_strategy("image_mixing", 2).generate(x, None, None, seeded(1)) == x
    assert torch.equal(own.all(1), own.any(1)) and 0.2 < own.float().mean() < 0.8


@pytest.mark.parametrize("push, image, expected", [(1, 1.0, 0.8), (-1, 0.0, 0.2), (1, 0.0, 0.2), (-1, 1.0, 0.8)])
def test_adversarial_never_stands_still(push, image, expected):
    strategy = make_strategy("adversarial", 10)
    strategy.direction = lambda x, network, generator=None: torch.full_like(x, push)
    assert torch.allclose(strategy.generate(torch.full((2, 1, 4, 4), image), None), torch.full((2, 1, 4, 4), expected))


def test_adversarial_is_a_plain_cut_where_anything_moves():
    strategy = make_strategy("adversarial", 10)
    strategy.direction = lambda x, network, generator=None: torch.ones_like(x)
    moved = strategy.generate(torch.tensor([0.0, 1.0, 0.95, 0.4]).view(1, 1, 2, 2), None)
    assert torch.allclose(moved.flatten(), torch.tensor([0.2, 1.0, 1.0, 0.6]))


def test_adversarial_direction_is_the_gradient_of_layer_one(digits):
    network, x, i = Network([64, 30, 20]).double(), (digits.x_train[:3].double() / 255), 0
    direction = make_strategy("adversarial", 10).direction(x, network)

    def goodness(images):
        with torch.no_grad():
            return network.layers[0](network.prepare(images)).square().sum(1)

    for pixel in range(0, 64, 5):
        nudge = torch.zeros(64, dtype=torch.float64)
        nudge[pixel] = 1e-5
        difference = goodness(x + nudge.view(1, 1, 8, 8)) - goodness(x - nudge.view(1, 1, 8, 8))
        assert torch.equal(direction.flatten(1)[:, pixel].double(), difference.sign())
        i += 1
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize("epsilon", [0.0, -0.1, 1.5, float("nan")])
def test_adversarial_refuses_steps_out_of_range(epsilon):
    with pytest.raises(ValueError, match="expected a step above 0"):
        make_strategy("adversarial", 10, epsilon=epsilon)


def test_hard_mining_learns_its_own_head_and_nothing_else(digits):
    network, strategy = Network([64, 40, 40]), make_strategy("hard_mining", 10)
    x, y = digits.x_train[:300], digits.y_train[:300]
    strategy.begin(network, x[:2])
    before = [p.detach().clone() for p in network.parameters()]
    f, losses = strategy.features(x, network), []
    weight, bias = torch.zeros(40, 10, requires_grad=True), torch.zeros(10, requires_grad=True)
    for step in range(30):
        loss = torch.nn.functional.cross_entropy(f @ weight + bias, y)
        losses.append(loss.item())
        grads = torch.autograd.grad(loss, [weight, bias])
        with torch.no_grad():
            for p, g in zip((weight, bias), grads):
                p -= 2.0 / 40 * g
        assert not (strategy.hard_labels(x, y, network, seeded(step)) == y).any()
        assert torch.allclose(strategy.weight, weight, atol=1e-5) and torch.allclose(strategy.bias, bias, atol=1e-5)
    assert losses == sorted(losses, reverse=True)
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters()))


def test_hard_mining_begins_anew_for_each_training(digits):
    "One strategy object for several runs gives what several objects give."

    def weights(strategy):
        network = Network([64, 20, 20])
        train(network, digits, strategy, epochs=1, **QUIET)
        return network.layers[1].weight

    shared = make_strategy("hard_mining", 10)
    weights(shared)
    assert torch.equal(weights(shared), weights(make_strategy("hard_mining", 10)))


# Pairs


@pytest.fixture
def pair():
    return Paired(
        normalise(torch.rand(20, 12, generator=seeded(), dtype=torch.float64)), partners(20, generator=seeded(1))
    )


def test_paired_product_and_gradients(pair):
    g = seeded(2)
    weight, bias = (
        torch.randn(7, 12, generator=g, dtype=torch.float64, requires_grad=True),
        torch.randn(7, generator=g, dtype=torch.float64),
    )
    dense, dz = pair.dense() @ weight.T + bias, torch.randn(40, 7, generator=g, dtype=torch.float64)
    (oracle,) = torch.autograd.grad(dense, weight, dz)
    (through,) = torch.autograd.grad(product(pair, weight, bias), weight, dz)
    out, total = torch.empty(40, 7, dtype=torch.float64), torch.randn(7, 12, generator=g, dtype=torch.float64)
    expected = 0.9 * total + oracle
    assert torch.allclose(product(pair, weight.detach(), bias, out=out), dense) and torch.allclose(out, dense)
    assert torch.allclose(through, oracle)
    assert torch.allclose(add_product_gradient(dz, pair, total, keep=0.9), expected) and torch.allclose(total, expected)
    assert torch.allclose(add_product_gradient(dz, pair, torch.full_like(total, torch.nan), keep=0.0), oracle)


def test_paired_prepare(digits):
    x, partner = digits.x_train[:40], partners(40, generator=seeded())
    plain, centred = (prepare(Paired(x, partner), 64, how=how) for how in ("normalised", "standardised"))
    assert torch.allclose(plain.images, Network([64, 5]).prepare(x))  # training reads what the read-out reads
    assert torch.allclose(centred.images.mean(1), torch.zeros(40), atol=1e-6)
    assert torch.allclose(centred.images.std(1, correction=0), torch.ones(40), atol=1e-4)
    assert prepare(Paired(x, partner)).dense().shape == (80, 1, 8, 8)
    with pytest.raises(ValueError, match="64 pixels"):
        prepare(Paired(x, partner), 65)


@pytest.mark.parametrize("repair", [False, True])
@pytest.mark.parametrize("triangle", [False, True])
def test_self_contrastive_trains_with_every_option(repair, triangle, digits):
    history = train(
        Network([64, 40, 40], triangle=triangle),
        digits,
        make_strategy("self_contrastive", 10, repair=repair),
        epochs=3,
        **QUIET,
    )
    assert min(history.column("separation")[-1]) > 0.6


# Names and classes of one's own


@pytest.mark.parametrize(
    "wrong, near",
    [("hard-mining", "hard_mining"), ("mono", "mono_forward"), ("maskin", "masking"), ("image mixing", "image_mixing")],
)
def test_unknown_names_are_answered_with_the_nearest(wrong, near):
    with pytest.raises(ValueError, match=f"unknown strategy '{wrong}'; did you mean '{near}'"):
        make_strategy(wrong, 10)


def test_register_refuses_missing_and_taken_names():
    class Nameless(Strategy):
        pass

    class Thief(PlainPositives):
        name = "masking"

    class Heir(LabelEmbeddingStrategy):
        "Forgot to give a name of its own."

    for cls in (Nameless, Thief, Heir):
        with pytest.raises(ValueError, match=cls.__name__):
            register(cls)
    assert STRATEGIES["masking"] is MaskingStrategy and register(MaskingStrategy) is MaskingStrategy
    assert STRATEGIES["label_embedding"] is LabelEmbeddingStrategy


def test_unwritten_methods_say_their_name(digits):
    for method in ("create_positive", "generate"):
        with pytest.raises(NotImplementedError, match=f"Strategy has no {method}"):
            getattr(Strategy(10), method)(digits.x_train[:2], digits.y_train[:2])


def test_options_are_printed():
    assert repr(make_strategy("label_embedding", 10)) == "LabelEmbeddingStrategy(10)"
    assert repr(make_strategy("adversarial", 10, epsilon=0.1)) == "AdversarialStrategy(10, epsilon=0.1)"
    assert "repair=True" in repr(make_strategy("self_contrastive", 10, repair=True))


# Training


@each
def test_train_leaves_torchs_generator_and_the_images_alone(name, digits):
    state, x = torch.get_rng_state(), digits.x_train.clone()
    train(Network([64, 20, 20]), digits, make_strategy(name, 10), epochs=1, **QUIET)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(digits.x_train, x)


@each
def test_greedy(name, digits):
    strategy, network = make_strategy(name, 10), Network([64, 20, 20])
    assert len(train(network, digits, strategy, epochs=1, schedule="greedy", **QUIET)) == 2
    first = Network([64, 20])
    train(first, digits, make_strategy(name, 10), epochs=1, schedule="greedy", **QUIET)
    assert torch.equal(first.layers[0].weight, network.layers[0].weight)


@pytest.mark.parametrize(
    "name", [name for name in OWN if STRATEGIES[name](10).redraws or STRATEGIES[name].many_negatives]
)
@pytest.mark.parametrize("triangle", [False, True])
def test_a_frozen_layer_is_one_whose_rate_is_0(name, triangle, digits):
    "No epoch for the first layer and three for the second: what both layers do together if the first one's rate is 0."
    options = QUIET | dict(weight_decay=0.0, seed=3)
    one, other = (Network([64, 20, 20], triangle=triangle) for _ in range(2))
    train(one, digits, make_strategy(name, 10), epochs=(0, 3), schedule="greedy", **options | dict(lr=0.01))
    train(other, digits, make_strategy(name, 10), epochs=3, **options | dict(lr=(0.0, 0.01)))
    start = Network([64, 20, 20], triangle=triangle)
    assert torch.equal(one.layers[0].weight, start.layers[0].weight) and not torch.equal(
        one.layers[1].weight, start.layers[1].weight
    )
    assert all(torch.equal(a, b) for a, b in zip(one.layers.parameters(), other.layers.parameters()))


@pytest.mark.parametrize("mode", ["all", "previous"])
def test_many_negatives_and_the_goodness_of_frozen_layers(mode, digits):
    """One step of the second of two layers, which receives the frozen one's goodness under every label, against
    autograd.
    """
    strategy, network = make_strategy("all_labels", 10), Network([64, 20, 15])
    start = copy.deepcopy(network)
    few = Images("few", digits.x_train[:60], digits.y_train[:60], digits.x_test, digits.y_test, 10)
    options = QUIET | dict(lr=0.1, optimizer="sgd", weight_decay=0.0, batch_size=60)
    train(network, few, strategy, epochs=(0, 1), schedule="greedy", collaboration=mode, **options)
    s = ready(start, strategy.streams(few.x_train, few.y_train))
    h_1 = start.layers[0](s.x).detach()
    h_2, own = start.layers[1](normalise(h_1)), strategy.objective(start.layers[0], 1)
    loss, _ = strategy.objective(start.layers[1], 2)(h_2, s, own.goodness(h_1))
    grads = torch.autograd.grad(loss, list(start.layers[1].parameters()))
    for p, grad, mine in zip(start.layers[1].parameters(), grads, network.layers[1].parameters()):
        torch.testing.assert_close(mine.detach(), p.detach() - 0.1 * grad, rtol=1e-3, atol=1e-5)
    plain = strategy.objective(start.layers[1], 2)(h_2.detach(), s)[0]
    assert not torch.allclose(loss.detach(), plain)  # what it receives matters


@each
def test_bf16_trains(name, digits):
    history = train(Network([64, 40, 40]), digits, make_strategy(name, 10), epochs=1, **QUIET | dict(precision="bf16"))
    assert all(loss == loss for loss in history.column("loss")[-1])


class Killed(Exception):
    pass


def run(name, images, checkpoint=None, stop=None, **options):
    "A short run: every number that it leaves behind. `stop`: break off in this batch."
    strategy, network, count = make_strategy(name, 10, **options), Network([64, 24, 24]), 0
    if stop is not None:
        streams = strategy.streams

        def counted(*arguments):
            nonlocal count
            count += 1
            if count > stop:
                raise Killed
            return streams(*arguments)

        strategy.streams = counted
    history = train(network, images, strategy, epochs=3, seed=4, checkpoint=checkpoint, **QUIET)
    tensors = network.state_dict() | {f"strategy.{key}": value for key, value in strategy.state_dict().items()}
    return tensors, json.dumps([epoch | dict(seconds=0) for epoch in history.epochs])


@pytest.mark.parametrize(
    "name, options", [*((name, {}) for name in TEN), ("self_contrastive", dict(repair=True))], ids=str
)
def test_resumed_equals_unbroken(name, options, digits, tmp_path):
    part = Images("part", digits.x_train[:300], digits.y_train[:300], digits.x_test, digits.y_test, 10)
    path, unbroken = tmp_path / "run.safetensors", run(name, part, **options)
    with pytest.raises(Killed):
        run(name, part, path, stop=7, **options)  # in the third epoch of three batches
    resumed = run(name, part, path, **options)
    assert resumed[0].keys() == unbroken[0].keys() and all(
        torch.equal(resumed[0][key], unbroken[0][key]) for key in unbroken[0]
    )
    assert resumed[1] == unbroken[1]
    assert name != "hard_mining" or resumed[0]["strategy.weight"].abs().sum() > 0


def test_a_checkpoint_of_other_options_is_refused(digits, tmp_path):
    path = tmp_path / "run.safetensors"
    run("adversarial", digits, path)
    with pytest.raises(ValueError, match="epsilon=0.1"):
        run("adversarial", digits, path, epsilon=0.1)


def test_positives_of_label_strategies_are_overlays(digits):
    x, y = digits.x_train[:20], digits.y_train[:20]
    for name in TEN[:3]:
        assert torch.equal(make_strategy(name, 10).create_positive(x, y), overlay(x, y, 10))


# SCFF on two views of an image


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_shifted_images_are_their_own_pixels_moved_with_zeros_behind(dtype):
    x = (torch.randint(1, 256, (400, 2, 5, 7), generator=seeded(2), dtype=torch.uint8)).to(dtype)
    moved, seen = shifted(x, 2, seeded(3)), set()
    for one, image in zip(moved, x):
        fits = []
        for down in range(-2, 3):
            for right in range(-2, 3):
                expected = torch.zeros_like(image)
                rows, columns = (slice(max(0, d), n + min(0, d)) for d, n in ((down, 5), (right, 7)))
                from_rows, from_columns = (slice(max(0, -d), n + min(0, -d)) for d, n in ((down, 5), (right, 7)))
                expected[:, rows, columns] = image[:, from_rows, from_columns]
                if torch.equal(one, expected):
                    fits.append((down, right))
        assert len(fits) == 1
        seen.update(fits)
    assert len(seen) == 25
    assert moved.dtype == dtype and torch.equal(shifted(x, 0, seeded()), x)
    assert torch.equal(moved, shifted(x, 2, seeded(3))) and not torch.equal(moved, shifted(x, 2, seeded(4)))


@pytest.mark.parametrize("most", [-1, 5, 1.5])
def test_a_shift_stays_within_the_image(most):
    with pytest.raises(ValueError, match="shift="):
        shifted(torch.zeros(3, 1, 5, 7), most)


def test_scff_with_views_pairs_two_views_of_one_image_and_learns(digits):
    scff = make_strategy("self_contrastive", 10, shift=1)
    x, y = digits.x_train[:50], digits.y_train[:50]
    pair = scff.streams(x, y, generator=seeded()).x
    assert not torch.equal(pair.images, x) and not torch.equal(pair.images, pair.others)
    made = prepare(pair, 64, torch.float64, "standardised")
    assert torch.allclose(made.images.mean(1), torch.zeros(50, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(
        made.dense(), torch.cat([(made.images + made.others) / 2, (made.images + made.others[made.partner]) / 2])
    )
    network = Network([64, 40, 40], seed=0, triangle=True)
    history = train(network, digits, scff, epochs=3, **QUIET)
    assert history.epochs[-1]["loss"][0] < history.epochs[0]["loss"][0]
    with pytest.raises(ValueError, match="shift=8"):
        train(network, digits, make_strategy("self_contrastive", 10, shift=8), epochs=1, **QUIET)


# All labels at once


@pytest.mark.parametrize("classes", [2, 5])
def test_all_labels_is_the_cross_entropy_of_the_read_out(classes, digits):
    """Its loss is that of a softmax classifier whose logits are alpha times the goodness under every label, and its
    streams hold every label once.
    """
    x, y = digits.x_train[:40], digits.y_train[:40] % classes
    strategy, network = make_strategy("all_labels", classes, alpha=7.0), Network([64, 30])
    s = ready(network, strategy.streams(x, y))
    loss, g = strategy.objective(network.layers[0], 1)(network.layers[0](s.x), s)
    goodness = label_goodness(network, x, classes, first=1, precision="fp32", device="cpu")
    assert torch.allclose(loss, torch.nn.functional.cross_entropy(7.0 / 30 * goodness, y), atol=1e-5)
    assert torch.allclose(30 * g[:40, 0], goodness[torch.arange(40), y], rtol=1e-4) and g.shape == (classes * 40, 1)


def test_all_labels_reports_the_share_of_all_pairs(digits):
    strategy, network = make_strategy("all_labels", 10), Network([64, 30])
    few = Images("few", digits.x_train[:60], digits.y_train[:60], digits.x_test, digits.y_test, 10)
    seen = train(network, few, strategy, epochs=1, batch_size=60, **QUIET | dict(lr=0.0)).epochs[0]["separation"][0]
    g = label_goodness(network, few.x_train, 10, first=1, precision="fp32", device="cpu")
    own = g[torch.arange(60), few.y_train]
    assert seen == pytest.approx(((own[:, None] > g).sum() / (9 * 60)).item(), abs=2e-3)


def test_all_labels_with_layer_collaboration(digits):
    history = train(
        Network([64, 30, 30]), digits, make_strategy("all_labels", 10), epochs=2, collaboration="all", **QUIET
    )
    assert history.epochs[-1]["separation"][0] > 0.8
    with pytest.raises(ValueError, match="all_labels gives no pairs"):
        train_backprop(
            Network([64, 20, 20]),
            digits,
            1,
            strategy=make_strategy("all_labels", 10),
            precision="fp32",
            device="cpu",
            progress=False,
        )


# Each strategy against its definition


def as_often_as(counts, expected):
    "Whether draws agree with the expected counts (chi-square)."
    counts, expected = (torch.as_tensor(n).double().numpy() for n in (counts, expected))
    return chisquare(counts, expected * counts.sum() / expected.sum()).pvalue > 1e-4


def test_other_class_draws_uniformly():
    y, draw = torch.tensor([3] * 6 + [1] * 3 + [7])[torch.randperm(10, generator=seeded())], seeded(1)
    drawn = torch.stack([other_class(y, draw) for _ in range(6000)])
    for i in range(10):
        others = torch.bincount(drawn[:, i], minlength=10)[y != y[i]]
        assert others.sum() == 6000 and as_often_as(others, torch.full((len(others),), 6000 / len(others)))


def test_class_confusion_puts_the_label_on_an_image_of_another_class(digits):
    x, y = digits.x_train[:100], digits.y_train[:100]
    negative = make_strategy("class_confusion", 10).generate(x, y, generator=seeded()).flatten(1)
    whose = torch.cdist(negative[:, 10:], x.float().flatten(1)[:, 10:] / (255 if x.dtype == torch.uint8 else 1)).argmin(
        1
    )
    assert torch.equal(negative[:, :10].argmax(1), y) and (y[whose] != y).all()


def test_label_embedding_shares_its_images_and_writes_every_candidate(digits):
    x, y, strategy = digits.x_train[:100], digits.y_train[:100], make_strategy("label_embedding", 10)
    s = strategy.streams(x, y, generator=seeded(1))
    assert torch.equal(
        s.x.dense(), torch.cat([strategy.create_positive(x, y), strategy.generate(x, y, generator=seeded(1))])
    )
    candidates = torch.arange(10)[:, None].expand(-1, 100)
    slow, fast = Strategy.write(strategy, x, candidates), strategy.write(x, candidates)
    assert torch.equal(slow.x, fast.x.dense()) and slow.sizes == fast.sizes == (100,) * 10
    assert torch.allclose(Strategy.write(strategy, x).x, strategy.write(x).x, atol=1e-6)


def test_hard_labels_are_drawn_in_proportion_to_the_heads_belief(digits):
    network, hard = Network([64, 30, 20]), make_strategy("hard_mining", 4)
    x, y = digits.x_train[:1].expand(4000, -1, -1, -1), torch.full((4000,), 2)
    hard.begin(network, digits.x_train[:2])
    hard.bias += torch.tensor([0.5, 0.2, 0.25, 0.05]).log()
    counts = torch.bincount(hard.hard_labels(x, y, network, seeded()), minlength=4)
    assert counts[2] == 0
    assert as_often_as(counts[[0, 1, 3]], 4000 * torch.tensor([0.5, 0.2, 0.05], dtype=torch.float64) / 0.75)


def test_a_trained_head_tempts(digits):
    network, hard = Network([64, 100, 100]), make_strategy("hard_mining", 10)
    train(network, digits, hard, epochs=10, **QUIET)
    wrong = torch.stack([hard.hard_labels(digits.x_train, digits.y_train, network, seeded(s)) for s in range(5)])
    offered = torch.zeros(10, 10).index_put(
        (digits.y_train.repeat(5), wrong.flatten()), torch.ones(wrong.numel()), True
    )
    share = offered / offered.sum(1, keepdim=True)
    assert share.diagonal().max() == 0 and share.max() > 1.5 / 9


@pytest.mark.parametrize("blurs", [1, 3, 10])
def test_blurs_are_padded_filters(blurs):
    bits = torch.rand(5, 1, 28, 9, generator=seeded())
    found = blur_matrix(28, blurs) @ bits @ blur_matrix(9, blurs)
    for _ in range(blurs):
        for axis, pad in ((-2, (0, 0, 1, 1)), (-1, (1, 1, 0, 0))):
            padded = torch.nn.functional.pad(bits, pad, mode="replicate")
            bits = sum(w * padded.narrow(axis, i, bits.shape[axis]) for i, w in enumerate((0.25, 0.5, 0.25)))
    assert torch.allclose(found, bits, atol=1e-6)


def test_a_hybrid_has_one_partner(digits):
    x = digits.x_train[:100]
    hybrid = make_strategy("image_mixing", 10).generate(x, None, generator=seeded()).flatten(1)
    own = make_strategy("image_mixing", 10).create_positive(x, None).flatten(1)
    assert any(((hybrid == own.roll(-shift, 0)) | (hybrid == own)).all() for shift in range(1, 100))


def test_masked_pixels_hold_the_mean(digits):
    strategy, x = make_strategy("masking", 10), digits.x_train[:100]
    one, masked = strategy.create_positive(x, None), strategy.generate(x, None, generator=seeded())
    changed = masked != one
    assert (
        torch.allclose(masked[changed], one.mean(0).expand_as(masked)[changed]) and 0.1 < changed.float().mean() < 0.8
    )


def test_noise_has_the_pixels_mean_and_spread_and_no_correlation():
    grey = 0.5 + 0.05 * torch.randn(4000, 1, 3, 4, generator=seeded()) * torch.linspace(0.2, 2, 12).view(3, 4)
    noise = make_strategy("random_noise", 10).generate(grey, None, generator=seeded(1))
    assert torch.allclose(noise.mean(0), grey.mean(0), atol=0.01) and torch.allclose(
        noise.std(0), grey.std(0), rtol=0.08
    )
    assert (torch.corrcoef(noise.flatten(1).T) - torch.eye(12)).abs().max() < 5 / 4000**0.5


def test_layer_wise_mixes_the_positives_of_each_layer_and_nothing_else(digits):
    wise, y = make_strategy("layer_wise", 10), digits.y_train[:50]
    h = normalise(torch.rand(50, 30, generator=seeded()))
    s = Streams(torch.cat([h, torch.full((50, 30), torch.nan)]), y, (50, 50))
    draw = seeded(1)
    out, again = (wise.before(s, 2, 1, draw).x for _ in range(2))
    assert torch.equal(out[:50], h) and not out.isnan().any() and not torch.equal(out, again)
    assert torch.allclose(out.square().mean(1), torch.ones(100), atol=1e-5)
    assert wise.before(s, 1, 1, draw) is s and wise.redraws
    mixed = wise.mix(torch.arange(20.0)[:, None].expand(20, 3000), draw)
    assert all(len(row.unique()) == 2 for row in mixed)
    assert abs((mixed == torch.arange(20.0)[:, None]).float().mean() - 0.5) < 0.01


def test_scff_is_the_papers_loss_of_concatenated_pairs(digits):
    scff, x, y = make_strategy("self_contrastive", 10), digits.x_train[:100], digits.y_train[:100]
    s = scff.streams(x, y, generator=seeded())
    pair, layer = prepare(s.x, 64), FFLinear(64, 40, generator=seeded())
    loss, g = scff.objective(layer, depth=1)(layer(pair), s)
    G = [
        (pair.images @ layer.weight.T + other @ layer.weight.T + 2 * layer.bias).relu().square().mean(1)
        for other in (pair.images, pair.images[pair.partner])
    ]
    softplus = torch.nn.functional.softplus
    expected = softplus(4.0 - G[0]).mean() + softplus(G[1] - 6.0).mean() + 1e-4 * G[0].mean()
    assert torch.allclose(loss, expected, rtol=1e-5) and torch.allclose(4 * g.squeeze(1), torch.cat(G), rtol=1e-4)


def test_labels_in_front_leave_the_row_alone():
    front, table = LabelInFrontStrategy(3, value=2.0), torch.rand(4, 5, generator=seeded())
    labels = torch.tensor([0, 1, 2, 0])
    assert torch.equal(front.create_positive(table, labels)[:, 3:], table)
    assert torch.equal(front.create_positive(table, labels)[:, :3], 2.0 * torch.nn.functional.one_hot(labels, 3))
    assert (front.generate(table, labels, generator=seeded())[:, :3].argmax(1) != labels).all()
    assert torch.allclose(front.write(table).x[:, :3], torch.full((4, 3), 2 / 3)) and repr(front).endswith("value=2.0)")
    s = front.streams(table, labels)
    assert s.sizes == (4, 4, 4) and torch.equal(s.x.dense()[:4], front.create_positive(table, labels))


def test_partners_are_a_shift_and_nobody_is_alone():
    for batch in range(2, 30):
        partner = partners(batch, generator=seeded(batch))
        assert (partner != torch.arange(batch)).all() and torch.equal(partner.sort().values, torch.arange(batch))
    with pytest.raises(ValueError, match="no second image"):
        partners(1)


def test_adversarial_negatives_have_more_goodness_in_layer_one(digits):
    network, strategy, x = Network([64, 200, 100]), make_strategy("adversarial", 10), digits.x_train[:100]
    one, moved = strategy.create_positive(x, None), strategy.generate(x, None, network)
    with torch.no_grad():
        g_pos, g_neg = (network.layers[0](network.prepare(images)).square().sum(1) for images in (one, moved))
        network.layers[1].weight.fill_(torch.nan)
    assert (g_neg > g_pos).float().mean() > 0.95 and (moved - one).abs().max() <= strategy.epsilon + 1e-6
    assert torch.equal(strategy.generate(x, None, network), moved)  # no other layer has a say


def test_all_labels_pull_in_proportion_to_belief():
    g = torch.rand(200, 1, generator=seeded()).requires_grad_()
    loss, _ = LabelObjective(alpha=5.0)(g.sqrt(), Streams(g, None, (20,) * 10))
    (pull,) = torch.autograd.grad(loss, g)
    belief = (5.0 * g.view(10, 20)).softmax(0)
    assert torch.allclose(pull.view(10, 20)[1:], 5.0 * belief[1:] / 20, atol=1e-6)
    assert torch.allclose(pull.view(10, 20).sum(0), torch.zeros(20), atol=1e-6)
    two = g[:40].detach().sqrt()
    found = LabelObjective(5.0)(two, Streams(two, None, (20, 20)))[0]
    assert torch.allclose(found, symba_loss(*two.square().flatten().chunk(2), alpha=5.0))


def test_forced_labels_name_no_class_where_none_were_contrasted(digits):
    network = Network([64, 100, 100])
    train(network, digits, make_strategy("masking", 10), epochs=5, **QUIET)
    forced = make_strategy("label_embedding", 10)
    assert per_label_goodness(network, digits, strategy=forced, precision="fp32", device="cpu") > 60
    with pytest.raises(ValueError, match="contrasts no labels"):
        per_label_goodness(network, digits, precision="fp32", device="cpu")
