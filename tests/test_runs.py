"""Runs that are pure, cut off, done twice or in several processes; rows that tell the truth about their origin."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import ff_research
from ff_research import jobs, runs
from ff_research.data import as_float, load
from ff_research.entropy import log_goodness
from ff_research.network import Network
from ff_research.readout import fit_probe, fit_ridge, linear_probe, per_label_goodness, probe_errors
from ff_research.recipes import METHODS, RECIPES, Recipe
from ff_research.results import DamagedRow, read_rows, value
from ff_research.jobs import run_many
from ff_research.runs import commit, fingerprint, rows_of, run, run_and_keep, trained
from ff_research.searches import validation_error
from ff_research.statistics import wrong_images
from ff_research.strategies import STRATEGIES
from ff_research.training import Diverged

QUIET = dict(progress=False, device="cpu", precision="fp32")
TINY = RECIPES["digits"].vary(  # without the full gradient, so that any method may take its place
    name="tiny", widths=(30, 30), epochs=3, full_gradient=False, search=()
)
RIDGE = TINY.vary(name="ridge", objective="hinton", probes="ridge", epochs=1)


def of(row):
    "What a rerun has to give again."
    return {key: row[key] for key in ("recipe", "seed", "config", "data", "errors", "curves")}


@pytest.mark.parametrize("method", ["ff", "backprop", "pairwise", "random", "pixels"])
def test_a_run_is_pure_and_leaves_no_trace(method):
    r = TINY.vary(method=method, epochs=2 if method in ("ff", "backprop", "pairwise") else 0, lr=0.01)
    state = torch.get_rng_state()
    first = run(r, 3, **QUIET)
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(5)
    assert of(run(r, 3, **QUIET)) == of(first)
    json.dumps(first, allow_nan=False)


@pytest.mark.parametrize(
    "name, changes, said",
    [
        ("mono-forward-digits", dict(widths=(16, 32)), "pool has 3 entries for 2 layers"),
        (
            "mono-forward-digits",
            dict(strategy="local_classifier", strategy_options=(("head", "pool"),)),
            "unknown head",
        ),
        ("cwcomp-digits", dict(widths=(20, 25, 40, 40)), "layer 2 has 25 channels"),
    ],
)
def test_errors_about_settings_name_the_recipe(name, changes, said):
    wrong = RECIPES[name].vary(name="mine", **changes)
    with pytest.raises(ValueError, match=f"^recipe 'mine': .*{said}"):
        run(wrong, 0, **QUIET)


def test_read_outs_of_each_method():
    errors = {
        method: run(TINY.vary(method=method, epochs=int(method in ("ff", "backprop", "pairwise"))), 0, **QUIET)[
            "errors"
        ]
        for method in METHODS
    }
    for part in ("validation", "test"):
        assert {method: sorted(e[part]) for method, e in errors.items()} == dict(
            ff=["per_label", "probe"],
            pairwise=["per_label", "probe"],
            backprop=["head", "probe"],
            random=["probe"],
            pixels=["probe"],
        )
    assert errors["pixels"]["test"]["probe"].keys() == {"pixels"} and errors["ff"]["test"]["probe"].keys() == {
        "layer_1",
        "layer_2",
    }


@pytest.mark.parametrize(
    ("what", "name", "key"),
    [
        ({}, "labels", "per_label"),
        (dict(method="backprop"), "head", "head"),
        (dict(strategy="mono_forward", objective=None), "scores", "scores.sum"),
    ],
)
def test_a_row_says_which_images_each_read_out_got_wrong(what, name, key):
    row = run(TINY.vary(epochs=1, lr=0.01, **what), 0, **QUIET)
    joined = [k for k in ("probe", "ridge") if k in row["errors"]["test"]][:1]
    assert row["wrong"].keys() == {name, *(["probe"] if joined else [])}
    (mask,) = wrong_images([row], f"errors.test.{key}")
    assert len(mask) == row["data"]["test"] and 100 * mask.mean() == pytest.approx(value(row, f"errors.test.{key}"))


@pytest.mark.parametrize("method", ["ff", "backprop", "random", "pixels"])
def test_tuning_cannot_read_the_test_images(method, monkeypatch):
    r = TINY.vary(method=method, epochs=int(method in ("ff", "backprop")))
    expected = run(r, 0, **QUIET)["errors"]["validation"]
    unread = SimpleNamespace()
    monkeypatch.setattr(
        runs, "load", lambda *a, load=runs.load, **k: replace(load(*a, **k), x_test=unread, y_test=range(360))
    )
    with pytest.raises((AttributeError, TypeError)):
        run(r, 0, **QUIET)
    assert run(r, 0, test=False, **QUIET)["errors"] == dict(validation=expected)


def test_tuning_rows_are_not_kept(tmp_path):
    with pytest.raises(ValueError, match="not kept"):
        run_and_keep(TINY, 0, folder=tmp_path, test=False, **QUIET)
    assert list(tmp_path.iterdir()) == []


def test_the_validation_images_are_not_trained_on(monkeypatch):
    seen = []
    monkeypatch.setattr(
        runs,
        "train",
        lambda network, images, *a, train=runs.train, **k: seen.append(images) or train(network, images, *a, **k),
    )
    data = run(TINY, 0, **QUIET)["data"]
    whole = load("digits")
    assert torch.equal(seen[0].x_train, whole.x_train[: -data["validation"]]) and data["train"] + data[
        "validation"
    ] == len(whole.y_train)


def test_a_recipe_may_ask_for_all_images_but_not_in_a_search(monkeypatch):
    seen, fit = [], runs.fit
    monkeypatch.setattr(
        runs,
        "fit",
        lambda r, network, images, *rest, **where: (
            seen.append(len(images.y_train)) or fit(r, network, images, *rest, **where)
        ),
    )
    whole = TINY.vary(all_images=True)
    row, trial, plain = run(whole, 0, **QUIET), run(whole, 0, test=False, **QUIET), run(TINY, 0, test=False, **QUIET)
    assert seen == [1437, 1137, 1137] and row["data"] | {"checksum": ""} == dict(
        name="digits", checksum="", train=1437, validation=300, test=360
    )
    assert set(row["errors"]) == {"test"} and set(row["errors"]["test"]) == {"per_label", "probe"}
    assert trial["errors"] == plain["errors"] and trial["weights"] == plain["weights"] != row["weights"]


def test_a_refitted_probe_has_learned_the_held_out_images():
    digits = load("digits")
    f, f_test = (as_float(x).flatten(1) for x in (digits.x_train, digits.x_test))
    once, again = (probe_errors([f], [f_test], digits, fit_ridge, refit=refit) for refit in (False, True))
    chosen = fit_ridge(f[:-300], digits.y_train[:-300], 10, validation=(f[-300:], digits.y_train[-300:]))
    expected = fit_ridge(f, digits.y_train, 10, l2=(chosen.l2,)).error(f_test, digits.y_test)
    assert again == {"validation": once["validation"], "test": {"layer_1": expected}}


def test_a_run_that_diverges_leaves_no_row(tmp_path):
    with pytest.raises(Diverged, match="epoch 1, layer 1"):
        run_and_keep(TINY.vary(name="wild", lr=1e29), 0, folder=tmp_path, **QUIET)
    assert read_rows(tmp_path / "wild.jsonl") == []


# Settings


def test_ridge_probes_stand_under_a_name_of_their_own():
    errors = run(RIDGE.vary(widths=(60, 60, 60)), 0, **QUIET)["errors"]
    assert set(errors) == {"validation", "test"}
    for part in errors.values():
        assert list(part["ridge"]) == ["layer_1", "layer_2", "layer_3", "layers_2_to_3"] and "probe" not in part
        assert all(0 <= e <= 100 for e in part["ridge"].values())


def test_collaboration_is_a_setting_that_changes_the_network():
    alone, all_ = (run(RIDGE.vary(collaboration=mode), 0, **QUIET) for mode in (None, "all"))
    assert "collaboration" not in alone["config"] and all_["config"]["collaboration"] == "all"
    assert alone["weights"] != all_["weights"]
    with pytest.raises(ValueError, match="did you mean 'previous'"):
        RIDGE.vary(collaboration="previus")
    with pytest.raises(ValueError, match="did you mean 'ridge'"):
        RIDGE.vary(probes="rigde")


def test_centred_images_and_the_first_layer_read_are_settings():
    plain, middle, whole = (
        run(RIDGE.vary(widths=(60, 60, 60), **more), 0, **QUIET) for more in ({}, dict(centred=5.0), dict(first=1))
    )
    assert (
        {"centred", "first"}.isdisjoint(plain["config"])
        and middle["config"]["centred"] == 5.0
        and whole["config"]["first"] == 1
    )
    assert plain["weights"] == whole["weights"] != middle["weights"]
    assert (
        plain["errors"]["test"]["per_label"] != whole["errors"]["test"]["per_label"]
        and plain["errors"]["test"]["ridge"] == whole["errors"]["test"]["ridge"]
    )
    assert middle["data"]["name"] == "digits, centred to 5" and middle["data"]["validation"] == 300
    for wrong in (dict(centred=-1.0), dict(centred=float("inf")), dict(first=0), dict(first=1.5)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            RIDGE.vary(**wrong)


def test_recipes_without_a_pretext_task_are_what_they_were():
    plain = run(RIDGE, 0, **QUIET)
    assert (
        "pretext" not in plain["config"] and plain["weights"] != run(RIDGE.vary(pretext="flip"), 0, **QUIET)["weights"]
    )
    for wrong, said in (
        ("rotaton", "did you mean 'rotation'"),
        ("", "recipe 'ridge': pretext = ''; Known: rotation"),
        (["flip"], "pretext = .*Known: rotation"),
        (0, "pretext = 0; Known: rotation"),
    ):
        with pytest.raises(ValueError, match=said):
            RIDGE.vary(pretext=wrong)


def test_pairwise_is_trained_on_the_layers_that_are_read(monkeypatch):
    seen = []
    monkeypatch.setattr(
        runs,
        "train_backprop",
        lambda *a, train=runs.train_backprop, **k: seen.append(k.get("first")) or train(*a, **k),
    )
    r = RIDGE.vary(method="pairwise", widths=(60, 60, 60))
    weights = {first: run(r.vary(first=first), 0, **QUIET)["weights"] for first in (1, 3, 9)}
    assert seen == [1, 3, 3] and weights[1] != weights[3] == weights[9]


def test_an_objective_without_scale_is_read_by_the_logarithm(tmp_path):
    r = RIDGE.vary(widths=(60, 60), objective="entropic", lr=0.1, first=1)
    row = run(r, 0, keep=tmp_path / "w", **QUIET)
    images = load("digits")
    assert row["errors"]["test"]["per_label"] == per_label_goodness(
        trained(r, tmp_path / "w"),
        images,
        first=1,
        goodness=log_goodness,
        device="cpu",
        precision="fp32",
    )


def test_options_of_the_strategy_a_rate_for_each_layer_and_joined_layers():
    own = Recipe(name="own", data="digits").vary(
        widths=(20, 20),
        strategy="self_contrastive",
        strategy_options=(("shift", 1),),
        epochs=1,
        lr=(0.003, 0.0),
        optimizer="adamw",
        probes="ridge",
        joined=1,
    )
    row = run(own, 0, progress=False)
    assert list(row["errors"]["test"]["ridge"]) == ["layer_1", "layer_2", "layers_1_to_2"]
    assert (
        row["config"]["strategy_options"] == [["shift", 1]]
        and row["config"]["lr"] == [0.003, 0.0]
        and row["config"]["joined"] == 1
    )
    plain = run(own.vary(strategy_options=(), lr=(0.003, 0.0)), 0, progress=False)
    assert row["weights"] != plain["weights"] and "strategy_options" not in plain["config"]


def test_readings_are_further_probes_of_the_same_network():
    own = Recipe(name="own", data="digits").vary(
        widths=(20, 20),
        strategy="self_contrastive",
        epochs=1,
        lr=0.003,
        optimizer="adamw",
        triangle=True,
        probes="ridge",
        joined=1,
        readings=("smooth", "sharp"),
    )
    row, plain = (run(r, 0, progress=False, device="cpu", precision="fp32") for r in (own, own.vary(readings=())))
    assert (
        row["weights"] == plain["weights"]
        and row["config"]["readings"] == ["smooth", "sharp"]
        and "readings" not in plain["config"]
    )
    for part in ("validation", "test"):
        assert (
            list(row["errors"][part]) == ["ridge", "smooth", "sharp"]
            and row["errors"][part]["ridge"] == plain["errors"][part]["ridge"]
        )
        assert row["errors"][part]["smooth"] != row["errors"][part]["sharp"]
    still = run(own.vary(epochs=0, method="random"), 0, progress=False, device="cpu", precision="fp32")["errors"][
        "test"
    ]
    images, network = load("digits"), Network([64, 20, 20], seed=0, triangle=True)
    for name, power in (("smooth", 1), ("sharp", 2)):
        seen = linear_probe(
            network,
            images,
            neutral_label=False,
            fit=partial(fit_probe, smoothing=0.1),
            joined=1,
            power=power,
            precision="fp32",
            device="cpu",
        )["test"]
        assert still[name] == {key: round(error, 4) for key, error in seen.items()}
    assert validation_error(row) == row["errors"]["validation"]["ridge"]["layers_1_to_2"]


def test_epochs_for_each_layer(tmp_path):
    own = Recipe(name="own", data="digits").vary(
        widths=(20, 20),
        strategy="self_contrastive",
        epochs=(2, 1),
        schedule="greedy",
        lr=(0.003, 0.002),
        optimizer="adamw",
        probes="ridge",
        joined=1,
    )
    assert own.length == "2 + 1" and own.vary(epochs=3).length == "3"
    row = run(own, 0, progress=False, checkpoint=tmp_path / "run.safetensors")
    assert row["config"]["epochs"] == [2, 1] and [len(epoch) for epoch in row["curves"]["loss"]] == [1, 1, 1]
    assert (
        run(own, 0, progress=False, checkpoint=tmp_path / "run.safetensors")["weights"]
        == row["weights"]
        != run(own.vary(epochs=(2, 2)), 0, progress=False)["weights"]
    )


# Keeping


KILLED = """
import os, signal, sys
from ff_research.recipes import RECIPES
from ff_research.runs import run_and_keep
from ff_research.strategies import STRATEGIES
tiny = RECIPES["digits"].vary(name="tiny", widths=(30, 30), epochs=3, full_gradient=False)
strategy, left = STRATEGIES["label_embedding"], iter(range(30))
whole = strategy.streams
def cut(self, *arguments):
    if next(left, None) is None:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(self, *arguments)
