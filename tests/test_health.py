"""Numerical health: extreme goodness, thresholds, scales and images; dead layers; weights that are not finite."""

import contextlib
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import expit

from ff_research.backprop import train_backprop
from ff_research.collaboration import contributions, layer_goodness
from ff_research.data import Images
from ff_research.entropy import entropic, entropy_loss, log_goodness
from ff_research.goodness import (
    hinton_loss,
    mean_activity,
    mean_of_squares,
    sum_of_squares,
    swish_symba_loss,
    symba_loss,
)
from ff_research.layers import FFLinear, normalise, prepare
from ff_research.network import Network, activities
from ff_research.objectives import PeerNormalisation, ProjectionObjective, hinton, swish_symba, symba
from ff_research.optimisers import OPTIMIZERS
from ff_research.readout import features, head_error, label_goodness, linear_probe, per_label_goodness, softmax_head
from ff_research.schedules import SCHEDULES
from ff_research.strategies import STRATEGIES, make_strategy, scff_loss
from ff_research.streams import Streams
from ff_research.training import Diverged, gammas, train

CPU = dict(precision="fp32", device="cpu")
QUIET = CPU | dict(progress=False)
NAMES = [name for name, cls in STRATEGIES.items() if cls.__module__ == "ff_research.strategies"]

each = pytest.mark.parametrize("name", NAMES)


def data(x=None, n=24, name="random"):
    "Images of 20 pixels in three classes."
    x = torch.rand(n, 1, 5, 4, generator=torch.Generator().manual_seed(3)) if x is None else x
    y = torch.arange(len(x)) % 3
    return Images(name, x, y, x, y, 3)


