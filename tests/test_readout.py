"""Read-outs: against the naive loop over labels and scikit-learn's optimum, and with unusual or unusable input."""

import math
from dataclasses import replace

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from ff_research.backprop import train_backprop
from ff_research.goodness import mean_activity, mean_of_squares, sum_of_squares
from ff_research.labels import neutral, overlay
from ff_research.network import Network, activities
from ff_research.readout import (
    Probe,
    features,
    fit_probe,
    fit_ridge,
    head_error,
    label_goodness,
    linear_probe,
    per_label_goodness,
    probe_errors,
    softmax_head,
)
from ff_research.strategies import STRATEGIES
from ff_research.training import train

CPU = dict(precision="fp32", device="cpu")


@pytest.fixture(scope="module")
def network(digits):
    network = Network([64, 60, 50, 40])
    train(network, digits, STRATEGIES["label_embedding"](10), epochs=30, progress=False, **CPU)
    return network


def naive(network, x, num_classes, first, goodness):
    columns = []
    for k in range(num_classes):
        layers = activities(network, overlay(x, torch.full((len(x),), k), num_classes), normalised=False)
        columns.append(sum(goodness(h) for h in layers[first - 1 :]))
    return torch.stack(columns, 1)


# Read-out A


@pytest.mark.parametrize("goodness", [sum_of_squares, mean_of_squares, mean_activity])
@pytest.mark.parametrize("first", [1, 2, 3])
@pytest.mark.parametrize("num_classes", [2, 10, 64])
def test_label_goodness_is_the_loop_over_labels(digits, network, goodness, first, num_classes):
    x = digits.x_test[:23]
    how = dict(first=first, goodness=goodness, strategy=STRATEGIES["label_embedding"](num_classes), batch_size=7)
    fast = label_goodness(network, x, num_classes, **how, **CPU)
    torch.testing.assert_close(fast, naive(network, x, num_classes, first, goodness), rtol=1e-4, atol=1e-4)


def test_per_label_goodness_counts_wrong_answers(digits, network):
    g = naive(network, digits.x_test, 10, 2, sum_of_squares)
    expected = 100 * (g.argmax(1) != digits.y_test).float().mean().item()
    assert per_label_goodness(network, digits, **CPU) == pytest.approx(expected, abs=0.3)  # one image of 360
    assert expected < 60  # chance is 90
    right = replace(digits, y_test=label_goodness(network, digits.x_test, 10, **CPU).argmax(1))
    assert per_label_goodness(network, right, **CPU) == 0


def test_bfloat16_reads_nearly_the_same(digits, network):
    errors = [per_label_goodness(network, digits, precision=p, device="cpu") for p in ("fp32", "bf16")]
    assert abs(errors[0] - errors[1]) < 3 and next(network.parameters()).dtype == torch.float32


def test_network_of_one_layer_is_read_by_its_first(digits):
    one = Network([64, 30])
    train(one, digits, STRATEGIES["label_embedding"](10), epochs=10, progress=False, **CPU)
    assert per_label_goodness(one, digits, **CPU) == per_label_goodness(one, digits, first=1, **CPU) < 60


@pytest.mark.parametrize("name", ["image_mixing", "mono_forward"])
def test_labels_that_no_training_contrasted_are_not_read(digits, name):
    "By whom a network was trained decides, unless another way to write labels is asked for."
    other = Network([64, 20, 20])
    train(other, digits, STRATEGIES[name](10), epochs=1, progress=False, **CPU)
    for read in (per_label_goodness, lambda n, d, **how: label_goodness(n, d.x_test, 10, **how)):
        with pytest.raises(ValueError, match=f"n/a: the network was trained by {name}"):
            read(other, digits, **CPU)
    x, labels = digits.x_test[:9], STRATEGIES["label_embedding"](10)
    asked = label_goodness(other, x, 10, strategy=labels, **CPU)
    torch.testing.assert_close(asked, naive(other, x, 10, 2, sum_of_squares), rtol=1e-4, atol=1e-4)


def test_one_image(digits, network):
    one = label_goodness(network, digits.x_test[:1], 10, **CPU)
    torch.testing.assert_close(one, label_goodness(network, digits.x_test[:9], 10, **CPU)[:1], rtol=1e-4, atol=1e-4)


# Features


def test_features_are_those_of_the_neutral_label(digits, network):
    got = features(network, digits.x_test[:50], 10, batch_size=8, **CPU)
    for f, expected in zip(got, activities(network, neutral(digits.x_test[:50], 10))):
        torch.testing.assert_close(f, expected, rtol=1e-4, atol=1e-4)
    plain = features(network, digits.x_test[:50], **CPU)
    assert not torch.allclose(plain[0], got[0], atol=1e-3)


