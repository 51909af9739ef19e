"""Properties of every strategy, objective, layer and read-out.

Any images, permutations, what should not matter, gradients, and what stays untouched.
"""

import copy
import random
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from ff_research.backprop import train_backprop
from ff_research.data import Images
from ff_research.entropy import entropic, entropy_loss
from ff_research.goodness import (
    hinton_loss,
    mean_activity,
    mean_of_squares,
    sum_of_squares,
    swish_symba_loss,
    symba_loss,
)
from ff_research.labels import labelled, neutral, overlay, wrong_labels
from ff_research.layers import FFLinear, normalise, prepare
from ff_research.learners import FusedLearner, Learner
from ff_research.network import Network, activities
from ff_research.objectives import PeerNormalisation, ProjectionObjective, hinton, swish_symba, symba
from ff_research.readout import (
    features,
    fit_probe,
    head_error,
    label_goodness,
    linear_probe,
    per_label_goodness,
    softmax_head,
)
from ff_research.schedules import SCHEDULES
from ff_research.strategies import STRATEGIES, blur_matrix, make_strategy, scff_loss
from ff_research.streams import Streams, written_out
from ff_research.training import train

CPU = dict(precision="fp32", device="cpu")
QUIET = CPU | dict(progress=False)
NAMES = [name for name, cls in STRATEGIES.items() if cls.__module__ == "ff_research.strategies"]
COPES = ("label_embedding", "hard_mining", "adversarial", "mono_forward", "all_labels")  # with a batch of one

each = pytest.mark.parametrize("name", NAMES)


def examples(count):
    "So many examples, the same ones in each run."
    return settings(
        max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# Any images, however they lie in memory

VIEWS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "batch last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "every other": lambda x: x.repeat_interleave(2, dim=0)[::2],
    "a window": lambda x: F.pad(x.float(), (1, 2, 1, 1)).to(x.dtype)[:, :, 1:-1, 1:-2],
}
views = st.sampled_from(list(VIEWS))


@dataclass
class Batch:
    x: torch.Tensor
    y: torch.Tensor
    classes: int

    @property
    def pixels(self):
        return self.x[0].numel()

    def network(self, seed=0, **options):
        "Two small layers, with biases that are not all 0."
        network = Network([self.pixels, 11, 7], seed=seed, **options)
        for layer in network.layers:
            layer.bias.data.normal_(std=0.1, generator=seeded(seed))
        return network