def run(name, images, network=None, **options):
    network = network or Network([20, 8, 8])
    return network, train(
        network, images, make_strategy(name, 3), **QUIET | dict(epochs=2, batch_size=len(images.y_train) // 4) | options
    )


def healthy(network, history, images):
    "All that a run leaves behind, and all that is read from it, is finite."
    assert all(torch.isfinite(p).all() for p in network.parameters())
    keys = ("loss", "separation", "g_pos") + ("g_neg",) * network.strategy.has_negatives
    assert all(math.isfinite(value) for key in keys for epoch in history.column(key) for value in epoch)
    labels = make_strategy("label_embedding", 3)  # whatever it was trained by
    assert torch.isfinite(label_goodness(network, images.x_test, 3, strategy=labels, **CPU)).all()
    assert all(
        torch.isfinite(f).all()
        for f in features(network, images.x_test, 3, **CPU) + features(network, images.x_test, **CPU)
    )
    return True


# Losses and gradients at the ends of the number line, against float64

GOODNESS = (0.0, 1e-30, 1e-6, 1.0, 8.0, 1e6, 1e12, 1e30)
PAIRS = torch.tensor([(p, n) for p in GOODNESS for n in GOODNESS])
THETAS = tuple(torch.tensor([0.0, 1e-6, 1.0, 8.0, 1e6, 1e12, -1e-6, -1.0, -1e6, -1e12]).tolist())  # as float32 has them


def softplus(x):
    return np.logaddexp(0, x)


def hinton_truth(p, n, theta, scale):
    a, b = scale * (theta - p), scale * (n - theta)
    return (softplus(a) + softplus(b)) / 2, -scale * expit(a) / 2, scale * expit(b) / 2


def symba_truth(p, n, alpha):
    x = alpha * (n - p)
    return softplus(x), -alpha * expit(x), alpha * expit(x)


def swish_truth(p, n, alpha):
    x = alpha * (n - p)
    slope = alpha * expit(x) * (1 + x * expit(-x))
    return x * expit(x), -slope, slope


def scff_truth(p, n, theta_pos, theta_neg, penalty, scale):
    a, b = theta_pos - scale * p, scale * n - theta_neg
    return (
        softplus(a) + softplus(b) + penalty * abs(scale * p),
        scale * (penalty * np.sign(p) - expit(a)),
        scale * expit(b),
    )


CASES = {
    f"hinton, theta {theta:g}, scale {scale:g}": (hinton_loss, hinton_truth, dict(theta=theta, scale=scale))
    for theta in THETAS
    for scale in (1.0, 1e-3, 2000.0)
}
CASES |= {f"symba, alpha {alpha:g}": (symba_loss, symba_truth, dict(alpha=alpha)) for alpha in (4.0, 1e-3, 1e3)}
CASES |= {
    f"swish_symba, alpha {alpha:g}": (swish_symba_loss, swish_truth, dict(alpha=alpha)) for alpha in (4.0, 1e-3, 1e3)
}
CASES |= {
    f"scff, theta {theta:g}": (
        scff_loss,
        scff_truth,
        dict(theta_pos=theta, theta_neg=2 * theta, penalty=1e-4, scale=4.0),
    )
    for theta in THETAS
}


@pytest.mark.parametrize("loss, truth, options", CASES.values(), ids=CASES)
def test_losses_and_their_gradients_at_extremes(loss, truth, options):
    "Every pair of extreme goodnesses by itself, in float32."
    for p, n in PAIRS:
        g_pos, g_neg = p.clone().requires_grad_(), n.clone().requires_grad_()
        value = loss(g_pos[None], g_neg[None], **options)
        got = (value, *torch.autograd.grad(value, [g_pos, g_neg]))
        expected = truth(np.float64(p.item()), np.float64(n.item()), **options)
        for mine, theirs in zip(got, expected):
            assert mine.isfinite() and mine.item() == pytest.approx(float(theirs), rel=2e-5, abs=1e-12), (p, n)


@pytest.mark.parametrize(
    "case", ["hinton, theta 8, scale 1", "symba, alpha 4", "swish_symba, alpha 4", "scff, theta 8"]
)
def test_one_extreme_row_does_not_spoil_the_gradient_of_others(case):
    loss, truth, options = CASES[case]
    g_pos, g_neg = (column.clone().requires_grad_() for column in PAIRS.T)
    loss(g_pos, g_neg, **options).backward()
    _, d_pos, d_neg = truth(*PAIRS.T.double().numpy(), **options)
    for mine, theirs in ((g_pos.grad, d_pos), (g_neg.grad, d_neg)):
        torch.testing.assert_close(
            len(PAIRS) * mine.double(), torch.from_numpy(np.asarray(theirs)), rtol=2e-5, atol=1e-9
        )


@pytest.mark.parametrize("g", [0.0, 1e-30, 1e-6, 1.0, 1e6, 1e30])
def test_entropy_loss_at_extremes(g):
    """Free of scale, apart from the 1e-30 that stands in for the mean of nothing; log 2 where all is equal, epsilon/2
    where negatives have none.
    """
    equal = torch.full((6,), g)
    if g > 1e-20:
        assert entropy_loss(equal, equal).item() == pytest.approx(math.log(2), abs=1e-4)
        assert entropy_loss(equal, 0 * equal).item() == pytest.approx(5e-4, abs=1e-5)
    for g_pos, g_neg in ((equal, equal), (0 * equal, equal), (equal, 0 * equal), (equal * torch.arange(6), equal)):
        p, n = g_pos.clone().requires_grad_(), g_neg.clone().requires_grad_()
        value = entropy_loss(p, n)
        value.backward()
        a, b = g_pos.double(), g_neg.double()
        mean = (a.mean() + b.mean()) / 2 + 1e-30
        assert value.item() == pytest.approx(
            ((2 * 1.001 * mean).log() - (a + 1e-3 * mean).log().mean()).item(), rel=1e-5, abs=1e-5
        )
        share = 1 / (12 * mean) - 1e-3 * (1 / (a + 1e-3 * mean)).mean() / 12
        torch.testing.assert_close(
            p.grad.double(), share - 1 / (a + 1e-3 * mean) / 6, rtol=1e-3, atol=1e-4 / mean.item()
        )
        torch.testing.assert_close(n.grad.double(), share.expand(6), rtol=1e-3, atol=1e-4 / mean.item())


OBJECTIVES = {
    "hinton": hinton(),
    "hinton, mean activity": hinton(goodness=mean_activity),
    "symba": symba(),
    "swish_symba": swish_symba(),
    "entropic": entropic(),
    "scff": make_strategy("self_contrastive", 3).objective(FFLinear(5, 5), 1),
} | {f"hinton, theta {theta:g}": hinton(theta=theta) for theta in THETAS}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_activities_at_extremes(objective, dtype):
    """Rows of scale 0 to 1e15, in every mixture of positives and negatives: loss, goodness and gradient are finite,
    and rows of zeros get none from squares.
    """
    scales = torch.tensor([0.0, 1e-30, 1e-15, 1e-3, 1.0, 1e3, 1e9, 1e15])
    rows = scales[:, None] * torch.rand(8, 5, generator=torch.Generator().manual_seed(0))
    for shift in range(8):
        h = torch.cat([rows, rows.roll(shift, 0)]).to(dtype).requires_grad_()
        loss, g = objective(h)
        loss.backward()
        assert loss.isfinite() and g.isfinite().all() and h.grad.isfinite().all() and g.dtype == torch.float32
        if objective.of_activity is not mean_activity:
            assert not h.grad[h.detach().abs().sum(1) == 0].any()
            truth = objective.of_activity(h.detach().double())[:, None]
            torch.testing.assert_close(g.double(), truth, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e15, 1e30])
