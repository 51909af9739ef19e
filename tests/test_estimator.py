"The scikit-learn estimator: none of scikit-learn's own checks fails, and tables are learned well untuned."

import pickle

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

import ff_research as ff
from ff_research.data import Images
from ff_research.network import Network
from ff_research.strategies import STRATEGIES


FOLDS = StratifiedKFold(5, shuffle=True, random_state=0)


def failed(estimator):
    found = check_estimator(estimator, on_fail=None, on_skip=None)
    assert len(found) > 40
    return [
        (check["check_name"], check["exception"]) for check in found if check["status"] not in ("passed", "skipped")
    ]


def test_none_of_scikit_learns_checks_fails():
    assert failed(ff.FFClassifier(epochs=10)) == []


def test_the_features_are_standardised_as_scikit_learn_does_it():
    x, y = load_wine(return_X_y=True)
    x = np.c_[x, np.full(len(x), 3.0)]  # a column that does not vary
    model = ff.FFClassifier(epochs=5, widths=(20, 20), random_state=0).fit(x, y)
    usual = StandardScaler().fit(x)
    assert np.allclose(model.mean_, usual.mean_) and np.allclose(model.scale_[:-1], usual.scale_[:-1])
    assert model._rows(x)[:, 0, 0, -1].abs().max() == 0
    assert len(ff.FFClassifier(epochs=0, widths=(20,)).fit(x, y).history_) == 0


@pytest.mark.slow
def test_none_of_scikit_learns_checks_fails_with_the_defaults():
    assert failed(ff.FFClassifier()) == []


@pytest.mark.slow
@pytest.mark.parametrize("fetch, most", [(load_wine, 5), (load_breast_cancer, 5), (load_digits, 4)])
def test_defaults_do_well_untuned(fetch, most):
    X, y = fetch(return_X_y=True)
    assert 100 * (1 - cross_val_score(ff.FFClassifier(random_state=0), X, y, cv=FOLDS).mean()) <= most


@pytest.mark.slow
def test_a_label_in_front_beats_one_that_is_written_over_features():
    X, y = load_wine(return_X_y=True)
    errors = {"front": [], "over": []}
    for train, test in FOLDS.split(X, y):
        scaler = StandardScaler().fit(X[train])
        x, x_test = (
            torch.tensor(scaler.transform(X[rows]), dtype=torch.float32)[:, None, None] for rows in (train, test)
        )
        table = Images("wine", x, torch.tensor(y[train]), x_test, torch.tensor(y[test]), 3)
        network = Network([13, 100, 100], inputs="plain")
        options = dict(epochs=200, lr=3e-3, optimizer="adamw", batch_size=32, precision="fp32", device="cpu")
        ff.train(network, table, STRATEGIES["all_labels"](3, alpha=8.0), progress=False, **options)
        errors["over"].append(ff.per_label_goodness(network, table, device="cpu", first=1))
        model = ff.FFClassifier(random_state=0).fit(X[train], y[train])
        errors["front"].append(100 * (1 - model.score(X[test], y[test])))
    assert np.mean(errors["front"]) < np.mean(errors["over"])


def test_it_is_searched_over_cloned_and_pickled_in_a_pipeline():
    X, y = load_wine(return_X_y=True)
    names = np.array(["a", "b", "c"])[y]
    pipeline = make_pipeline(StandardScaler(), ff.FFClassifier(epochs=20, random_state=0))
    search = GridSearchCV(pipeline, {"ffclassifier__widths": [(5,), (60, 60)]}, cv=3).fit(X, names)
    again = pickle.loads(pickle.dumps(search.best_estimator_))
    assert np.array_equal(again.predict_proba(X), search.predict_proba(X)) and set(again.predict(X)) == {"a", "b", "c"}
    assert np.array_equal(clone(search.best_estimator_).fit(X, names).predict(X), again.predict(X))


def test_its_network_is_saved_without_pickle(tmp_path):
    X, y = load_wine(return_X_y=True)
    model = ff.FFClassifier(epochs=20, random_state=0).fit(X, y)
    ff.save(model.network_, tmp_path / "wine.safetensors")
    network = ff.load_network(tmp_path / "wine.safetensors")
    rows = ((X - model.mean_) / model.scale_).astype(np.float32)
    guess = ff.predict(network, rows, first=1, precision="fp32", device="cpu")
    assert np.array_equal(np.array(network.class_names)[guess], model.predict(X))


def test_columns_that_say_nothing_do_no_harm():
    X, y = load_wine(return_X_y=True)
    wide = np.c_[np.full(len(X), 1e8), X, np.full(len(X), 0.1)]
    assert ff.FFClassifier(random_state=0).fit(wide, y).score(wide, y) > 0.97
