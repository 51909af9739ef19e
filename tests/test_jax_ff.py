"""Forward-Forward in JAX: the numbers of the library's own training, layers that learn alone, and a clear message
where JAX is not installed.
"""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ff_research import jax_ff
from ff_research.checkpoints import Diverged
from ff_research.goodness import hinton_loss
from ff_research.jax_ff import direction, jax_row, load_params, params_of, start, stepper, timed, trained_in_jax
from ff_research.network import Network
from ff_research.readout import per_label_goodness
from ff_research.recipes import RECIPES
from ff_research.strategies import STRATEGIES
from ff_research.training import train

ROOT = Path(__file__).resolve().parents[1]
needs = pytest.mark.skipif(jax_ff.jax is None, reason='needs the extra: pip install "ff_research[jax]"')
if jax_ff.jax is not None:
    import jax
    import numpy as np
QUIET = dict(precision="fp32", device="cpu", progress=False)


def some(images, n):
    return replace(images, x_train=images.x_train[:n], y_train=images.y_train[:n])


def test_the_package_does_without_and_says_what_to_install():
    "With JAX hidden, the module loads, and what needs JAX names the remedy."
    program = (
        "import sys; sys.modules['jax'] = sys.modules['optax'] = None\n"
        "from ff_research import jax_ff\nfrom ff_research.network import Network\n"
        "for call in (jax_ff.needs_jax, jax_ff.direction, lambda: jax_ff.params_of(Network([4, 5, 5])), jax_ff.timed,\n"
        "             lambda: jax_ff.stepper(None), lambda: jax_ff.jax_row('small-mnist')):\n"
        "    try: call(); raise SystemExit('nothing said')\n"
        "    except ImportError as e: assert 'pip install \"ff_research[jax]\"' in str(e), e\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout


@needs
def test_a_layer_a_loss_and_a_goodness_are_those_of_the_library():
    g = torch.Generator().manual_seed(0)
    network, x = Network([12, 9, 9]), torch.randn(6, 12, generator=g)
    layer = params_of(network)["first"]
    h = network.layers[0](x)
    for theta in (None, 2.0):
        loss, found = jax_ff.local_loss(layer, x.numpy(), theta)
        np.testing.assert_allclose(found, h.detach(), rtol=1e-5, atol=1e-6)
        squares = h.square().sum(1)
        expected = hinton_loss(squares[:3], squares[3:], 9 if theta is None else theta)
        assert float(loss) == pytest.approx(expected.item(), rel=1e-5)
    out = network.layers[0].hand_on(h).detach()
    np.testing.assert_allclose(jax_ff.normalised(found), out, rtol=1e-5, atol=1e-6)
    assert not np.isnan(jax_ff.normalised(np.zeros((2, 3), np.float32))).any()


@needs
@pytest.mark.parametrize(
    "name, how",
    [
        ("label_embedding", dict(lr=3e-3)),
        ("label_embedding", dict(optimizer="adamw", lr=1e-3)),
        ("image_mixing", dict(optimizer="plain_sgd", lr=3e-3)),
    ],
)
def test_ten_steps_give_the_weights_of_training(name, how, digits):
    "From the same weights, batches and negatives; the largest weight is near 0.5."
    few, networks = some(digits, 500), [Network([64, 60, 60, 60]) for _ in range(2)]
    train(networks[0], few, STRATEGIES[name](10), 2, seed=3, batch_size=100, **how, **QUIET)
    trained_in_jax(networks[1], few, STRATEGIES[name](10), 2, seed=3, batch_size=100, **how)
    moved = Network([64, 60, 60, 60])
    for a, b, before in zip(*(network.parameters() for network in (*networks, moved))):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
        assert (a - before).abs().max() > 1e-3


@needs
@pytest.mark.parametrize("inputs", ["centred", "standardised"])
def test_ten_steps_with_inputs_of_another_scale(inputs, digits):
    few, networks = some(digits, 500), [Network([64, 50, 50], inputs=inputs) for _ in range(2)]
    how = dict(lr=1e-3, batch_size=100)
    train(networks[0], few, STRATEGIES["label_embedding"](10), 2, **how, **QUIET)
    trained_in_jax(networks[1], few, STRATEGIES["label_embedding"](10), 2, **how)
    for a, b in zip(*(network.parameters() for network in networks)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@needs
@pytest.mark.parametrize("unroll", [1, 3])
def test_layers_below_do_not_know_what_stands_above(unroll):
    "With another layer 3, layers 1 and 2 have the same bits after some steps; the last layer has others."
    found = []
    for seed in (0, 1):
        network = Network([20, 15, 15, 15])
        network.layers[2].load_state_dict(Network([20, 15, 15, 15], seed=seed).layers[2].state_dict())
        params, rule = params_of(network), direction()
        state, step = start(rule, params), stepper(rule, unroll=unroll)
        for rows in np.random.default_rng(0).random((4, 10, 20), np.float32):
            params, state, _ = step(params, state, rows, 0.05)
        found.append(params)
    a, b = found
    for key in ("weight", "bias"):
        assert (a["first"][key] == b["first"][key]).all() and (a["rest"][key][0] == b["rest"][key][0]).all()
    assert (a["rest"]["weight"][1] != b["rest"]["weight"][1]).any()


@needs
def test_an_update_is_the_gradient_of_one_layers_loss():
    "Of the sum of all losses with the inputs of each layer held constant, by jax.grad."
    params, rule = params_of(Network([20, 15, 15, 15])), direction("plain_sgd", 0.0)
    x = np.random.default_rng(0).random((10, 20), np.float32)

    def total(params):
        h, losses = x, 0.0
        layers = [params["first"], *({k: v[i] for k, v in params["rest"].items()} for i in range(2))]
        for layer in layers:
            loss, h = jax_ff.local_loss(layer, jax.lax.stop_gradient(h))
            losses, h = losses + loss, jax_ff.normalised(h)
        return losses

    gradient = jax.grad(total)(params)
    expected = jax.tree.map(lambda w, d: w - 0.1 * d, params, gradient)
    found, _, losses = stepper(rule)(params, start(rule, params), x, 0.1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), expected, found)
    assert losses.shape == (3,)


@needs
def test_weights_go_there_and_back():
    network, other = Network([10, 7, 7, 7]), Network([10, 7, 7, 7], seed=1)
    load_params(other, params_of(network))
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters()))