def test_features_do_not_know_the_label(digits, network):
    "Whatever stands in the label pixels is overwritten."
    marked = digits.x_test.clone()
    marked.view(len(marked), -1)[:, :10] = torch.randint(0, 256, (len(marked), 10), dtype=torch.uint8)
    for a, b in zip(features(network, digits.x_test, 10, **CPU), features(network, marked, 10, **CPU)):
        assert torch.equal(a, b)


def test_reading_changes_nothing(digits, network):
    before = [p.detach().clone() for p in network.parameters()], digits.x_test.clone(), torch.get_rng_state()
    for precision in ("fp32", "bf16"):
        label_goodness(network, digits.x_test, 10, precision=precision, device="cpu")
        features(network, digits.x_test.float() / 255, 10, precision=precision, device="cpu")
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), before[0]))
    assert torch.equal(digits.x_test, before[1]) and torch.equal(torch.get_rng_state(), before[2])


# The linear probe


def value(probe, f, y):
    return (torch.nn.functional.cross_entropy(probe.logits(f), y) + probe.l2 / 2 * probe.weight.square().sum()).item()


def clusters(samples=200, dimensions=12, classes=4, seed=0):
    centres = torch.randn(classes, dimensions, generator=torch.Generator().manual_seed(99))
    draw = torch.Generator().manual_seed(seed)
    y = torch.randint(0, classes, (samples,), generator=draw)
    return centres[y] + torch.randn(samples, dimensions, generator=draw), y


@pytest.mark.parametrize("strength", [1.0, 1e-1, 1e-2, 1e-3, 1e-4])
def test_probe_reaches_the_optimum_of_scikit_learn(strength):
    f, y = clusters()
    mine = fit_probe(f, y, 4, l2=(strength,), steps=500)
    other = LogisticRegression(C=1 / (strength * len(y)), tol=1e-9, max_iter=20_000).fit(
        ((f - mine.mean) * mine.scale).double(), y
    )
    theirs = Probe(
        torch.tensor(other.coef_.T).float(), torch.tensor(other.intercept_).float(), mine.mean, mine.scale, strength
    )
    assert value(mine, f, y) == pytest.approx(value(theirs, f, y), abs=2e-5)
    assert mine.error(f, y) == pytest.approx(
        100 * (1 - other.score(((f - mine.mean) * mine.scale).double(), y)), abs=0.6
    )


def test_default_steps_are_enough_on_real_features(digits, network):
    f, y = features(network, digits.x_train, 10, **CPU)[1], digits.y_train
    short, long = (fit_probe(f, y, 10, l2=(1e-3,), **steps) for steps in ({}, dict(steps=1000)))
    assert value(short, f, y) - value(long, f, y) < 2e-3


@pytest.mark.parametrize("smoothing", [0.1, 0.5])
def test_softened_labels_are_weighted_samples(smoothing):
    "The same minimum as scikit-learn's for every sample under every label, weighted by its share."
    f, y = clusters()
    mine = fit_probe(f, y, 4, l2=(1e-2,), steps=500, smoothing=smoothing)
    z = (f - mine.mean) * mine.scale
    share = smoothing / 4 + (1 - smoothing) * torch.nn.functional.one_hot(y, 4)
    theirs = LogisticRegression(C=1 / (1e-2 * 200), tol=1e-10, max_iter=10_000).fit(
        z.repeat_interleave(4, 0).double(), torch.arange(4).repeat(200), sample_weight=share.flatten().double()
    )
    logits = mine.logits(f).double()
    other = z.double() @ torch.tensor(theirs.coef_.T) + torch.tensor(theirs.intercept_)
    assert torch.allclose(logits.softmax(1), other.softmax(1), atol=1e-3)
    assert torch.allclose(fit_probe(f, y, 4, l2=(1e-2,), smoothing=0.0).weight, fit_probe(f, y, 4, l2=(1e-2,)).weight)


@pytest.mark.parametrize("smoothing", [-0.1, 1.1])
def test_a_smoothing_is_a_share(smoothing):
    with pytest.raises(ValueError, match="smoothing="):
        fit_probe(torch.rand(8, 3), torch.arange(8) % 2, 2, smoothing=smoothing)


def test_probe_is_free_of_shift_and_scale():
    f, y = clusters()
    a, b = (
        fit_probe(f, y, 4, l2=(0.1,), steps=500),
        fit_probe(f * torch.logspace(-2, 2, 12) + 50, y, 4, l2=(0.1,), steps=500),
    )
    torch.testing.assert_close(a.weight, b.weight, rtol=1e-2, atol=1e-3)