@st.composite
def batches(draw, least=2, most=9, most_classes=100, room=4):
    "room: pixels at least that no label covers."
    channels, classes = (
        draw(st.sampled_from([1, 3])),
        draw(st.sampled_from([2, 3, 10, 26, 100]).filter(lambda k: k <= most_classes)),
    )
    height = draw(st.integers(1, 7))
    narrowest = -(-(classes + room) // (channels * height))
    width = draw(st.integers(narrowest, max(8, narrowest)))
    n, generator = draw(st.integers(least, most)), seeded(draw(st.integers(0, 2**20)))
    x = torch.randint(0, 256, (n, channels, height, width), dtype=torch.uint8, generator=generator)
    x = x if draw(st.booleans()) else x / 255
    y = torch.randint(0, classes, (n,), generator=generator)
    y[-1] = (y[0] + (n > 1)) % classes  # at least two classes
    return Batch(x, y, classes)


def made(name, batch, x, y, network=None, seed=0):
    "Positives, negatives and streams of a new strategy."
    parts = [make_strategy(name, batch.classes).create_positive(x, y)]
    if STRATEGIES[name].has_negatives:
        parts.append(make_strategy(name, batch.classes).generate(x, y, network, seeded(seed)))
    streams = make_strategy(name, batch.classes).streams(x, y, network, seeded(seed))
    return [*parts, written_out(prepare(streams.x))]


@each
@examples(12)
@given(batch=batches(), view=views)
def test_strategies_do_not_see_how_images_lie_in_memory(name, batch, view):
    network, x, y = batch.network(), VIEWS[view](batch.x), batch.y.repeat_interleave(3)[::3]
    assert torch.equal(x, batch.x) and torch.equal(y, batch.y)
    for a, b in zip(made(name, batch, batch.x, batch.y, network), made(name, batch, x, y, network)):
        torch.testing.assert_close(a, b)


@each
@examples(6)
@given(batch=batches(most_classes=10))
def test_strategies_on_expanded_images(name, batch):
    "Grey images shown as three channels share their memory, and must not be written through."
    x = batch.x[:, :1].expand(-1, 3, -1, -1)
    if x[0].numel() < batch.classes:
        return
    plain, kept, network = x.clone(), batch.x.clone(), Network([x[0].numel(), 5, 5])
    for a, b in zip(made(name, batch, plain, batch.y, network), made(name, batch, x, batch.y, network)):
        torch.testing.assert_close(a, b)
    assert torch.equal(batch.x, kept)


@each
@examples(8)
@given(batch=batches(least=1, most=1, room=0))
def test_a_batch_of_one(name, batch):
    call = {
        "generate": lambda s: s.generate(batch.x, batch.y, None, seeded()),
        "streams": lambda s: s.streams(batch.x, batch.y, batch.network(), seeded()),
    }
    for method in call.values() if STRATEGIES[name].has_negatives else [call["streams"]]:
        if name in COPES:
            method(make_strategy(name, batch.classes))
        else:
            with pytest.raises(ValueError, match="a batch of 1 has no second image"):
                method(make_strategy(name, batch.classes))
    assert make_strategy(name, batch.classes).create_positive(batch.x, batch.y).shape == batch.x.shape


@each
@examples(8)
@given(batch=batches(least=6), view=views)
def test_every_strategy_trains_on_any_images(name, batch, view):
    n, network = len(batch.y), batch.network()
    images = Images("random", VIEWS[view](batch.x), batch.y, batch.x, batch.y, batch.classes)
    size = (
        n if name == "class_confusion" else 3 if n % 3 != 1 else 5
    )  # batches of one class, or of one image, are refused
    options = dict(epochs=1, peer=0.03, batch_size=size, **QUIET)
    history = train(network, images, make_strategy(name, batch.classes), **options)
    assert all(np.isfinite(history.column("loss")[0])) and all(torch.isfinite(p).all() for p in network.parameters())
    assert all(p.grad is None for p in network.layers.parameters())


@pytest.mark.parametrize("name", ["image_mixing", "masking"])
@pytest.mark.parametrize("shape", [(6, 20), (6, 4, 5), (6, 1, 1, 4, 5)], ids=str)
def test_masks_need_images_with_rows_and_columns(name, shape):
    with pytest.raises(ValueError, match=r"expected \[batch, channels, height, width\]"):
        make_strategy(name, 2).generate(torch.rand(shape), torch.arange(6) % 2, None, seeded())


@examples(10)
@given(batch=batches(least=1, room=0), view=views, size=st.integers(1, 4))
def test_readouts_on_any_images(batch, view, size):
    "Batches of whatever size and images however stored are read alike, and each image by itself."
    network, x = batch.network(), VIEWS[view](batch.x)
    g, f = label_goodness(network, batch.x, batch.classes, **CPU), features(network, batch.x, batch.classes, **CPU)
    assert g.shape == (len(x), batch.classes) and [tuple(a.shape) for a in f] == [(len(x), 11), (len(x), 7)]
    torch.testing.assert_close(
        label_goodness(network, x, batch.classes, batch_size=size, **CPU), g, rtol=1e-4, atol=1e-4
    )
    for a, b in zip(features(network, x, batch.classes, batch_size=size, **CPU), f):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@examples(10)
@given(batch=batches(least=1, room=0))
def test_bytes_and_floats_are_the_same_images(batch):
    if batch.x.dtype != torch.uint8:
        return
    x, network = batch.x.float() / 255, batch.network()
    assert torch.equal(overlay(x, batch.y, batch.classes), overlay(batch.x, batch.y, batch.classes))
    assert torch.equal(neutral(x, batch.classes), neutral(batch.x, batch.classes))
    assert torch.equal(
        label_goodness(network, x, batch.classes, **CPU), label_goodness(network, batch.x, batch.classes, **CPU)
    )
    assert torch.equal(features(network, x, **CPU)[1], features(network, batch.x, **CPU)[1])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32], ids=str)
