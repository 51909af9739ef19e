"Stages without a gradient, a stream without autograd, and what the training loop differentiates."

import contextlib
from unittest import mock

import pytest
import torch
from torch.nn import functional as F

import ff_research as ff
from ff_research.backprop import train_backprop
from ff_research.blackbox import STAGES, BlackBox, Streamed, black_box, layer_step, row_of, stream
from ff_research.objectives import swish_symba
from ff_research.recipes import RECIPES
from ff_research.runs import run
from ff_research.readout import head_error, per_label_goodness
from ff_research.statistics import unpack
from ff_research.strategies import STRATEGIES
from ff_research.training import train

QUIET = dict(progress=False, device="cpu", precision="fp32")
WHERE = dict(device="cpu", precision="fp32")
ADAM = dict(optimizer="adamw", lr=3e-3, weight_decay=0.0, batch_size=50)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_has_no_gradient_unless_it_pretends(stage):
    x = torch.randn(7, 12, generator=torch.Generator().manual_seed(0)).requires_grad_()
    plain, through = BlackBox(12, stage).eval(), BlackBox(12, stage, straight_through=True).eval()
    assert torch.allclose(plain(x), through(x), atol=1e-6)
    if stage in ("bits", "trees"):
        assert torch.equal(plain(x).abs(), torch.ones(7, 12))
    weights = torch.randn(7, 12, generator=torch.Generator().manual_seed(1))
    assert not torch.autograd.grad((plain(x) * weights).sum(), x)[0].any()
    torch.testing.assert_close(torch.autograd.grad((through(x) * weights).sum(), x)[0], weights)


def test_trees_are_looked_up_by_hand():
    box = BlackBox(6, "trees", seed=3)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    bits = x > x.mean(1, keepdim=True)
    for row in range(4):
        for unit in range(6):
            which = sum(int(bits[row, box.asked[unit, i]]) << i for i in range(3))
            assert box(x)[row, unit] == box.answers[unit, which]


def test_curves_are_waves_and_a_device_is_noisy_in_training_only():
    x = torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    curves, device, quiet = BlackBox(6, "curves"), BlackBox(6, "device"), BlackBox(6, "device", noise=0.0)
    torch.testing.assert_close(curves(x), 2**0.5 * torch.sin(curves.pace * x + curves.phase))
    levels = (device(x) * 7 / 3).unique()
    assert torch.allclose(levels, levels.round(), atol=1e-5) and levels.abs().max() <= 7.001
    assert not torch.equal(device(x), device(x)) and torch.equal(quiet(x), quiet(x))
    inside = (quiet.gain * x + quiet.offset).clamp(-3, 3)
    assert (quiet(x) - inside).abs().max() <= 3 / 14 + 1e-5  # half a level
    assert (device(x) - inside).std() > 0.1
    assert torch.equal(device.eval()(x), device(x))


def test_a_recipe_with_a_layer_that_learns_nothing_gives_a_row(digits, tmp_path):
    recipe = RECIPES["blackbox-device"].vary(data="digits", epochs=1, widths=(20, 20))
    row = run(recipe, 0, device="cpu", precision="fp32", progress=False)
    assert set(row["errors"]["test"]) == {"per_label", "ridge"}


@pytest.mark.parametrize("stage", STAGES)
def test_forward_forward_learns_on_both_sides_and_stays_local(stage, digits):
    network = black_box(digits.shape, (60, 60), inputs="centred", stage=stage)
    before = [p.clone() for p in network.layers[0].parameters()]
    train(network, digits, STRATEGIES["label_embedding"](10), 6, objective=swish_symba(), **QUIET | ADAM)
    assert per_label_goodness(network, digits, first=1, **WHERE) < 25
    alone = black_box(digits.shape, (60,), inputs="centred")
    train(alone, digits, STRATEGIES["label_embedding"](10), 6, objective=swish_symba(), **QUIET | ADAM)
    for a, b, old in zip(network.layers[0].parameters(), alone.layers[0].parameters(), before):
        assert torch.equal(a, b) and not torch.equal(a, old)


@pytest.mark.parametrize("through", [True, False])
def test_backprop_reaches_the_first_layer_only_by_pretending(through, digits):
    network = black_box(digits.shape, (60, 60), inputs="centred", straight_through=through)
    before = network.layers[0].weight.clone()
    train_backprop(network, digits, 5, **QUIET | ADAM)
    assert torch.equal(network.layers[0].weight, before) != through
    assert head_error(network, digits, **WHERE) < 25