def test_strength_is_chosen_on_validation_data():
    f, y = clusters(samples=40, dimensions=60)
    f_new, y_new = clusters(samples=2000, dimensions=60, seed=1)
    strengths = (10.0, 1.0, 1e-1, 1e-2, 1e-3)
    alone = {s: fit_probe(f, y, 4, l2=(s,), steps=500).error(f_new, y_new) for s in strengths}
    chosen = fit_probe(f, y, 4, l2=strengths, steps=500, validation=(f_new, y_new))
    assert chosen.error(f_new, y_new) == pytest.approx(min(alone.values()), abs=1)
    assert fit_probe(f, y, 4, l2=strengths).l2 == 10.0  # of equals, the strongest


def test_constant_features_get_no_weight():
    f, y = clusters()
    probe = fit_probe(torch.cat([f, torch.full((200, 2), 3.0), torch.zeros(200, 1)], 1), y, 4, l2=(0.1,), steps=500)
    assert torch.isfinite(probe.weight).all() and probe.weight[-3:].abs().max() == 0
    torch.testing.assert_close(probe.weight[:-3], fit_probe(f, y, 4, l2=(0.1,), steps=500).weight, rtol=1e-2, atol=1e-3)
    nothing = fit_probe(torch.ones(200, 3), y, 4)
    assert nothing.error(torch.ones(200, 3), y) == pytest.approx(100 * (1 - y.bincount().max().item() / 200), abs=1e-3)


def test_separable_and_lonely_classes():
    probe = fit_probe(torch.eye(3), torch.arange(3), 3)
    assert probe.error(torch.eye(3), torch.arange(3)) == 0
    same = fit_probe(torch.rand(5, 3), torch.zeros(5, dtype=torch.long), 3)
    assert torch.isfinite(same.weight).all() and same.error(torch.rand(5, 3), torch.zeros(5, dtype=torch.long)) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_features_that_are_not_finite(bad):
    f, y = clusters()
    f[17, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        fit_probe(f, y, 4)


def test_mismatched_counts():
    f, y = clusters()
    with pytest.raises(ValueError, match="200 images and 199 labels"):
        fit_probe(f, y[:-1], 4)
    with pytest.raises(ValueError, match="at least one"):
        fit_probe(f[:0], y[:0], 4)


# The read-outs of a network


def test_softmax_head_and_linear_probe_agree(digits, network):
    "The head is the probe of the layers from the second on."
    head, probes = softmax_head(network, digits, **CPU), linear_probe(network, digits, **CPU)
    upper = torch.cat(features(network, digits.x_test, 10, **CPU)[1:], 1)
    assert head.error(upper, digits.y_test) == pytest.approx(probes["test"]["layers_2_to_3"])
    assert probes["test"].keys() == probes["validation"].keys() == {"layer_1", "layer_2", "layer_3", "layers_2_to_3"}
    assert head.error(upper, digits.y_test) < 15


def test_probe_never_sees_the_test_set_or_the_validation_labels(digits, network):
    "Shuffled test and validation labels change no fitted weight but the choice of the strength."
    shuffled = replace(digits, y_train=digits.y_train.clone(), y_test=digits.y_test.roll(1))
    assert linear_probe(network, digits, **CPU)["validation"] == linear_probe(network, shuffled, **CPU)["validation"]
    shuffled.y_train[-300:] = shuffled.y_train[-300:].roll(1)
    train_error = linear_probe(network, shuffled, **CPU)["validation"]["layer_1"]
    assert train_error > 80  # wrong labels are not learned, since they were not seen


def test_neutral_label_or_plain(digits, network):
    assert linear_probe(network, digits, **CPU) != linear_probe(network, digits, neutral_label=False, **CPU)


def test_raw_pixels(digits):
    errors = probe_errors([digits.x_train.flatten(1) / 255], [digits.x_test.flatten(1) / 255], digits)
    assert errors["test"].keys() == {"layer_1"} and errors["test"]["layer_1"] < 8


def test_two_layers_have_no_joined_probe(digits):
    assert linear_probe(Network([64, 20, 20]), digits, **CPU)["test"].keys() == {"layer_1", "layer_2"}


def test_head_error(digits):
    network = Network([64, 50])
    train_backprop(network, digits, epochs=5, progress=False, **CPU)
    with torch.no_grad():
        expected = 100 * (network.head(network(digits.x_test)).argmax(1) != digits.y_test).float().mean().item()
    assert head_error(network, digits, batch_size=7, **CPU) == pytest.approx(expected, abs=1e-4)
    assert head_error(network, digits, split="train", **CPU) < 10


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda n, d: per_label_goodness(n, replace(d, y_test=d.y_test[:-1]), **CPU), "360 images and 359 labels"),
        (
            lambda n, d: per_label_goodness(n, replace(d, x_test=d.x_test[:0], y_test=d.y_test[:0]), **CPU),
            "at least one",
        ),
        (lambda n, d: per_label_goodness(n, d, split="tset", **CPU), "did you mean 'test'"),
        (lambda n, d: per_label_goodness(n, d, first=0, **CPU), "first=0: the network has the layers 1…3"),
        (lambda n, d: per_label_goodness(n, d, first=4, **CPU), "first=4"),
        (lambda n, d: label_goodness(n, d.x_test, 65, **CPU), "65 classes need as many pixels"),
        (
            lambda n, d: label_goodness(n, torch.rand(3, 1, 9, 9), 10, **CPU),
            "81 pixels, but the network's first layer takes 64",
        ),
        (lambda n, d: features(n, torch.rand(3, 1, 9, 9), 10, **CPU), "81 pixels"),
        (lambda n, d: linear_probe(n, replace(d, y_train=d.y_train[:-1]), **CPU), "1437 images and 1436 labels"),
        (lambda n, d: linear_probe(n, replace(d, y_test=d.y_test[:-1]), **CPU), "360 images and 359 labels"),
        (lambda n, d: softmax_head(n, d, first=0, **CPU), "first=0"),
        (lambda n, d: softmax_head(n, d, first=9, **CPU), "first=9"),
        (lambda n, d: head_error(n, d, **CPU), "the network has no head"),
        (lambda n, d: features(n, d.x_test, 10, precision="fp8", device="cpu"), "unknown precision"),
    ],
)
def test_wrong_input(digits, network, call, message):
    with pytest.raises(ValueError) as error:
        call(network, digits)
    assert message in str(error.value)


