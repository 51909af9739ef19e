"Forms of goodness: named in recipes, kept in model files, read out by themselves."

import torch

import ff_research as ff
from ff_research.forms import FORMS
from ff_research.goodness import GOODNESSES, symba_loss
from ff_research.objectives import GoodnessObjective
from ff_research.recipes import RECIPES
from ff_research.runs import goodness_of, objective_of
from ff_research.strategies import STRATEGIES


def test_recipes_name_every_form_with_equal_numbers_of_trials():
    chosen = [r for name, r in RECIPES.items() if name.startswith("goodness-")]
    named = {dict(r.objective.options)["goodness"] for r in chosen}
    assert named == {*FORMS, "mean_of_squares", "mean_activity"}
    assert {sum(map(len, r.search)) for r in chosen} == {8}
    for r in chosen:
        form = GOODNESSES[dict(r.objective.options)["goodness"]]
        assert objective_of(r).of_activity is form and goodness_of(r) is form
    assert goodness_of(RECIPES["loewe"]) is None


def test_every_form_ignores_the_order_of_rows_and_takes_silence():
    h = torch.rand(5, 12, generator=torch.Generator().manual_seed(0))
    for form in FORMS.values():
        g = form(h)
        assert g.shape == (5,) and torch.isfinite(form(torch.zeros(2, 12))).all()
        torch.testing.assert_close(form(h.flip(0)), g.flip(0))


def test_a_network_that_learned_under_a_form_is_saved_and_loaded(digits, tmp_path):
    objective = GoodnessObjective(FORMS["top_k_squares"], symba_loss, alpha=1.0)
    network = ff.Network([64, 30])
    ff.train(network, digits, STRATEGIES["label_embedding"](10), objective=objective, epochs=1, progress=False)
    ff.save(network, tmp_path / "a.safetensors")
    other = ff.load_network(tmp_path / "a.safetensors")
    assert other.objectives[0].of_activity is FORMS["top_k_squares"]
    assert torch.equal(ff.predict(network, digits.x_test[:9]), ff.predict(other, digits.x_test[:9]))