@needs
def test_what_does_not_fit_is_said(digits):
    few = some(digits, 50)
    for network in (Network([64, 20, 30]), Network([64, 20]), Network([64, 20, 20], triangle=True)):
        with pytest.raises(ValueError, match="of one width"):
            params_of(network)
    for name in ("mono_forward", "all_labels", "layer_wise", "self_contrastive", "hard_mining", "adversarial", "sleep"):
        with pytest.raises(ValueError, match="one negative for each"):
            trained_in_jax(Network([64, 20, 20]), few, STRATEGIES[name](10), 1)
    with pytest.raises(ValueError, match="did you mean 'sgd'"):
        direction("sdg")
    for changes in (
        dict(schedule="greedy"),
        dict(collaboration="all"),
        dict(objective="hinton", options=(("scale", 0.03),)),
    ):
        with pytest.raises(ValueError, match="no option of it but theta"):
            jax_row(RECIPES["small-mnist"].vary(name="other", **changes))
    with pytest.raises(ValueError, match="no peer term"):
        jax_row(RECIPES["loewe"])
    with pytest.raises(ValueError, match="weights of 3 layers for a network of 2"):
        load_params(Network([64, 20, 20]), params_of(Network([64, 20, 20, 20])))
    with pytest.raises(Diverged, match="not a number"):
        trained_in_jax(Network([64, 20, 20]), few, STRATEGIES["label_embedding"](10), 2, lr=1e30)


@needs
def test_it_learns_and_gives_a_row():
    small = RECIPES["small-mnist"].vary(name="small", data="digits", widths=(100,) * 3, epochs=12, batch_size=50)
    row = jax_row(small, 0)
    assert row["config"]["framework"] == "jax" and row["recipe"] == "small"
    assert row["errors"]["test"]["per_label"] < 25 and row["errors"]["test"]["ridge"]["layers_2_to_3"] < 15
    assert row["curves"]["loss"][-1][0] < row["curves"]["loss"][0][0]
    assert {"labels", "probe"} == row["wrong"].keys()


@needs
def test_a_network_trained_in_jax_is_read_as_any(digits):
    network = Network([64, 100, 100])
    trained_in_jax(network, digits, STRATEGIES["label_embedding"](10), 4, lr=3e-3, batch_size=50)
    assert per_label_goodness(network, digits) < 25


@needs
def test_timings_are_numbers_of_one_run():
    row = timed((30, 20, 20), batch_size=8, runs=2, steps=2)
    assert set(row["ms"]) == {"shared", "fused", "autograd", "scan", "unrolled"} and min(row["ms"].values()) > 0
    assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"] and row["device"].startswith("cpu: ")