strategy.streams = cut
run_and_keep(tiny, 0, folder=sys.argv[1], progress=False, device="cpu", precision="fp32")
"""


def test_killed_and_resumed_gives_the_unbroken_row(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    assert done.returncode == -signal.SIGKILL and read_rows(tmp_path / "tiny.jsonl") == []
    assert [path.name for path in (tmp_path / "checkpoints").glob("*.safetensors")] == ["tiny-0.safetensors"]
    assert of(run_and_keep(TINY, 0, folder=tmp_path, **QUIET)) == of(run(TINY, 0, **QUIET))
    assert list((tmp_path / "checkpoints").glob("*.safetensors")) == []


def test_a_row_that_cannot_be_written_costs_no_training(tmp_path, monkeypatch):
    path = tmp_path / "tiny.jsonl"

    def damaging(*arguments, run=runs.run, **options):
        row = run(*arguments, **options)
        path.write_text('{"recipe": "ti')  # another process crashes while this run trains
        return row

    monkeypatch.setattr(runs, "run", damaging)
    with pytest.raises(DamagedRow, match="line 1"):
        run_and_keep(TINY, 0, folder=tmp_path, **QUIET)
    monkeypatch.undo()
    path.unlink()
    monkeypatch.setattr(STRATEGIES["label_embedding"], "streams", None)  # training again would fail
    assert run_and_keep(TINY, 0, folder=tmp_path, **QUIET)["seed"] == 0


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    run(TINY, 0, checkpoint=tmp_path / "checkpoints" / "tiny-0.safetensors", **QUIET)
    with pytest.raises(ValueError, match="belongs to another run: .*lr"):
        run_and_keep(TINY.vary(lr=0.5), 0, folder=tmp_path, **QUIET)


def test_rows_of_other_settings_do_not_count(tmp_path):
    assert run_and_keep(TINY, 0, folder=tmp_path, **QUIET) and run_and_keep(TINY, 0, folder=tmp_path, **QUIET) is None
    other = TINY.vary(weight_decay=0.0)
    assert run_and_keep(other, 0, folder=tmp_path, **QUIET)["config"]["weight_decay"] == 0
    assert run_and_keep(other.vary(target="another number"), 0, folder=tmp_path, **QUIET) is None, "no setting"


def test_rows_under_an_old_name_count(tmp_path):
    old = run_and_keep(TINY, 0, folder=tmp_path, **QUIET)
    now = TINY.vary(name="renamed", alias=("tiny",))
    assert run_and_keep(now, 0, folder=tmp_path, **QUIET) is None and rows_of(now, tmp_path) == [old]
    assert [row for _, _, row in run_many(["tiny"], [0], recipes={"renamed": now}, folder=tmp_path, **QUIET)] == [None]
    assert run_and_keep(now.vary(alias=()), 0, folder=tmp_path, **QUIET)["recipe"] == "renamed"


def test_a_recipe_is_found_in_the_table_that_is_passed(tmp_path):
    assert run("tiny", 0, recipes={"tiny": TINY}, **QUIET)["recipe"] == "tiny"
    with pytest.raises(ValueError, match="unknown recipe 'tiny'"):
        run("tiny", 0, **QUIET)
    with pytest.raises(ValueError, match="unknown recipe 'loewe'; did you mean"):
        run_and_keep("loewe", 0, recipes={"lowe": TINY}, folder=tmp_path)


@pytest.mark.parametrize("method", ["ff", "backprop", "pairwise", "random"])
def test_a_kept_network_is_the_one_that_was_measured(method, tmp_path):
    r = RIDGE.vary(method=method, epochs=0 if method == "random" else 1)
    row = run(r, 2, keep=tmp_path / "deep" / "w.safetensors", **QUIET)
    network = trained(r, tmp_path / "deep" / "w.safetensors")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["w.safetensors"]
    assert fingerprint(network) == row["weights"]


def test_weights_that_are_not_the_recipes(tmp_path):
    path = tmp_path / "w.safetensors"
    run(RIDGE, 0, keep=path, test=False, probe=False, **QUIET)
    with pytest.raises(ValueError, match="another network than that of recipe 'ridge'"):
        trained(RIDGE.vary(widths=(61, 60)), path)
    with pytest.raises(ValueError, match="another network"):
        trained(RIDGE.vary(method="backprop"), path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="holds no weights"):
        trained(RIDGE, path)
    with pytest.raises(ValueError, match="holds no weights"):
        trained(RIDGE, tmp_path / "nothing")


def test_rows_are_appended_to_the_folder_that_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("FF_RESEARCH_RESULTS", str(tmp_path / "from_environment"))
    monkeypatch.chdir(tmp_path)
    run_and_keep("pixels-digits", 0, **QUIET)
    assert (tmp_path / "from_environment" / "pixels-digits.jsonl").exists() and not Path("results").exists()


# Many


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(names=["random-digits", "pixel"]), "did you mean 'pixels'"),
        (dict(engine="slurm"), "known: local, ray"),
        (dict(workers=0), "at least 1"),
    ],
)
def test_mistakes_are_found_before_anything_runs(options, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        next(run_many(**dict(names=["random-digits"], seeds=[0], folder=tmp_path / "results") | options))
    assert not (tmp_path / "results").exists()


def test_processes_give_the_rows_that_one_process_gives(tmp_path):
    names, seeds = ["pixels-digits", "random-digits"], range(2)
    options = dict(device="cpu", precision="fp32")
    many = list(run_many(names, seeds, workers=2, folder=tmp_path / "many", **options))
    one = list(run_many(names, seeds, folder=tmp_path / "one", **options))
    assert {(name, seed): of(row) for name, seed, row in many} == {(name, seed): of(row) for name, seed, row in one}
    assert [len(read_rows(tmp_path / "many" / f"{name}.jsonl")) for name in names] == [2, 2]
    assert [row for _, _, row in run_many(names, seeds, workers=2, folder=tmp_path / "many", **options)] == [None] * 4


@pytest.mark.slow
def test_an_error_in_a_process_cancels_what_has_not_begun(tmp_path):
    wild, still = TINY.vary(name="wild", lr=1e29), RECIPES["random-digits"]
    jobs = run_many([wild, *(still.vary(name=f"still-{n}") for n in range(30))], [0, 1], workers=2, folder=tmp_path)
    with pytest.raises(Diverged):
        list(jobs)
    assert len(list(tmp_path.glob("still-*.jsonl"))) < 30


@pytest.mark.slow
def test_processes_know_recipes_that_are_not_the_books(tmp_path):
    done = list(run_many(["tiny"], range(2), recipes={"tiny": TINY}, workers=2, folder=tmp_path, device="cpu"))
    assert sorted((name, seed) for name, seed, _ in done) == [("tiny", 0), ("tiny", 1)]
    assert len(read_rows(tmp_path / "tiny.jsonl")) == 2


def test_jobs_come_seed_by_seed_and_once(monkeypatch):
    monkeypatch.setattr(jobs, "run_and_keep", lambda name, seed, **options: None)
    assert [job[:2] for job in run_many(["loewe", "random", "loewe"], [1, 0, 1])] == [
        ("loewe", 1),
        ("random", 1),
        ("loewe", 0),
        ("random", 0),
    ]


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"ff_research\[ray\]"):
        list(run_many(["pixels-digits"], [0], engine="ray"))


# Origin


def git(folder, *arguments):
    subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@example.org", "-C", str(folder), *arguments],
        check=True,
        capture_output=True,
    )


def test_commit_tells_a_clean_tree_from_an_edited_one(tmp_path, monkeypatch):
    module = tmp_path / "ff_research" / "__init__.py"
    module.parent.mkdir()
    module.write_text("")
    monkeypatch.setattr(ff_research, "__file__", str(module))
    assert commit() is None
    git(tmp_path, "init", "-q")
    assert commit() is None  # no commit yet
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "a")
    git(tmp_path, "tag", "-a", "v1", "-m", "a")
    assert re.fullmatch("[0-9a-f]{12}", commit())
    module.write_text("edited = True\n")
    assert re.fullmatch("[0-9a-f]{12}-dirty", commit())
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit() is None


def test_a_recipe_may_ask_for_few_labels_too():
    "Of each class, in the row's errors on the test images; a search, which does not read these, has none."
    recipe = TINY.vary(shots=(1, 5))
    few = run(recipe, 0, **QUIET)["errors"]["test"]["low_shot"]
    assert few.keys() == {"1", "5"} and 90 > few["1"] > few["5"]
    assert "low_shot" not in run(recipe, 0, test=False, **QUIET)["errors"]["validation"]
    assert "shots" not in TINY.identity() and recipe.identity()["shots"] == [1, 5]