def test_projection_at_extremes(scale):
    objective, y = ProjectionObjective(5, 3), torch.tensor([0, 2, 1])
    h = (scale * torch.rand(3, 5, generator=torch.Generator().manual_seed(0))).requires_grad_()
    loss, g = objective(h, Streams(h, y, (3,)))
    loss.backward()
    scores = h.detach().double() @ objective.projection.detach().double().T
    error = (scores.softmax(1) - torch.nn.functional.one_hot(y, 3)) / 3
    assert loss.item() == pytest.approx(
        (scores.logsumexp(1) - scores.gather(1, y[:, None])[:, 0]).mean().item(), rel=1e-4, abs=1e-6
    )
    torch.testing.assert_close(h.grad.double(), error @ objective.projection.detach().double(), rtol=1e-4, atol=1e-6)
    assert g.isfinite().all() and objective.projection.grad.isfinite().all()


# Normalisation


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_silence_stays_silence(dtype):
    h = torch.zeros(3, 7, dtype=dtype, requires_grad=True)
    out = normalise(h)
    out.sum().backward()
    assert torch.equal(out, torch.zeros_like(h)) and h.grad.isfinite().all()
    assert torch.equal(prepare(torch.zeros(3, 1, 5, 4)), torch.zeros(3, 1, 5, 4))


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e3, 1e9, 1e17])
def test_normalise_at_extremes(scale):
    """Root mean square 1 at any scale that is well above 1e-4, the root of the guard; below, rows fade to 0 and never
    turn into noise.
    """
    h = scale * torch.rand(4, 7, generator=torch.Generator().manual_seed(0))
    h[1] = 0  # silence amid activity
    h[2] *= 1e-30 / scale
    out, tiny = normalise(h), normalise(h[2:3])
    torch.testing.assert_close(out.square().mean(1), torch.tensor([1.0, 0, 0, 1]), rtol=1e-3, atol=1e-12)
    assert tiny.isfinite().all() and tiny.abs().max() < 1e-25


def test_numbers_too_large_to_square_give_no_nan():
    h = torch.full((2, 7), 1e25)
    assert sum_of_squares(h).isinf().all() and normalise(h).isfinite().all()
    assert all(f.isfinite().all() for f in activities(Network([20, 8, 8]), torch.full((2, 1, 5, 4), 1e25)))


