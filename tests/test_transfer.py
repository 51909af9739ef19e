"""Transfer: against the linear probe, scikit-learn and Pillow; what is frozen, what is pure, and what has no answer."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import Ridge

from ff_research import transfer
from ff_research.backprop import train_backprop
from ff_research.data import Images, hold_out
from ff_research.network import Network
from ff_research.readout import features, features_of, fit_ridge, head_error, held_out, linear_probe
from ff_research.strategies import STRATEGIES
from ff_research.training import Diverged, train
from ff_research.transfer import fine_tune, low_shot_errors, refit, transfer_errors, transfer_row

CPU = dict(precision="fp32", device="cpu")
NAMES = ["layer_1", "layer_2", "layer_3", "layers_2_to_3"]


@pytest.fixture(scope="module")
def target(digits):
    "Another data set of the same shape, with another number of classes: odd or even, or over 6."
    groups = torch.tensor([0, 1, 0, 1, 0, 1, 0, 2, 2, 2])
    return replace(digits, name="groups", y_train=groups[digits.y_train], y_test=groups[digits.y_test], num_classes=3)


@pytest.fixture(scope="module")
def network(digits):
    network = Network([64, 40, 30, 20])
    train(network, digits, STRATEGIES["label_embedding"](10), epochs=3, progress=False, **CPU)
    return network


def weights(network):
    return {name: t.clone() for name, t in network.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def pictures(x, name="pictures"):
    return Images(name, x, torch.arange(len(x)) % 2, x, torch.arange(len(x)) % 2, 2)


# refit


def test_refit_is_pillows_within_its_roundings():
    x = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    for size in (28, 8, 45):
        ours = refit(pictures(x), (3, size, size)).x_train
        grey = refit(pictures(x), (1, size, size)).x_test
        for image, colour, one in zip(x, ours, grey):
            image = Image.fromarray(image.permute(1, 2, 0).numpy())
            theirs = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR)).astype(int)
            assert np.abs(theirs - colour.permute(1, 2, 0).numpy()).max() <= 1
            theirs = np.asarray(image.convert("L").resize((size, size), Image.Resampling.BILINEAR)).astype(int)
            assert np.abs(theirs - one[0].numpy()).max() <= 2  # it rounds the grey first


def test_refit_by_hand():
    """Halving averages four pixels: bilinear weights of a factor of two are 1/8, 3/8, 3/8, 1/8, and the picture is one
    row that repeats.
    """
    x = torch.tensor([[0, 0, 80, 80, 0, 0, 80, 80]] * 4, dtype=torch.uint8)[None, None]
    assert (
        refit(pictures(x), (1, 2, 4)).x_train[0, 0].tolist() == [[11, 60, 20, 69]] * 2
    )  # the ends have no neighbour: 3/7, 3/7, 1/7
    colour = torch.tensor([10, 20, 30], dtype=torch.uint8)[None, :, None, None].expand(2, 3, 4, 4)
    assert refit(pictures(colour), (1, 4, 4)).x_train.unique().tolist() == [round(0.299 * 10 + 0.587 * 20 + 0.114 * 30)]
    white = torch.full((2, 3, 5, 7), 255, dtype=torch.uint8)
    assert (refit(pictures(white), (1, 28, 28)).x_train == 255).all()


def test_refit_keeps_what_it_should(digits):
    assert refit(digits, (1, 8, 8)) is digits and refit(digits, [1, 8, 8], name="d").x_train is digits.x_train
    colour = refit(digits, (3, 8, 8))
    assert colour.name == "digits" and all(torch.equal(colour.x_test[:, c], digits.x_test[:, 0]) for c in range(3))
    assert torch.equal(colour.y_train, digits.y_train) and colour.num_classes == 10
    real = refit(replace(digits, x_train=digits.x_train / 255, x_test=digits.x_test / 255), (3, 9, 5))
    assert (
        real.shape == (3, 9, 5)
        and real.x_train.dtype == torch.float32
        and 0 <= real.x_train.min()
        and real.x_train.max() <= 1
    )


def test_refit_by_parts_is_refit(digits):
    many = replace(digits, x_train=digits.x_train.repeat(5, 1, 1, 1), y_train=digits.y_train.repeat(5))
    assert torch.equal(refit(many, (1, 5, 6)).x_train, refit(digits, (1, 5, 6)).x_train.repeat(5, 1, 1, 1))


@pytest.mark.parametrize("shape", [(28, 28), (1, 0, 3), (1, 8.0, 8), (2, 8, 8), (4, 8, 8), ()])
def test_shapes_that_are_none(digits, shape):
    with pytest.raises(ValueError, match="expected channels|cannot become"):
        refit(digits, shape)


# Frozen features


@pytest.mark.parametrize("neutral_label", [True, False])
def test_transfer_to_the_source_is_the_linear_probe(digits, network, neutral_label):
    before = weights(network)
    here = transfer_errors(network, digits, neutral_label=neutral_label, shape=(1, 8, 8), **CPU)
    assert here == linear_probe(network, digits, neutral_label=neutral_label, fit=fit_ridge, **CPU)
    assert list(here["test"]) == list(here["validation"]) == NAMES
    assert equal(before, weights(network))


def test_the_neutral_label_has_the_pixels_of_the_source(target, network):
    as_source, as_target = (transfer_errors(network, target, neutral_label=n, **CPU) for n in (10, True))
    assert as_source != as_target == transfer_errors(network, target, neutral_label=3, **CPU)
    f = [torch.cat(features(network, x, 10, **CPU)[1:], 1) for x in (target.x_train, target.x_test)]
    held = len(target.y_train) // 6
    probe = fit_ridge(f[0][:-held], target.y_train[:-held], 3, validation=(f[0][-held:], target.y_train[-held:]))
    assert as_source["test"]["layers_2_to_3"] == probe.error(f[1], target.y_test)


def test_chosen_layers_and_pixels(target, network):
    everything = transfer_errors(network, target, neutral_label=10, **CPU)["test"]
    assert transfer_errors(network, target, neutral_label=10, layers=["layers_2_to_3", "layer_1"], **CPU)["test"] == {
        name: everything[name] for name in ("layers_2_to_3", "layer_1")
    }
    pixels = transfer_errors(None, target, neutral_label=False, **CPU)
    assert list(pixels["test"]) == ["pixels"] and 0 < pixels["test"]["pixels"] < 50
    large = transfer_errors(None, refit(target, (3, 16, 16)), neutral_label=False, shape=(1, 8, 8), **CPU)
    assert abs(large["test"]["pixels"] - pixels["test"]["pixels"]) < 10


def test_other_shapes_are_refitted(target, network):
    large = refit(target, (3, 12, 10))
    with pytest.raises(ValueError, match="360 pixels.*takes 64.*shape="):
        transfer_errors(network, large, neutral_label=10, **CPU)
    there = transfer_errors(network, large, neutral_label=10, shape=(1, 8, 8), **CPU)
    assert there == transfer_errors(network, refit(large, (1, 8, 8)), neutral_label=10, **CPU)


def test_what_has_no_answer_is_refused_by_name(digits, target, network):
    def frozen(target=target, network=network, **options):
        return transfer_errors(network, target, **dict(neutral_label=10) | options, **CPU)

    with pytest.raises(ValueError, match="360 images and 359 labels"):
        frozen(replace(target, y_test=target.y_test[1:]))
    with pytest.raises(ValueError, match="1437 images and 9 labels"):
        low_shot_errors(network, replace(target, y_train=target.y_train[:9]), (1,), neutral_label=10, **CPU)
    with pytest.raises(ValueError, match="layer_2.*layer_1, "):
        frozen(layers=["layer2"])
    with pytest.raises(ValueError, match="layer_9"):
        low_shot_errors(network, target, (1,), neutral_label=10, layer="layer_9", **CPU)
    with pytest.raises(ValueError, match="65 classes"):
        frozen(neutral_label=65)
    broken, silent = Network([64, 9, 8]), Network([64, 9, 8])
    with torch.no_grad():
        broken.layers[1].weight[2, 3] = float("nan")
        silent.layers[1].weight.zero_()
    with pytest.raises(ValueError, match="layer_2 on 'groups'.*NaN"):
        frozen(network=broken)
    with pytest.raises(ValueError, match="layer_2 on 'groups' is constant"):
        frozen(network=silent)
    with pytest.raises(ValueError, match="layer_2 on 'groups' is constant"):
        low_shot_errors(silent, target, (1,), neutral_label=10, **CPU)
    assert frozen(network=silent, layers=["layer_1"])["test"]["layer_1"] < 60


def test_nan_in_the_test_images_only(target):
    x = target.x_test / 255
    x[7, 0, 3, 3] = float("nan")
    for network in (None, Network([64, 9])):
        with pytest.raises(ValueError, match="'groups'.*NaN"):
            transfer_errors(
                network, replace(target, x_train=target.x_train / 255, x_test=x), neutral_label=False, **CPU
            )


# Few labels


def test_draws_are_balanced_nested_and_pure(digits):
    ranks = transfer._ranks(digits.y_train, 3)
    assert torch.equal(ranks, transfer._ranks(digits.y_train, 3)) and not torch.equal(
        ranks, transfer._ranks(digits.y_train, 4)
    )
    for k in (1, 5, 100):
        assert torch.bincount(digits.y_train[ranks < k]).tolist() == [k] * 10
    assert torch.equal(
        ranks.sort().values, torch.cat([torch.arange(n) for n in torch.bincount(digits.y_train)]).sort().values
    )
    gaps = torch.tensor([4, 4, 0, 4])
    assert sorted(transfer._ranks(gaps, 0)[gaps == 4].tolist()) == [0, 1, 2]


@pytest.fixture(scope="module")
def balanced(digits):
    "Digits with equally many of each class to draw from, and the validation part behind them."
    pool, held = transfer._ranks(digits.y_train, 0) < 100, 200
    order = torch.cat([pool.nonzero()[:, 0], (~pool).nonzero()[:held, 0]])
    return replace(digits, name="balanced", x_train=digits.x_train[order], y_train=digits.y_train[order])


@pytest.mark.parametrize("widths", [[64, 30, 25, 20], [64, 600, 700, 500]], ids=["more images", "more features"])
@pytest.mark.parametrize("strength", [1.0, 0.01])
def test_all_labels_are_the_full_ridge(balanced, widths, strength):
    network = Network(widths, seed=2)
    assert held_out(balanced) == 200 and torch.bincount(balanced.y_train[:1000]).tolist() == [100] * 10
    f, f_test = (torch.cat(features(network, x, **CPU)[1:], 1) for x in (balanced.x_train, balanced.x_test))
    mean, std = f.mean(0), f.std(0, correction=0)
    z, z_test = ((m - mean)[:, std > 0] / std[std > 0] for m in (f, f_test))
    theirs = Ridge(alpha=1000 * strength).fit(
        z[:1000].double(), torch.nn.functional.one_hot(balanced.y_train[:1000], 10)
    )
    expected = 100 * np.mean(theirs.predict(z_test.double()).argmax(1) != balanced.y_test.numpy())
    found = low_shot_errors(network, balanced, (100,), 1, neutral_label=False, l2=(strength,), **CPU)[100]
    own = fit_ridge(f[:1000], balanced.y_train[:1000], 10, l2=(strength,)).error(f_test, balanced.y_test)
    assert found == pytest.approx(expected, abs=0.3) and found == pytest.approx(
        own, abs=1.2
    )  # one image is 0.28; the ridge's own scale is of 1000 images, not 1200


def test_features_that_are_known_are_not_computed_again(network, digits, monkeypatch):
    how = dict(neutral_label=None, **CPU)
    anew = low_shot_errors(network, digits, (1, 5), **how), linear_probe(network, digits, fit=fit_ridge, **how)
    known = features_of(network, digits, None, **CPU)
    monkeypatch.setattr(transfer, "features", None)
    monkeypatch.setattr("ff_research.readout.features", None)
    how |= dict(known=known)
    assert anew == (
        low_shot_errors(network, digits, (1, 5), **how),
        linear_probe(network, digits, fit=fit_ridge, **how),
    )


@pytest.mark.parametrize("samples, units", [(7, 30), (40, 6)])
def test_strength_is_that_of_leaving_out(samples, units):
    generator = torch.Generator().manual_seed(5)
    y = torch.arange(samples) % 4 % 3
    z = torch.randn(samples, units, generator=generator, dtype=torch.float64) + 2 * torch.nn.functional.one_hot(
        y, units
    )
    t, strengths, squares = torch.nn.functional.one_hot(y, 3).double(), (100.0, 1.0, 0.01), {}
    for s in strengths:
        parts = []
        for i in range(samples):
            rest = np.arange(samples) != i
            one = Ridge(alpha=samples * s).fit(z[rest].numpy(), t[rest].numpy())
            parts.append(np.square(one.predict(z[i : i + 1].numpy()) - t[i].numpy()).sum())
        squares[s] = sum(parts)
    best = min(squares, key=squares.get)
    weight, bias = transfer._few_shot_ridge(z, y, 3, strengths)
    theirs = Ridge(alpha=samples * best).fit(z.numpy(), t.numpy())
    assert np.allclose(weight.T, theirs.coef_, atol=1e-6) and np.allclose(bias, theirs.intercept_, atol=1e-6)


def test_low_shot_is_pure(digits, network):
    before, state = weights(network), torch.get_rng_state()
    curve = low_shot_errors(network, digits, (1, 5, 20), neutral_label=True, **CPU)
    assert curve == low_shot_errors(network, digits, [1, 5, 20], neutral_label=True, **CPU)
    assert (
        curve[5]
        == low_shot_errors(network, digits, (5,), neutral_label=True, **CPU)[5]
        != low_shot_errors(network, digits, (5,), seed=1, neutral_label=True, **CPU)[5]
    )
    assert 90 > curve[1] > curve[5] > curve[20] and list(curve) == [1, 5, 20]
    assert equal(before, weights(network)) and torch.equal(state, torch.get_rng_state())


def test_validation_images_are_not_drawn(digits, network):
    wrong = digits.y_train.clone()
    wrong[-300:] = (wrong[-300:] + 1) % 10
    a, b = (
        low_shot_errors(network, images, (3,), neutral_label=True, **CPU)
        for images in (digits, replace(digits, y_train=wrong))
    )
    assert a == b


def test_too_few_of_a_class(digits, network):
    with pytest.raises(ValueError, match=r"'digits': class 2 has 96 training images .*shots=1000"):
        low_shot_errors(network, digits, (1, 1000), neutral_label=True, **CPU)
    with pytest.raises(ValueError, match="class 10 has 0"):
        low_shot_errors(network, replace(digits, num_classes=11), (1,), neutral_label=10, **CPU)
    for wrong in (dict(shots=()), dict(shots=(0,)), dict(draws=0), dict(l2=()), dict(l2=(0.0,))):
        with pytest.raises(ValueError, match="at least 1"):
            low_shot_errors(network, digits, **dict(shots=(1,)) | wrong, neutral_label=True, **CPU)


# Fine-tuning


def test_fine_tuning_is_backprop_from_these_weights(digits, network):
    before = weights(network)
    tuned, errors, history = fine_tune(network, digits, epochs=2, seed=3, batch_size=50, **CPU)
    assert equal(before, weights(network)) and not hasattr(network, "head")
    by_hand, part = Network([64, 40, 30, 20]), hold_out(digits, 300)
    by_hand.layers.load_state_dict(network.layers.state_dict())
    train_backprop(by_hand, part, 2, 3, batch_size=50, progress=False, **CPU)
    assert all(
        torch.equal(a, b) for a, b in zip(tuned.layers.parameters(), by_hand.layers.parameters())
    ) and torch.equal(tuned.head.weight, by_hand.head.weight)
    assert errors == {
        "test": head_error(by_hand, digits, **CPU),
        "validation": head_error(by_hand, part, **CPU),
        "lr": 0.03,
    }
    assert len(history) == 2 and errors["test"] < 30


def test_an_old_head_is_replaced(digits, target):
    network = Network([64, 20])
    train_backprop(network, digits, 1, progress=False, **CPU)
    before = weights(network)
    tuned, _, _ = fine_tune(network, refit(target, (3, 9, 9)), 1, shape=(1, 8, 8), neutral_label=10, **CPU)
    assert network.head.out_features == 10 and tuned.head.out_features == 3 and equal(before, weights(network))


def test_the_rate_is_chosen_on_validation_images(target):
    network = Network([64, 20])
    each = {lr: fine_tune(network, target, 1, lr=lr, **CPU)[1] for lr in (0.0, 0.003, 0.03)}
    assert fine_tune(network, target, 1, lr=(0.0, 0.003, 0.03), **CPU)[1] == min(
        each.values(), key=lambda e: e["validation"]
    )
    assert fine_tune(network, target, 1, lr=(1e30, 0.03), **CPU)[1] == each[0.03]
    with pytest.raises(Diverged):
        fine_tune(network, target, 1, lr=1e30, **CPU)
    for wrong, message in (
        (dict(network=None), "no weights"),
        (dict(lr=[]), "empty"),
        (dict(target=replace(target, y_test=target.y_test[1:])), "359 labels"),
    ):
        with pytest.raises(ValueError, match=message):
            fine_tune(**dict(network=network, target=target, epochs=1) | wrong, **CPU)


# Rows


def test_row_is_what_the_functions_give(digits, target, network):
    before = weights(network)
    row = transfer_row(
        network,
        (1, 8, 8),
        [target, refit(digits, (3, 10, 10), name="large")],
        neutral_label=10,
        shots=(1, 5, 10**6),
        draws=2,
        seed=4,
        **CPU,
    )
    assert json.loads(json.dumps(row)) == row and list(row) == ["groups", "large"]
    frozen = transfer_errors(network, target, neutral_label=10, **CPU)
    assert all(
        row["groups"][part] == {name: round(error, 4) for name, error in frozen[part].items()} for part in frozen
    )
    few = low_shot_errors(network, target, (1, 5), 2, 4, neutral_label=10, **CPU)
    assert row["groups"]["low_shot"] == {str(k): round(error, 4) for k, error in few.items()}
    every = row["groups"]["low_shot_all"]
    assert list(every) == [str(k) for k in few] and all(0 <= error <= 100 for error in every.values())
    assert equal(before, weights(network))
    assert (
        transfer_row(network, None, {"other name": target}, neutral_label=10, shots=(1, 5), draws=2, seed=4, **CPU)[
            "other name"
        ]
        == row["groups"]
    )


def test_row_of_pixels_and_of_silent_layers(target):
    row = transfer_row(None, None, [target], neutral_label=False, shots=(2,), **CPU)["groups"]
    assert list(row["test"]) == ["pixels"] and list(row["low_shot"]) == ["2"]
    silent = Network([64, 9, 8])
    with torch.no_grad():
        silent.layers[1].weight.zero_()
    row = transfer_row(silent, None, [target], neutral_label=False, shots=(2,), **CPU)["groups"]
    assert (
        row["test"]["layer_1"] < 60
        and row["test"]["layer_2"] is row["validation"]["layer_2"] is row["low_shot"]["2"] is None
    )
    with pytest.raises(ValueError, match="two targets of one name"):
        transfer_row(silent, None, [target, target], neutral_label=False, **CPU)


def test_fine_tuning_has_the_true_gradient_whatever_the_layers_had_before(digits):
    plain, full = Network([64, 30, 20], seed=4), Network([64, 30, 20], seed=4, full_gradient=True)
    tuned = [fine_tune(one, digits, 1, batch_size=100, **CPU)[0] for one in (plain, full)]
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(tuned[0].layers, tuned[1].layers))
    assert full.layers[0].full_gradient, "the original is left as it is"