def test_labels_of_any_integer_type(dtype):
    "What int64 labels give, in strategies, training and read-outs."
    generator = seeded(3)
    x, y = torch.randint(0, 256, (24, 1, 5, 4), generator=generator, dtype=torch.uint8), torch.arange(24) % 3
    images, few = (Images("random", x, labels, x, labels, 3) for labels in (y, y.to(dtype)))
    for name in NAMES:
        twins = Network([20, 6, 6]), Network([20, 6, 6])
        for network, data in zip(twins, (images, few)):
            train(network, data, make_strategy(name, 3), epochs=1, batch_size=12, **QUIET)
        assert all(torch.equal(a, b) for a, b in zip(twins[0].parameters(), twins[1].parameters())), name
    assert linear_probe(twins[0], images, **CPU) == linear_probe(twins[0], few, **CPU)
    assert per_label_goodness(twins[0], images, **CPU) == per_label_goodness(twins[0], few, **CPU)
    assert torch.equal(softmax_head(twins[0], images, **CPU).weight, softmax_head(twins[0], few, **CPU).weight)


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@each
def test_one_thread_or_two(name):
    "Large enough that two threads share the work."
    x, y = torch.randint(0, 256, (240, 1, 16, 16), dtype=torch.uint8, generator=seeded()), torch.arange(240) % 4
    images, ends = Images("random", x, y, x[:60], y[:60], 4), []
    for count in (1, 2):
        with threads(count):
            network = Network([256, 160, 160])
            train(network, images, make_strategy(name, 4), epochs=1, lr=1e-4, batch_size=120, **QUIET)
            labels = make_strategy("label_embedding", 4)
            g = label_goodness(network, images.x_test, 4, strategy=labels, **CPU)
            read = g, *features(network, images.x_test, 4, **CPU)
            ends.append([*(p.detach() for p in network.layers.parameters()), *read])
    for a, b in zip(*ends):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


# A permuted batch gives permuted results

permutations = st.integers(0, 2**20).map(seeded)


@examples(15)
@given(batch=batches(least=1, room=0), generator=permutations)
def test_permuting_images_permutes_what_is_made_and_read(batch, generator):
    order, network = torch.randperm(len(batch.y), generator=generator), batch.network()
    x, y, k = batch.x[order], batch.y[order], batch.classes
    assert torch.equal(overlay(x, y, k), overlay(batch.x, batch.y, k)[order]) and torch.equal(
        neutral(x, k), neutral(batch.x, k)[order]
    )
    for name in NAMES:
        assert torch.equal(
            make_strategy(name, k).create_positive(x, y),
            make_strategy(name, k).create_positive(batch.x, batch.y)[order],
        ), name
    torch.testing.assert_close(
        label_goodness(network, x, k, **CPU), label_goodness(network, batch.x, k, **CPU)[order], rtol=1e-4, atol=1e-4
    )
    for a, b in zip(features(network, x, k, **CPU), features(network, batch.x, k, **CPU)):
        torch.testing.assert_close(a, b[order], rtol=1e-4, atol=1e-4)


OBJECTIVES = {
    "hinton": hinton(),
    "hinton, mean activity": hinton(theta=0.4, scale=5.0, goodness=mean_activity),
    "symba": symba(),
    "swish_symba": swish_symba(),
    "scff": make_strategy("self_contrastive", 10).objective(FFLinear(7, 7), 1),
    "scff, layer 2": make_strategy("self_contrastive", 10).objective(FFLinear(7, 7), 2),
    "entropic": entropic(),
}
each_objective = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)


def alone(h, y):
    "Streams of labelled images without negatives."
    return Streams(h, y, (len(h),))


@each_objective
@examples(8)
@given(rows=st.integers(1, 12), generator=permutations)
def test_losses_do_not_know_the_order_of_pairs(objective, rows, generator):
    h, gamma = (
        torch.rand(2 * rows, 7, generator=generator, dtype=torch.float64),
        torch.rand(2 * rows, 1, generator=generator, dtype=torch.float64),
    )
    order = torch.randperm(rows, generator=generator)
    both = torch.cat([order, order + rows])
    loss, g = objective(h, gamma=gamma)
    permuted, g_permuted = objective(h[both], gamma=gamma[both])
    torch.testing.assert_close(permuted, loss)
    assert torch.equal(g_permuted, g[both])