def test_log_goodness_and_peer_normalisation_of_silence():
    assert log_goodness(torch.zeros(3, 7)).isfinite().all() and mean_of_squares(torch.zeros(3, 7)).eq(0).all()
    peer = PeerNormalisation(7, 3.0)
    for _ in range(2000):  # m fades to 0
        mean = torch.zeros(7, requires_grad=True)
        penalty = peer(mean)
    penalty.backward()
    assert penalty == 0 and mean.grad.eq(0).all() and peer.mean.isfinite().all()


@pytest.mark.parametrize("mode", ["all", "previous"])
def test_layers_receive_extreme_goodness(mode):
    """A sum over other layers, and not a total minus the own: a huge layer does not drown what a small one receives
    from other small ones.
    """
    received = gammas(torch.tensor([[1.0], [1e30], [2.0], [0.0]]), mode)
    expected = [[1e30], [3.0], [1e30], [1e30]] if mode == "all" else [[0.0], [1.0], [1e30], [1e30]]
    torch.testing.assert_close(received, torch.tensor(expected))


# Images that say little


def one_pixel():
    x = torch.full((24, 1, 5, 4), 0.5)
    x.flatten(1)[torch.arange(24), torch.arange(24) % 17 + 3] = 1.0  # never under the label
    return x


def blank_amid():
    x = data().x_train.clone()
    x[5] = 0
    return x


IMAGES = {
    "black": torch.zeros(24, 1, 5, 4),
    "grey": torch.full((24, 1, 5, 4), 0.5),
    "white": torch.ones(24, 1, 5, 4),
    "one blank": blank_amid(),
    "one pixel": one_pixel(),
    "black bytes": torch.zeros(24, 1, 5, 4, dtype=torch.uint8),
    "nearly black": 1e-4 * data().x_train,
}
FLAT = ("black", "black bytes", "grey", "white")
NEEDS_OTHERS = (
    "class_confusion",
    "image_mixing",
    "masking",
    "random_noise",
    "layer_wise",
)  # make a negative from another image, which must be another


@each
@pytest.mark.parametrize("kind", IMAGES)
def test_images_that_say_little(name, kind):
    "Training is healthy or says what is wrong; and nothing depends on which of the two schedules runs."
    images = data(IMAGES[kind])
    for schedule in SCHEDULES:
        if kind in FLAT and name in NEEDS_OTHERS:
            with pytest.raises(ValueError, match="is it blank, or are the images all the same"):
                run(name, images, schedule=schedule)
        elif "black" in kind and kind in FLAT and name in ("self_contrastive", "mono_forward"):
            with pytest.raises(Diverged, match="layer 1 is silent.*epoch 1.*blank"):
                run(name, images, schedule=schedule)
        else:
            assert healthy(*run(name, images, schedule=schedule), images)


@pytest.mark.parametrize("kind", IMAGES)
def test_readouts_of_images_that_say_little(kind):
    network, images = Network([20, 8, 8, 8]), data(IMAGES[kind])
    assert 0 <= per_label_goodness(network, images, **CPU) <= 100
    for neutral_label in (True, False):
        errors = linear_probe(network, images, neutral_label=neutral_label, **CPU)
        assert all(0 <= error <= 100 for split in errors.values() for error in split.values())
    head = softmax_head(network, images, **CPU)
    assert all(t.isfinite().all() for t in (head.weight, head.bias, head.mean, head.scale))
    assert contributions(network, images, **CPU)["together"] <= 100
    assert (
        math.isfinite(train_backprop(network, images, epochs=1, **QUIET).column("loss")[0][0])
        and 0 <= head_error(network, images, **CPU) <= 100
    )


@each
@pytest.mark.parametrize("brightness", [1e-2, 1e3, 1e9, 1e17, 1e25])
def test_images_of_extreme_brightness(name, brightness):
    "Floats outside [0, 1] are nobody's pixels, and still no reason for NaN."
    images = data(brightness * data().x_train)
    try:
        network, history = run(name, images)
    except (Diverged, ValueError) as error:
        assert brightness > 1e18 and ("layer 1" in str(error) or "blank" in str(error)), error
    else:
        assert healthy(network, history, images)