# The probe in closed form


def some_features(n=400, d=30, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    y = torch.randint(0, 4, (n,), generator=generator)
    return torch.randn(n, d, generator=generator, dtype=dtype) + torch.nn.functional.one_hot(y, d).to(dtype), y


@pytest.mark.parametrize("strength", [1.0, 1e-3])
def test_ridge_is_the_minimum_of_its_objective(strength):
    "The gradient of mean squares plus l2 times squared weights vanishes."
    f, y = some_features(dtype=torch.float64)
    probe = fit_ridge(f, y, 4, l2=(strength,))
    z = (f - probe.mean) * probe.scale
    weight, bias = probe.weight.clone().requires_grad_(), probe.bias.clone().requires_grad_()
    loss = (z @ weight + bias - torch.nn.functional.one_hot(y, 4)).square().sum() / len(
        y
    ) + strength * weight.square().sum()
    assert all(g.abs().max() < 1e-10 for g in torch.autograd.grad(loss, (weight, bias)))


def test_ridge_chooses_on_validation_and_takes_the_strongest_of_equals():
    f, y = some_features()
    strengths = (1.0, 1e-2, 1e-4)
    errors = {s: fit_ridge(f[:200], y[:200], 4, l2=(s,)).error(f[200:], y[200:]) for s in strengths}
    assert errors[fit_ridge(f[:200], y[:200], 4, l2=strengths[::-1], validation=(f[200:], y[200:])).l2] == min(
        errors.values()
    )
    assert fit_ridge(f, y, 4, l2=(1e-4, 1.0)).l2 == 1.0
    assert fit_ridge(f[:, :0], y, 4, validation=(f[:, :0], y)).l2 == 1.0


def test_ridge_of_dead_doubled_and_too_many_features():
    f, y = some_features(50, 30)
    dead = torch.cat([f, torch.zeros(50, 5), f, torch.full((50, 200), 3.0)], 1)
    probe = fit_ridge(dead, y, 4)
    assert (
        torch.isfinite(probe.logits(dead)).all()
        and probe.weight[30:35].abs().max() == 0 == probe.weight[65:].abs().max()
    )
    assert fit_ridge(torch.ones(50, 7), y, 4).error(torch.ones(50, 7), y) == pytest.approx(
        100 - 100 * y.bincount().max().item() / 50
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda f, y: (f.index_fill(0, torch.tensor([3]), math.nan), y), "NaN or infinite"),
        (lambda f, y: (f, y[:-1]), "as many labels"),
        (lambda f, y: (f[:0], y[:0]), "at least one"),
    ],
)
def test_ridge_refuses_what_the_softmax_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        fit_ridge(*change(*some_features()), 4)


def test_ridge_survives_features_that_are_nearly_one():
    "A layer that has collapsed: thousands of copies of one feature, apart by rounding only."
    generator = torch.Generator().manual_seed(0)
    one, y = torch.randn(3000, 1, generator=generator), torch.randint(0, 4, (3000,), generator=generator)
    f = one.expand(-1, 1500) * (1 + 1e-6 * torch.randn(1500, generator=generator))
    probe = fit_ridge(f, y, 4, l2=(1e-4, 1e-6))
    assert torch.isfinite(probe.weight).all() and probe.error(f, y) < 80
    torch.testing.assert_close(probe.logits(f), fit_ridge(one, y, 4, l2=(1e-9,)).logits(one), rtol=0, atol=1e-2)