def test_a_network_with_black_boxes_comes_back_from_its_file(digits, tmp_path):
    network = black_box(digits.shape, (20, 20), stage="trees")
    train(network, digits, STRATEGIES["label_embedding"](10), 1, **QUIET | ADAM)
    ff.save(network, tmp_path / "a.safetensors")
    again = ff.load_network(tmp_path / "a.safetensors")
    assert torch.equal(ff.predict(again, digits.x_test), ff.predict(network, digits.x_test))


@pytest.mark.parametrize("sign", [1, -1])
def test_the_formula_is_autograds_step(sign):
    g = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(*shape, generator=g) for shape in ((9, 5), (9,), (5,)))
    leaves = [t.clone().requires_grad_() for t in (weight, bias)]
    h = torch.addmv(leaves[1], leaves[0], x).relu()
    grads = torch.autograd.grad(F.softplus(sign * (20 - h.square().sum())), leaves)
    new = [weight.clone(), bias.clone()]
    out = layer_step(*new, x, sign, 0.01, theta=20)
    for a, b, grad in zip(new, (weight, bias), grads):
        torch.testing.assert_close(a, b - 0.01 * grad)
    torch.testing.assert_close(out, ff.layers.normalise(h.detach()[None])[0])


def forbidden():
    "Whatever differentiates raises inside the block."
    names = ("torch.autograd.grad", "torch.autograd.backward", "torch.Tensor.backward", "torch.Tensor.requires_grad_")
    stack = contextlib.ExitStack()
    for name in names:
        stack.enter_context(mock.patch(name, side_effect=AssertionError("differentiated")))
    return stack


def test_a_stream_learns_with_autograd_forbidden(digits):
    with forbidden():
        wrong = stream(Streamed("ff", 64, (60, 60), lr=1e-3), digits.x_train, digits.y_train)
        with pytest.raises(AssertionError, match="differentiated"):
            stream(Streamed("backprop", 64, (60, 60)), digits.x_train[:1], digits.y_train[:1])
    assert wrong[-300:].float().mean() < 0.5 < wrong[:100].float().mean()


@pytest.mark.parametrize("kind", ["backprop", "local", "untrained"])
def test_other_learners_of_a_stream_learn_what_they_may(kind, digits):
    learner = Streamed(kind, 64, (60, 60), lr=0.01)
    before = [weight.clone() for weight, _ in learner.layers]
    wrong = stream(learner, digits.x_train, digits.y_train)
    assert wrong[-300:].float().mean() < 0.4
    assert all(torch.equal(a, b[0]) == (kind == "untrained") for a, b in zip(before, learner.layers))


def test_local_heads_send_nothing_down(digits):
    learners = [Streamed("local", 64, (30, 20), lr=0.01) for _ in range(2)]
    learners[1].heads[1] += torch.randn(10, 20, generator=torch.Generator().manual_seed(0))
    for learner in learners:
        stream(learner, digits.x_train[:20], digits.y_train[:20])
    a, b = (learner.layers for learner in learners)
    assert torch.equal(a[0][0], b[0][0]) and not torch.equal(a[1][0], b[1][0])


def test_the_fused_step_records_no_product(digits):
    "What `train` differentiates is the loss as a function of a layer's activity, and nothing behind it."
    names, original = set(), torch.Tensor.backward

    def backward(self, *arguments, **options):
        waiting = [self.grad_fn]
        while waiting:
            if (node := waiting.pop()) is not None:
                names.add(node.name())
                waiting += [following for following, _ in node.next_functions]
        return original(self, *arguments, **options)

    with (
        mock.patch.object(torch.Tensor, "backward", backward),
        mock.patch("torch.autograd.grad", side_effect=AssertionError("differentiated")),
    ):
        train(ff.Network([64, 20, 20]), digits, STRATEGIES["label_embedding"](10), 1, **QUIET)
        assert not names  # Hinton's gradient is written out
        train(ff.Network([64, 20, 20]), digits, STRATEGIES["label_embedding"](10), 1, objective=swish_symba(), **QUIET)
    assert names and not any(part in name.lower() for name in names for part in ("mm", "linear", "mul_t"))


def test_a_row_says_what_was_run(digits):
    row = row_of(digits, 0, "stream-ff", dict(device="here"), count=600, kind="ff", lr=1e-3, widths=(20, 20))
    assert row["config"]["count"] == 600 and len(row["curves"]["error"]) == 10 and row["device"] == "here"
    assert unpack(row["wrong"]["stream"]).mean() * 100 == pytest.approx(row["errors"]["test"]["stream"])


def test_bad_input_is_named(digits):
    with pytest.raises(ValueError, match="stage"):
        BlackBox(5, "sponge")
    with pytest.raises(ValueError, match="takes 5 units"):
        BlackBox(5)(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="kind of learner"):
        Streamed("hebb")