# Layers without a life


def dead(depth, widths=(20, 8, 8, 8)):
    "A network whose layer of that number answers nothing with anything."
    network = Network(list(widths))
    network.layers[depth - 1].bias.data.fill_(-1e4)
    return network


@each
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_training_a_dead_layer_stops_with_a_diagnosis(name, depth):
    with pytest.raises(Diverged, match=rf"layer {depth} is silent: .*epoch 1\b"):
        run(name, data(), dead(depth))


@pytest.mark.parametrize(
    "options",
    [
        dict(schedule="greedy"),
        dict(collaboration="all"),
        dict(collaboration="previous"),
        dict(optimizer="adamw"),
        dict(precision="bf16"),
        dict(objective=symba()),
        dict(objective=entropic()),
        dict(schedule="greedy", collaboration="all"),
    ],
    ids=str,
)
def test_a_dead_layer_stops_every_kind_of_training(options):
    with pytest.raises(Diverged, match="layer 2 is silent"):
        run("label_embedding", data(), dead(2), **options)


def test_activity_too_small_to_square_is_silence():
    network = Network([20, 8, 8])
    network.layers[0].weight.data *= 1e-30
    with pytest.raises(Diverged, match="layer 1 is silent"):
        run("label_embedding", data(), network)


def test_a_layer_that_dies_later_is_noticed_in_its_first_silent_epoch():
    class Fatal(STRATEGIES["label_embedding"]):
        "Kills the second layer in the third epoch."

        steps = 0

        def streams(self, x, y, network=None, generator=None):
            self.steps += 1
            if self.steps == 5:
                network.layers[1].bias.data.fill_(-1e4)
            return super().streams(x, y, network, generator)

    with pytest.raises(Diverged, match=r"layer 2 is silent: .*epoch 3\b"):
        train(Network([20, 8, 8]), data(), Fatal(3), epochs=6, batch_size=12, **QUIET)


def test_dead_units_are_not_a_dead_layer():
    network = Network([20, 8, 8])
    for layer in network.layers:
        layer.bias.data[:4] = -1e4
    images = data()
    assert healthy(*run("label_embedding", images, network), images)
    assert all(not f[:, :4].any() for f in features(network, images.x_test, **CPU))


@pytest.mark.parametrize("depth", [1, 2])
def test_readouts_of_a_dead_network(depth):
    "Silence tells no labels apart: every image gets class 0, and every probe the most frequent class."
    network, images = dead(depth, (20, 8, 8)), data()
    g = label_goodness(network, images.x_test, 3, **CPU)
    assert torch.equal(g, torch.zeros(24, 3)) and not features(network, images.x_test, 3, **CPU)[1].any()
    assert per_label_goodness(network, images, **CPU) == pytest.approx(100 * 2 / 3, abs=1e-3)
    assert linear_probe(network, images, **CPU)["test"]["layer_2"] == pytest.approx(100 * 2 / 3, abs=1e-3)
    assert softmax_head(network, images, **CPU).weight.abs().max() == 0
    assert math.isfinite(contributions(network, images, **CPU)["together"])


# Weights that are not finite, or soon will not be


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["weight", "bias"])
def test_weights_that_are_not_finite(value, which):
    "Training and every read-out that names an error refuse them; nothing counts NaN as class 0."
    network, images = Network([20, 8, 8]), data()
    train_backprop(network, images, epochs=1, **QUIET)
    for layer in network.layers:  # in all units, so that a ReLU hides none of it
        getattr(layer, which).data.fill_(value)
    if value < 0:
        network.layers[1].weight.data.fill_(math.nan)
    for read in (linear_probe, softmax_head, head_error):
        with pytest.raises(ValueError, match="NaN or infinite"):
            read(network, images, **CPU)
    del network.head  # as an untrained network, whose labels stand on its first pixels
    for read in (per_label_goodness, contributions):
        with pytest.raises(ValueError, match="NaN or infinite"):
            read(network, images, **CPU)
    for name in NAMES:
        with pytest.raises(Diverged, match="layer [12]"):
            run(name, images, network)