@examples(8)
@given(rows=st.integers(1, 12), generator=permutations)
def test_projection_does_not_know_the_order_of_images(rows, generator):
    h, y, objective = (
        torch.rand(rows, 7, generator=generator),
        torch.randint(0, 5, (rows,), generator=generator),
        ProjectionObjective(7, 5),
    )
    order = torch.randperm(rows, generator=generator)
    (loss, g), (permuted, g_permuted) = objective(h, alone(h, y)), objective(h[order], alone(h[order], y[order]))
    torch.testing.assert_close(permuted, loss)
    torch.testing.assert_close(g_permuted, g[order])


@each_objective
@pytest.mark.parametrize("rows", [1, 3])
def test_streams_of_unequal_length_are_refused(objective, rows):
    with pytest.raises(ValueError, match=f"{rows} rows of activity: expected positives and as many negatives"):
        objective(torch.rand(rows, 7))
    h = torch.rand(2 * rows, 7)
    for sizes in ((rows + 1, rows - 1), (2 * rows,), (1,) * (2 * rows + 2)):
        if sizes != (1, 1):
            with pytest.raises(ValueError, match=r"expected two streams of one size|rows of activity for"):
                objective(h, Streams(h, None, sizes))


# What should not matter does not


@examples(12)
@given(batch=batches(least=1), power=st.floats(-1, 4))
def test_brightness_means_nothing_to_plain_images(batch, power):
    """Activities are normalised, and so are images; only far below the 1e-8 that guards a division by zero would
    brightness show.
    """
    x, network = batch.x.float() / (255 if batch.x.dtype == torch.uint8 else 1), batch.network()
    for a, b in zip(features(network, 10**power * x, **CPU), features(network, x, **CPU)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@examples(10)
@given(batch=batches(least=1), generator=permutations)
def test_renaming_classes_renames_columns(batch, generator):
    """Label pixels and their weights change places together: the goodness moves to the new column and nothing else
    happens.
    """
    network, order = batch.network(), torch.randperm(batch.classes, generator=generator)
    g, renamed = label_goodness(network, batch.x, batch.classes, **CPU), copy.deepcopy(network)
    renamed.layers[0].weight.data[:, : batch.classes] = network.layers[0].weight[:, order].detach()
    torch.testing.assert_close(
        label_goodness(renamed, batch.x, batch.classes, **CPU), g[:, order], rtol=1e-4, atol=1e-4
    )


@examples(10)
@given(batch=batches(least=1), generator=permutations)
def test_names_of_units_mean_nothing(batch, generator):
    network, order = batch.network(), torch.randperm(11, generator=generator)
    renamed = copy.deepcopy(network)
    first, second = renamed.layers
    first.weight.data, first.bias.data, second.weight.data = (
        first.weight.data[order],
        first.bias.data[order],
        second.weight.data[:, order],
    )
    torch.testing.assert_close(
        label_goodness(renamed, batch.x, batch.classes, **CPU),
        label_goodness(network, batch.x, batch.classes, **CPU),
        rtol=1e-4,
        atol=1e-4,
    )


def clusters(seed=0, samples=90, dimensions=6, classes=3):
    draw = seeded(seed)
    centres, y = torch.randn(classes, dimensions, generator=draw), torch.arange(samples) % classes
    return centres[y] + 0.7 * torch.randn(samples, dimensions, generator=draw), y


fit = dict(num_classes=3, l2=(0.1,), steps=100)


@examples(6)
@given(generator=permutations)
def test_probe_does_not_know_the_order_of_samples(generator):
    f, y = clusters()
    order = torch.randperm(len(y), generator=generator)
    a, b = fit_probe(f, y, **fit), fit_probe(f[order], y[order], **fit)
    torch.testing.assert_close(a.logits(f), b.logits(f), rtol=1e-3, atol=1e-3)


@examples(12)
@given(powers=st.lists(st.floats(-10, 10), min_size=6, max_size=6), shift=st.floats(-1000, 1000))
def test_probe_does_not_know_scale_and_shift_of_features(powers, shift):
    "Features are standardised: neither tiny nor huge ones are lost, and a shift costs no more than its rounding."
    f, y = clusters()
    other = (f + shift) * 10 ** torch.tensor(powers)
    torch.testing.assert_close(
        fit_probe(other, y, **fit).logits(other), fit_probe(f, y, **fit).logits(f), rtol=2e-3, atol=2e-3
    )


@examples(6)
@given(order=st.permutations(range(3)))
def test_probe_does_not_know_the_names_of_classes(order):
    f, y = clusters()
    order = torch.tensor(order)
    torch.testing.assert_close(
        fit_probe(f, order[y], **fit).logits(f)[:, order], fit_probe(f, y, **fit).logits(f), rtol=1e-3, atol=1e-3
    )


def test_a_feature_that_varies_by_its_rounding_only_is_constant():
    f, y = clusters()
    noise = 1e4 + 1e-3 * torch.randint(0, 2, (len(f), 1), generator=seeded())
    assert noise.std() > 1e-5  # the spacing of floats at 10,000
    assert fit_probe(torch.cat([f, noise], 1), y, **fit).weight[-1].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_probe_of_features_in_any_precision(dtype):
    f, y = clusters()
    f = f.to(dtype)
    probe = fit_probe(f, y, **fit)
    assert probe.weight.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(
        probe.logits(f).float(), fit_probe(f.float(), y, **fit).logits(f.float()), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("count", [1, 5, 6])
@pytest.mark.parametrize("read", [linear_probe, softmax_head])
def test_too_few_images_to_hold_some_out(read, count):
    "A sixth of the training images chooses the strength: six are enough, five are not."
    x, y = torch.rand(count, 1, 5, 4, generator=seeded()), torch.arange(count) % 3
    images = Images("random", x, y, x, y, 3)
    if count == 6:
        assert read(Network([20, 6, 6]), images, **CPU) is not None
    else:
        with pytest.raises(ValueError, match=f"0 of its {count} training images would be held out"):
            read(Network([20, 6, 6]), images, **CPU)


def test_probe_of_features_with_a_graph_keeps_no_graph():
    f, y = clusters()
    probe = fit_probe(f.clone().requires_grad_(), y, **fit)
    assert not any(t.requires_grad for t in (probe.weight, probe.bias, probe.mean, probe.scale))
    assert torch.equal(probe.weight, fit_probe(f, y, **fit).weight)


# Gradients against finite differences in float64

double = dict(dtype=torch.float64)
rows = st.integers(1, 5)


def check(function, *tensors):
    assert torch.autograd.gradcheck(
        function, [t.detach().clone().requires_grad_() for t in tensors], eps=1e-6, atol=1e-5, rtol=1e-4
    )


LOSSES = {
    "hinton": lambda p, n: hinton_loss(p, n, theta=1.3, scale=0.7),
    "symba": symba_loss,
    "swish_symba": swish_symba_loss,
    "entropy": entropy_loss,
    "scff": lambda p, n: scff_loss(p, n, theta_pos=4.0, theta_neg=6.0, penalty=1e-2, scale=4.0),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@examples(5)
@given(rows=rows, scale=st.floats(0.1, 10), seed=st.integers(0, 99))
def test_gradients_of_losses(loss, rows, scale, seed):
    check(loss, *(scale * (0.05 + torch.rand(2, rows, generator=seeded(seed), **double))))


@each_objective
@examples(5)
@given(rows=rows, seed=st.integers(0, 99))
def test_gradients_of_objectives(objective, rows, seed):
    draw = seeded(seed)
    gamma = torch.rand(2 * rows, 1, generator=draw, **double)
    check(lambda h: objective(h, gamma=gamma)[0], 0.05 + torch.rand(2 * rows, 7, generator=draw, **double))


@examples(5)
@given(rows=rows, seed=st.integers(0, 99))
def test_gradients_of_projection_goodness_and_normalisation(rows, seed):
    draw = seeded(seed)
    h, y, objective = (
        torch.rand(rows, 7, generator=draw, **double),
        torch.randint(0, 4, (rows,), generator=draw),
        ProjectionObjective(7, 4).double(),
    )
    check(lambda h: objective(h, alone(h, y))[0], h)
    check(lambda m: F.cross_entropy(F.linear(h, m), y), objective.projection)
    objective(h, alone(h, y))[0].backward()
    error = (h @ objective.projection.T).softmax(1) - F.one_hot(y, 4)
    torch.testing.assert_close(objective.projection.grad, (error.T @ h / rows).detach())
    for function in (sum_of_squares, mean_of_squares, mean_activity, normalise):
        check(function, h + 0.1)


@examples(5)
@given(rows=rows, seed=st.integers(0, 99), weight=st.floats(0.1, 5), momentum=st.floats(0, 0.95))
def test_gradients_of_peer_normalisation(rows, seed, weight, momentum):
    peer, start = PeerNormalisation(7, weight, momentum).double(), torch.rand(7, generator=seeded(seed), **double)

    def penalty(mean):
        peer.mean.copy_(start)  # each call moves the running mean
        return peer(mean)

    check(penalty, torch.rand(7, generator=seeded(seed + 1), **double))


class Own(nn.Module):
    "A user's layer: a convolution whose activity has the shape of a map, and which takes images flat or not."

    def __init__(self, channels, height, width, seed=0):
        super().__init__()
        self.shape = channels, height, width
        self.conv = nn.utils.skip_init(nn.Conv2d, channels, 2, 3, padding=1)  # draws no random numbers
        self.units = 2  # channels, which an objective with a projection asks for
        nn.init.normal_(self.conv.weight, std=0.5, generator=seeded(seed))
        nn.init.constant_(self.conv.bias, 0.1)

    def forward(self, x):
        return self.conv(x.reshape(len(x), *self.shape)).relu()


def smooth(layer, x):
    "Whether no unit is so near to 0 that finite differences would step across its kink."
    with torch.no_grad():
        z = x @ layer.weight.T + layer.bias if isinstance(layer, FFLinear) else layer.conv(x)
    return z.abs().min() > 1e-4


@examples(5)
@given(rows=rows, seed=st.integers(0, 99))
def test_gradients_of_layers_and_networks(rows, seed):
    draw = seeded(seed)
    layer, own, x = (
        FFLinear(12, 5, generator=draw).double(),
        Own(1, 3, 4, seed).double(),
        torch.rand(rows, 1, 3, 4, generator=draw, **double),
    )
    if not (smooth(layer, x.flatten(1)) and smooth(own, x)):
        return
    check(
        lambda x, w, b: torch.func.functional_call(layer, {"weight": w, "bias": b}, x),
        x.flatten(1),
        layer.weight,
        layer.bias,
    )
    check(lambda x: normalise(own(x)), x)
    full = FFLinear(12, 5, full_gradient=True, generator=draw).double()
    z = x.flatten(1).requires_grad_()
    full(z).sum().backward()
    torch.testing.assert_close(z.grad, full.weight.sum(0).detach().expand(rows, -1))  # as if there were no ReLU


@pytest.mark.parametrize(
    "objective", [*OBJECTIVES.values(), ProjectionObjective(9, 4)], ids=[*OBJECTIVES, "projection"]
)
@examples(6)
@given(
    count=st.integers(1, 8),
    full=st.booleans(),
    peer=st.sampled_from([0.0, 3.0]),
    seed=st.integers(0, 999),
    received=st.booleans(),
)
def test_updates_are_those_of_autograd_in_float64(objective, count, full, peer, seed, received):
    """One float32 step of length 1 against float64 autograd through the whole layer, gamma and peer normalisation
    included.
    """
    draw, pairs = seeded(seed), not isinstance(objective, ProjectionObjective)
    y = torch.randint(0, 4, (count,), generator=draw)
    x, images = None, torch.rand(count, 1, 3, 5, generator=draw)
    x = prepare(labelled(images, torch.stack([y, wrong_labels(y, 4, draw)]), 4), 15) if pairs else prepare(images, 15)
    s = Streams(x, y, (count, count) if pairs else (count,))
    gamma = 3 * torch.rand(2 * count, 1, generator=draw) if received and pairs else 0.0
    layer, peers = FFLinear(15, 9, full, draw), PeerNormalisation(9, peer) if peer else None
    layer.bias.data.normal_(std=0.1, generator=draw)
    theirs, reference, their_peer = (
        copy.deepcopy(layer).double(),
        copy.deepcopy(objective).double(),
        copy.deepcopy(peers),
    )
    h = theirs((x.dense() if pairs else x).double())
    loss, g = reference(h, s, gamma=gamma.double() if isinstance(gamma, torch.Tensor) else gamma)
    (loss if peers is None else loss + their_peer.double()(h[:count].mean(0))).backward()

    for kind in (FusedLearner, Learner):
        mine, own = copy.deepcopy(layer), copy.deepcopy(objective)
        own.peers = copy.deepcopy(peers)
        learner = kind(mine, own, "sgd", 1.0, 0.0)
        with torch.no_grad():
            learner.activity([x])
            my_loss, my_g = learner.learn(s, gamma)
        for p, start, end in zip(theirs.parameters(), layer.parameters(), mine.parameters()):
            largest = max(1.0, p.grad.abs().max().item())
            torch.testing.assert_close((start - end).detach().double(), p.grad, rtol=1e-4, atol=2e-5 * largest)
        if peers is None or kind is FusedLearner:
            torch.testing.assert_close(my_loss.double(), loss.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(my_g.double(), g.detach(), rtol=1e-4, atol=1e-4)


# A user's own layers


def own_network(height=5, width=4):
    first, second = Own(1, height, width), FFLinear(2 * height * width, 6, generator=seeded())
    return Network([first, second])


@each
def test_own_layers_train_with_every_strategy_and_are_read(name):
    x, y = torch.randint(0, 256, (24, 1, 5, 4), generator=seeded(3), dtype=torch.uint8), torch.arange(24) % 3
    images, network = Images("random", x, y, x, y, 3), own_network()
    before = [p.detach().clone() for p in network.layers.parameters()]
    train(network, images, make_strategy(name, 3), epochs=2, batch_size=12, **QUIET)
    assert all(torch.isfinite(p).all() and not torch.equal(p, q) for p, q in zip(network.layers.parameters(), before))
    assert label_goodness(network, x, 3, strategy=make_strategy("label_embedding", 3), **CPU).shape == (24, 3)
    assert [f.shape[1] for f in features(network, x, **CPU)] == [40, 6]
    assert linear_probe(network, images, **CPU)["test"].keys() == {"layer_1", "layer_2"}


def test_an_own_layer_stays_as_it_was_but_for_its_weights():
    "Networks and trainings leave nothing in it: no hooks, no attributes."
    x, y, network = torch.rand(12, 1, 5, 4, generator=seeded()), torch.arange(12) % 3, own_network()
    images, before = Images("random", x, y, x, y, 3), set(vars(network.layers[0]))
    for _ in range(3):
        train(network, images, make_strategy("label_embedding", 3), epochs=1, **QUIET)
    Network(list(network.layers))
    assert set(vars(network.layers[0])) == before
    assert not network.layers[0]._forward_hooks and not network.layers[0]._forward_pre_hooks


# Nothing of the user's is touched


def world():
    "What is global: random states, defaults, modes."
    kind, keys, *rest = np.random.get_state()
    return (
        torch.get_rng_state().tolist(),
        random.getstate(),
        (kind, keys.tolist(), *rest),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.is_anomaly_enabled(),
    )


def data(**changes):
    x, y = torch.rand(24, 1, 5, 4, generator=seeded(3)), torch.arange(24) % 3
    return Images(
        **dict(name="random", x_train=x, y_train=y, x_test=x.flip(0), y_test=y.flip(0), num_classes=3) | changes
    )


CALLS = {
    f"train {name}": lambda n, i, name=name: train(n, i, make_strategy(name, 3), epochs=1, batch_size=12, **QUIET)
    for name in NAMES
}
CALLS |= {
    f"train {schedule}": lambda n, i, schedule=schedule: train(
        n, i, make_strategy("hard_mining", 3), epochs=1, schedule=schedule, collaboration="all", **QUIET
    )
    for schedule in SCHEDULES
}
CALLS |= {
    f"{name} by itself": lambda n, i, name=name: made(name, i_batch(i), i.x_train, i.y_train, n) for name in NAMES
}
CALLS |= {
    "train_backprop": lambda n, i: train_backprop(n, i, epochs=1, **QUIET),
    "label_goodness": lambda n, i: label_goodness(n, i.x_test, 3, **CPU),
    "per_label_goodness": lambda n, i: per_label_goodness(n, i, **CPU),
    "features": lambda n, i: features(n, i.x_test, 3, **CPU),
    "linear_probe": lambda n, i: linear_probe(n, i, **CPU),
    "linear_probe, plain": lambda n, i: linear_probe(n, i, neutral_label=False, **CPU),
    "softmax_head": lambda n, i: softmax_head(n, i, **CPU),
    "fit_probe": lambda n, i: fit_probe(i.x_train.flatten(1), i.y_train, 3, validation=(i.x_test.flatten(1), i.y_test)),
    "head_error": lambda n, i: head_error(with_head(n), i, **CPU),
    "labels": lambda n, i: (
        overlay(i.x_train, i.y_train, 3),
        neutral(i.x_train, 3),
        labelled(i.x_train, i.y_train[None], 3),
    ),
    "activities": lambda n, i: activities(n, i.x_train),
}


def i_batch(images):
    return Batch(images.x_train, images.y_train, images.num_classes)


def with_head(network):
    network.head = nn.utils.skip_init(nn.Linear, 6, 3)
    network.head.weight.data.normal_(generator=seeded())
    network.head.bias.data.zero_()
    return network


def outcome(call, network, images):
    "The exception that a call ends with, or None."
    try:
        call(network, images)
    except Exception as error:
        return error


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_users_tensors_and_the_world_stay_as_they_were(call):
    torch.manual_seed(5)
    images, network = data(), Network([20, 6, 6])
    stored, state = [t.clone() for t in vars(images).values() if isinstance(t, torch.Tensor)], world()
    assert outcome(call, network, images) is None
    assert world() == state
    assert all(
        torch.equal(a, b) for a, b in zip(stored, (t for t in vars(images).values() if isinstance(t, torch.Tensor)))
    )


BROKEN = {
    "labels": lambda i: data(y_train=i.y_train + 7, y_test=i.y_test + 7),
    "one image": lambda i: data(x_train=i.x_train[:1], y_train=i.y_train[:1]),
    "a pixel": lambda i: data(x_train=i.x_train.index_fill(0, torch.tensor([3]), float("nan"))),
    "no images": lambda i: data(x_train=i.x_train[:0], y_train=i.y_train[:0]),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_the_world_stays_as_it_was_when_calls_fail(broken):
    failed = 0
    for call in CALLS.values():
        network, images = Network([20, 6, 6]), broken(data())
        state = world()
        failed += outcome(call, network, images) is not None
        assert world() == state
    assert failed > 2


def test_the_world_stays_as_it_was_when_training_breaks_off():
    class Breaks(STRATEGIES["hard_mining"]):
        "Fails in the middle of an epoch, with modes of torch's own in force."

        def streams(self, x, y, network=None, generator=None):
            if self.weight.abs().sum() > 0:
                raise KeyboardInterrupt
            return super().streams(x, y, network, generator)

    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            state = world()
            with pytest.raises(KeyboardInterrupt):
                train(Network([20, 6, 6]), data(), Breaks(3), epochs=2, batch_size=5, **QUIET)
            assert world() == state


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_user_without_gradients_gets_the_same(call):
    networks = Network([20, 6, 6]), Network([20, 6, 6])
    call(networks[0], data())
    with torch.no_grad():
        call(networks[1], data())
    assert all(torch.equal(a, b) for a, b in zip(networks[0].parameters(), networks[1].parameters()))


def test_readouts_in_inference_mode():
    network, images = Network([20, 6, 6]), data()
    plain = (
        linear_probe(network, images, **CPU),
        per_label_goodness(network, images, **CPU),
        softmax_head(network, images, **CPU).weight,
    )
    with torch.inference_mode():
        inside = (
            linear_probe(network, images, **CPU),
            per_label_goodness(network, images, **CPU),
            softmax_head(network, images, **CPU).weight,
        )
    assert plain[:2] == inside[:2] and torch.equal(plain[2], inside[2])


def test_strategies_and_readouts_under_another_default_dtype():
    "Where a program computes in float64 by default, networks of float32 are still trained and read in float32."
    blank, images = Network([20, 6, 6]), data()
    plain = {}
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        blur_matrix.cache_clear()
        try:
            for name in NAMES:
                network = copy.deepcopy(blank)
                train(network, images, make_strategy(name, 3), epochs=1, **QUIET)
                assert all(p.dtype == torch.float32 for p in network.layers.parameters())
                if STRATEGIES[name].has_negatives:
                    assert (
                        make_strategy(name, 3).generate(images.x_train, images.y_train, None, seeded()).dtype
                        == torch.float32
                    )
            g, f = label_goodness(blank, images.x_test, 3, **CPU), features(blank, images.x_test, 3, **CPU)
            assert g.dtype == f[0].dtype == torch.float32
            plain[dtype] = linear_probe(blank, images, **CPU)
        finally:
            torch.set_default_dtype(torch.float32)
    assert plain[torch.float32] == plain[torch.float64]
