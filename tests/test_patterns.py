"Labels that every layer reads: local, saved, run from a recipe; and transfer through networks of any first layer."

import pytest
import torch

import ff_research as ff
from ff_research.convolution import conv
from ff_research.patterns import ClassPatternStrategy, mlp_with_labels
from ff_research.recipes import RECIPES
from ff_research.runs import network_of, run
from ff_research.training import train
from ff_research.transfer import transfer_errors

QUIET = dict(progress=False, device="cpu", precision="fp32")


def test_a_network_that_reads_no_label_is_refused(digits):
    with pytest.raises(ValueError, match="no layer reads"):
        train(ff.Network([64, 10]), digits, ClassPatternStrategy(10), epochs=1, **QUIET)


def test_it_learns_from_a_recipe_and_comes_back_from_its_file(digits, tmp_path):
    recipe = RECIPES["symba-pattern"].vary(
        data="digits", widths=(80, 80), epochs=8, lr=3e-3, optimizer="adamw", first=1
    )
    errors = run(recipe, 0, **QUIET)["errors"]["test"]
    assert errors["per_label"] < 20 and errors["probe"]["layer_2"] < 12, errors
    network = network_of(recipe, digits)
    train(network, digits, ClassPatternStrategy(10), epochs=1, **QUIET)
    ff.save(network, tmp_path / "a.safetensors")
    other = ff.load_network(tmp_path / "a.safetensors")
    assert torch.equal(ff.predict(network, digits.x_test), ff.predict(other, digits.x_test))


def test_the_same_seed_draws_the_same_patterns_and_another_seed_others():
    a, b, c = (ClassPatternStrategy(10, seed=seed).patterns for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_a_convolutional_network_transfers(digits):
    network = conv(digits.shape, (8, 8), pool=[2, 0])
    errors = transfer_errors(network, digits, neutral_label=False, device="cpu")["test"]
    assert set(errors) == {"layer_1", "layer_2"} and max(errors.values()) < 40
    with pytest.raises(ValueError, match="first layer takes 3"):
        transfer_errors(conv((3, 8, 8), (8,)), digits, neutral_label=False, device="cpu")


def test_transfer_reads_what_the_strategy_writes(digits):
    network = mlp_with_labels(digits.shape, (50,))
    train(network, digits, ClassPatternStrategy(10), epochs=1, **QUIET)
    assert transfer_errors(network, digits, neutral_label=None, device="cpu")["test"]["layer_1"] < 30