def test_one_weight_that_nobody_sees_is_found_all_the_same():
    "A unit of weight -inf is silent, its loss finite: only looking at the weights shows it."
    network = Network([20, 8, 8])
    network.layers[1].bias.data[3] = -math.inf
    with pytest.raises(Diverged, match="layer 2.*not finite|not finite.*layer 2"):
        run("label_embedding", data(), network, weight_decay=0.0)


@each
@pytest.mark.parametrize("lr", [1e-12, 1.0, 1e6, 1e20, 1e30])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_any_rate_ends_in_health_or_in_a_diagnosis(name, lr, optimizer):
    images = data()
    try:
        network, history = run(name, images, lr=lr, optimizer=optimizer)
    except Diverged as error:
        assert lr > 1e-3 and "layer" in str(error) and "epoch" in str(error)
    else:
        assert healthy(network, history, images)


@each
@pytest.mark.parametrize("scale", [1e-4, 1e4, 1e10, 1e17, 1e19, 1e25, 1e35])
def test_weights_of_any_scale_end_in_health_or_in_a_diagnosis(name, scale):
    network, images = Network([20, 8, 8]), data()
    for layer in network.layers:
        layer.weight.data *= scale
    try:
        history = run(name, images, network)[1]
    except Diverged as error:
        # mono_forward squares nothing in its loss: layer 1 may hand on 0 for activities too large to square, which
        # silences layer 2
        assert scale > 1e18 and ("layer 1" in str(error) or name == "mono_forward") and "epoch 1" in str(error), error
    else:
        assert scale < 1e18 and healthy(network, history, images)


@pytest.mark.parametrize("theta", [*THETAS, 1e30])
@pytest.mark.parametrize("collaboration", [None, "all"])
def test_training_with_extreme_thresholds(theta, collaboration):
    images = data()
    try:
        network, history = run("label_embedding", images, objective=hinton(theta=theta), collaboration=collaboration)
    except Diverged as error:
        assert "silent" in str(error) and theta < 0  # everything is too good and is pushed down until nothing is left
    else:
        assert healthy(network, history, images)


def test_a_run_that_diverged_leaves_the_images_and_says_so_once():
    images = data()
    kept = replace(images, x_train=images.x_train.clone())
    with pytest.raises(Diverged) as error:
        run("label_embedding", images, lr=1e30)
    assert torch.equal(images.x_train, kept.x_train) and "\n" not in str(error.value)
    assert layer_goodness(Network([20, 8, 8]), images.x_test, 3, **CPU).isfinite().all()


@pytest.mark.parametrize(
    "objective, stops", [(hinton(), True), (symba(), True), (hinton(theta=0.4, goodness=mean_activity), False)]
)
def test_the_full_gradient_excuses_a_silent_layer_only_where_it_can_revive_it(objective, stops):
    "The square of an activity of zero has no gradient, full or not, and peer normalisation finds all units alike."
    network = Network([16, 8, 8], full_gradient=True)
    with torch.no_grad():
        network.layers[1].weight.zero_()
        network.layers[1].bias.fill_(-1e-6)
    pixels = torch.rand(20, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    images = Images("random", pixels, torch.arange(20) % 2, pixels[:2], torch.arange(2), 2)
    with pytest.raises(Diverged, match="layer 2 is silent") if stops else contextlib.nullcontext():
        train(
            network,
            images,
            STRATEGIES["label_embedding"](2),
            epochs=1,
            objective=objective,
            peer=0.03,
            batch_size=5,
            progress=False,
            device="cpu",
            precision="fp32",
        )
