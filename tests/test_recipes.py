"""Recipes: runs that are pure, cut off, done twice or in several processes; rows that tell the truth about their origin."""

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
from ff_research import recipes
from ff_research.data import as_float, load
from ff_research.network import Network
from ff_research.readout import fit_probe, fit_ridge, linear_probe, probe_errors
from ff_research.recipes import RECIPES, Recipe, recipe, run, run_and_keep, run_many
from ff_research.results import DamagedRow, read_rows
from ff_research.training import Diverged

QUIET = dict(progress=False, device="cpu", precision="fp32")
TINY = replace(
    RECIPES["digits"], name="tiny", widths=(30, 30), epochs=3, full_gradient=False
)  # so that any method may take its place


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(RECIPES, "tiny", TINY)
    return TINY


def of(row):
    "What a rerun has to give again."
    return {key: row[key] for key in ("recipe", "seed", "config", "data", "errors", "curves")}


# Recipes


def tuples(v):
    "Lists, which JSON knows, as the tuples that a recipe holds, inner ones too."
    return tuple(map(tuples, v)) if isinstance(v, list) else v


@pytest.mark.parametrize("name", RECIPES)
def test_config_survives_json_and_holds_every_setting(name):
    config = recipes._config(RECIPES[name])
    assert json.loads(json.dumps(config)) == config
    assert Recipe(name, target=RECIPES[name].target, **{key: tuples(v) for key, v in config.items()}) == RECIPES[name]


def test_names_are_keys_and_make_safe_file_names():
    assert all(name == r.name and re.fullmatch(r"[a-z0-9-]+", name) for name, r in RECIPES.items())


def test_targets_name_their_source():
    assert all(re.search(r"\d.*\(.*\d{4}.*\)", r.target) for r in RECIPES.values() if r.target)


@pytest.mark.parametrize(
    "name, near", [("lowe", "loewe"), ("Backprop", "backprop"), ("hinton", "hinton-supervised"), ("", None), (7, None)]
)
def test_unknown_names(name, near):
    with pytest.raises(
        ValueError,
        match=f"did you mean '{near}'\\? `ff-research list`" if near else "unknown recipe .*; `ff-research list`",
    ):
        recipe(name)


# Runs


@pytest.mark.parametrize("method", ["ff", "backprop", "pairwise", "random", "pixels"])
def test_a_run_is_pure_and_leaves_no_trace(method):
    r = replace(TINY, method=method, epochs=2 if method in ("ff", "backprop", "pairwise") else 0, lr=0.01)
    state = torch.get_rng_state()
    first = run(r, 3, **QUIET)
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(5)
    assert of(run(r, 3, **QUIET)) == of(first)
    json.dumps(first, allow_nan=False)


def test_read_outs_of_each_method():
    errors = {
        method: run(replace(TINY, method=method, epochs=int(method in ("ff", "backprop", "pairwise"))), 0, **QUIET)[
            "errors"
        ]
        for method in recipes.METHODS
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


@pytest.mark.parametrize("method", ["ff", "backprop", "random", "pixels"])
def test_tuning_cannot_read_the_test_images(method, monkeypatch):
    r = replace(TINY, method=method, epochs=int(method in ("ff", "backprop")))
    expected = run(r, 0, **QUIET)["errors"]["validation"]
    unread = SimpleNamespace()
    monkeypatch.setattr(
        recipes, "load", lambda *a, load=recipes.load, **k: replace(load(*a, **k), x_test=unread, y_test=range(360))
    )
    with pytest.raises((AttributeError, TypeError)):
        run(r, 0, **QUIET)
    assert run(r, 0, test=False, **QUIET)["errors"] == dict(validation=expected)


def test_tuning_rows_are_not_kept(tiny, tmp_path):
    with pytest.raises(ValueError, match="not kept"):
        run_and_keep("tiny", 0, folder=tmp_path, test=False, **QUIET)
    assert list(tmp_path.iterdir()) == []


def test_the_validation_images_are_not_trained_on(monkeypatch):
    seen = []
    monkeypatch.setattr(
        recipes,
        "train",
        lambda network, images, *a, train=recipes.train, **k: seen.append(images) or train(network, images, *a, **k),
    )
    data = run(TINY, 0, **QUIET)["data"]
    whole = recipes.load("digits")
    assert torch.equal(seen[0].x_train, whole.x_train[: -data["validation"]]) and data["train"] + data[
        "validation"
    ] == len(whole.y_train)


def test_a_recipe_may_ask_for_all_images_but_not_in_a_search(monkeypatch):
    seen, fit = [], recipes._fit
    monkeypatch.setattr(
        recipes,
        "_fit",
        lambda r, network, images, *rest, **where: (
            seen.append(len(images.y_train)) or fit(r, network, images, *rest, **where)
        ),
    )
    whole = replace(TINY, all_images=True)
    row, trial, plain = run(whole, 0, **QUIET), run(whole, 0, test=False, **QUIET), run(TINY, 0, test=False, **QUIET)
    assert seen == [1437, 1137, 1137] and row["data"] == dict(name="digits", train=1437, validation=300, test=360)
    assert set(row["errors"]) == {"test"} and set(row["errors"]["test"]) == {"per_label", "probe"}
    assert trial["errors"] == plain["errors"] and trial["weights"] == plain["weights"] != row["weights"]


def test_a_refitted_probe_has_learned_the_held_out_images():
    digits = load("digits")
    f, f_test = (as_float(x).flatten(1) for x in (digits.x_train, digits.x_test))
    once, again = (probe_errors([f], [f_test], digits, fit_ridge, refit=refit) for refit in (False, True))
    chosen = fit_ridge(f[:-300], digits.y_train[:-300], 10, validation=(f[-300:], digits.y_train[-300:]))
    expected = fit_ridge(f, digits.y_train, 10, l2=(chosen.l2,)).error(f_test, digits.y_test)
    assert again == {"validation": once["validation"], "test": {"layer_1": expected}}


def test_a_run_that_diverges_leaves_no_row(tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPES, "wild", replace(TINY, name="wild", lr=1e29))
    with pytest.raises(Diverged, match="epoch 1, layer 1"):
        run_and_keep("wild", 0, folder=tmp_path, **QUIET)
    assert read_rows(tmp_path / "wild.jsonl") == []


# Keeping

KILLED = """
import os, signal, sys
from dataclasses import replace
from ff_research.recipes import RECIPES, run_and_keep
from ff_research.strategies import STRATEGIES
RECIPES["tiny"] = replace(RECIPES["digits"], name="tiny", widths=(30, 30), epochs=3, full_gradient=False)
strategy, left = STRATEGIES["label_embedding"], iter(range(30))
whole = strategy.streams
def cut(self, *arguments):
    if next(left, None) is None:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(self, *arguments)
strategy.streams = cut
run_and_keep("tiny", 0, folder=sys.argv[1], progress=False, device="cpu", precision="fp32")
"""


def test_killed_and_resumed_gives_the_unbroken_row(tiny, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    assert done.returncode == -signal.SIGKILL and read_rows(tmp_path / "tiny.jsonl") == []
    assert [path.name for path in (tmp_path / "checkpoints").glob("*.safetensors")] == ["tiny-0.safetensors"]
    assert of(run_and_keep("tiny", 0, folder=tmp_path, **QUIET)) == of(run(TINY, 0, **QUIET))
    assert list((tmp_path / "checkpoints").glob("*.safetensors")) == []


def test_a_row_that_cannot_be_written_costs_no_training(tiny, tmp_path, monkeypatch):
    path = tmp_path / "tiny.jsonl"

    def damaging(*arguments, run=recipes.run, **options):
        row = run(*arguments, **options)
        path.write_text('{"recipe": "ti')  # another process crashes while this run trains
        return row

    monkeypatch.setattr(recipes, "run", damaging)
    with pytest.raises(DamagedRow, match="line 1"):
        run_and_keep("tiny", 0, folder=tmp_path, **QUIET)
    monkeypatch.undo()
    monkeypatch.setitem(RECIPES, "tiny", TINY)
    path.unlink()
    monkeypatch.setattr(type(recipes.STRATEGIES["label_embedding"](10)), "streams", None)  # training again would fail
    assert run_and_keep("tiny", 0, folder=tmp_path, **QUIET)["seed"] == 0


def test_a_checkpoint_of_other_settings_is_refused(tiny, tmp_path, monkeypatch):
    run(TINY, 0, checkpoint=tmp_path / "checkpoints" / "tiny-0.safetensors", **QUIET)
    monkeypatch.setitem(RECIPES, "tiny", replace(TINY, lr=0.5))
    with pytest.raises(ValueError, match="belongs to another run: .*lr"):
        run_and_keep("tiny", 0, folder=tmp_path, **QUIET)


def test_rows_of_other_settings_do_not_count(tiny, tmp_path, monkeypatch):
    assert (
        run_and_keep("tiny", 0, folder=tmp_path, **QUIET) and run_and_keep("tiny", 0, folder=tmp_path, **QUIET) is None
    )
    monkeypatch.setitem(RECIPES, "tiny", replace(TINY, weight_decay=0.0))
    assert run_and_keep("tiny", 0, folder=tmp_path, **QUIET)["config"]["weight_decay"] == 0
    monkeypatch.setitem(RECIPES, "tiny", replace(TINY, target="another number"))
    assert run_and_keep("tiny", 0, folder=tmp_path, **QUIET) is None  # a target is no setting


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


def test_an_error_in_a_process_cancels_what_has_not_begun(tmp_path):
    jobs = [("nonsense", 0), *(("random-digits", seed) for seed in range(60))]
    with pytest.raises(ValueError, match="unknown recipe 'nonsense'"):
        list(recipes._in_processes(jobs, 1, dict(folder=tmp_path, device="cpu", precision="fp32")))
    assert len(read_rows(tmp_path / "random-digits.jsonl")) < 30


def test_jobs_come_seed_by_seed_and_once(monkeypatch):
    monkeypatch.setattr(recipes, "run_and_keep", lambda name, seed, **options: None)
    assert [job[:2] for job in run_many(["loewe", "random", "loewe"], [1, 0, 1])] == [
        ("loewe", 1),
        ("random", 1),
        ("loewe", 0),
        ("random", 0),
    ]


def fake_ray(sent):
    def remote(function):
        return SimpleNamespace(
            remote=lambda *arguments, **options: (
                sent.append(arguments) or (len(sent), lambda: function(*arguments, **options))
            )
        )

    return SimpleNamespace(remote=remote, wait=lambda tasks: (tasks[-1:], tasks[:-1]), get=lambda task: task[1]())


def test_ray_sends_what_is_missing_and_keeps_what_comes_back(tmp_path, monkeypatch):
    sent = []
    monkeypatch.setitem(sys.modules, "ray", fake_ray(sent))
    run_and_keep("pixels-digits", 1, folder=tmp_path, **QUIET)
    done = list(run_many(["pixels-digits"], range(3), engine="ray", folder=tmp_path, device="cpu", precision="fp32"))
    assert [(name, seed) for name, seed, _ in done] == [("pixels-digits", 2), ("pixels-digits", 0)]
    assert [seed for _, seed in sent] == [0, 2] and len(read_rows(tmp_path / "pixels-digits.jsonl")) == 3


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
    assert recipes._commit() is None
    git(tmp_path, "init", "-q")
    assert recipes._commit() is None  # no commit yet
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "a")
    git(tmp_path, "tag", "-a", "v1", "-m", "a")
    assert re.fullmatch("[0-9a-f]{12}", recipes._commit())
    module.write_text("edited = True\n")
    assert re.fullmatch("[0-9a-f]{12}-dirty", recipes._commit())
    monkeypatch.setenv("PATH", str(tmp_path))
    assert recipes._commit() is None


def test_rows_are_appended_to_the_folder_that_is_named(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("FF_RESEARCH_RESULTS", str(tmp_path / "from_environment"))
    monkeypatch.chdir(tmp_path)
    run_and_keep("pixels-digits", 0, **QUIET)
    assert (tmp_path / "from_environment" / "pixels-digits.jsonl").exists() and not Path("results").exists()


# Searches in stages, kept networks, measures

RIDGE = replace(TINY, name="ridge", objective="hinton", probes="ridge", epochs=1)


@pytest.fixture
def known(monkeypatch):
    "A recipe of the test's own among those of the book."
    monkeypatch.setitem(recipes.RECIPES, "ridge", RIDGE)
    return RIDGE


def test_a_stage_starts_from_the_best_so_far(known, tmp_path, monkeypatch):
    search = dict(lr=(1e-3, 1e-2)), dict(options=((("theta", 30),), (("theta", 120),)))
    monkeypatch.setitem(recipes.SEARCHES, "ridge", search)
    rows = list(recipes.tune("ridge", folder=tmp_path, **QUIET))
    first, second = [row["trial"] for row in rows[:2]], [row["trial"] for row in rows[2:]]
    best = min(rows[:2], key=recipes.validation_error)["trial"]["lr"]
    assert first == [{"lr": 1e-3}, {"lr": 1e-2}]
    assert second == [{"lr": best, "options": [["theta", theta]]} for theta in (30, 120)]
    assert all(row["config"]["options"] == row["trial"].get("options", []) for row in rows)
    assert all(
        set(row["errors"]["validation"]) == {"per_label", "ridge"} and "test" not in row["errors"] for row in rows
    )
    assert list(recipes.tune("ridge", folder=tmp_path, **QUIET)) == rows, "a second call makes nothing again"


def test_stages_of_a_recipe_without_a_search():
    with pytest.raises(ValueError, match="search"):
        recipes.stages("random")
    assert recipes.stages("symba") == [[dict(lr=lr) for lr in recipes.SEARCHES["symba"]["lr"]]]
    assert recipes.stages("loewe") == [list(recipes.SEARCHES["loewe"][0])] and recipes.stages("loewe")[0][0] == dict(
        epochs=100, weight_decay=3e-4
    )
    first, second = recipes.stages("scff-mnist")
    assert len(first) == 9 and len(second) == 26 and all(setting["epochs"] in (20, 29) for setting in first + second)


def test_ridge_probes_stand_under_a_name_of_their_own():
    errors = run(replace(RIDGE, widths=(60, 60, 60)), 0, **QUIET)["errors"]
    assert set(errors) == {"validation", "test"}
    for part in errors.values():
        assert list(part["ridge"]) == ["layer_1", "layer_2", "layer_3", "layers_2_to_3"] and "probe" not in part
        assert all(0 <= e <= 100 for e in part["ridge"].values())


def test_collaboration_is_a_setting_that_changes_the_network():
    alone, all_ = (run(replace(RIDGE, collaboration=mode), 0, **QUIET) for mode in (None, "all"))
    assert "collaboration" not in alone["config"] and all_["config"]["collaboration"] == "all"
    assert alone["weights"] != all_["weights"]
    with pytest.raises(ValueError, match="did you mean 'previous'"):
        replace(RIDGE, collaboration="previus")
    with pytest.raises(ValueError, match="did you mean 'ridge'"):
        replace(RIDGE, probes="rigde")


def test_centred_images_and_the_first_layer_read_are_settings():
    plain, middle, whole = (
        run(replace(RIDGE, widths=(60, 60, 60), **more), 0, **QUIET) for more in ({}, dict(centred=5.0), dict(first=1))
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
            replace(RIDGE, **wrong)


@pytest.mark.parametrize("method", ["ff", "backprop", "random"])
def test_a_pretext_task_takes_the_place_of_the_labels(method, known, tmp_path, monkeypatch):
    r = replace(
        RIDGE, method=method, epochs=int(method != "random"), pretext="rotation", centred=10.0, widths=(60, 60, 60)
    )
    monkeypatch.setitem(recipes.RECIPES, "ridge", r)
    row = run_and_keep("ridge", 1, folder=tmp_path, **QUIET)
    assert row["config"]["pretext"] == "rotation" and row["data"] == dict(
        name="digits, rotation, centred to 10", train=1137, validation=300, test=360
    )
    network, images = (
        recipes.trained(r, tmp_path / "networks" / "ridge-1.safetensors"),
        recipes.centred(recipes.load("digits")),
    )
    assert recipes._fingerprint(network) == row["weights"]
    if method == "backprop":
        turned = recipes.centred(recipes.pretext(recipes.load("digits"), "rotation"))
        assert network.head.out_features == 4 and row["errors"]["test"]["head"] == recipes.head_error(
            network, turned, device="cpu", precision="fp32"
        )
    found = recipes.measure("transfer", "ridge", 1, folder=tmp_path, device="cpu", precision="fp32")["transfer"]
    assert list(found) == ["digits"], "the true classes of the same pictures, upright"
    expected = recipes.transfer_row(
        network,
        (1, 8, 8),
        {"digits": images},
        neutral_label=4 if method == "ff" else False,
        shots=(1, 10),
        device="cpu",
        precision="fp32",
    )
    assert found == expected


def test_recipes_without_a_pretext_task_are_what_they_were():
    plain = run(RIDGE, 0, **QUIET)
    assert (
        "pretext" not in plain["config"]
        and plain["weights"] != run(replace(RIDGE, pretext="flip"), 0, **QUIET)["weights"]
    )
    for wrong, said in (
        ("rotaton", "did you mean 'rotation'"),
        ("", "unknown pretext of recipe 'ridge'"),
        (["flip"], "unknown pretext"),
        (0, "unknown pretext"),
    ):
        with pytest.raises(ValueError, match=said):
            replace(RIDGE, pretext=wrong)


def test_pretext_recipes_differ_from_their_talking_kin_in_the_task():
    likes = {"ff": "alone", "backprop": "backprop", "pairwise": "pairwise", "last": "pairwise", "no-peers": "alone"}
    assert sum(bool(r.pretext) for r in RECIPES.values()) == 18 and {r.pretext for r in RECIPES.values()} == {
        None,
        *recipes.PRETEXTS,
    }
    for name, r in RECIPES.items():
        if r.pretext:
            short, task, what = name.split("-", 2)
            assert task == r.pretext and (name in recipes.SEARCHES) == (what != "random")
            if what != "random":
                kin = RECIPES[f"{short}-talk-{likes[what]}"]
                searched = dict(
                    lr=kin.lr,
                    options=kin.options,
                    weight_decay=kin.weight_decay,
                    name=kin.name,
                    pretext=None,
                    first=kin.first,
                )
                searched |= dict(peer=0.03, full_gradient=True) if what == "no-peers" else {}
                assert replace(r, **searched) == kin and r.first == {"ff": 2, "no-peers": 2, "last": 3}.get(what, 1)
                assert sum(map(len, recipes.stages(name))) == 8


def test_pairwise_is_trained_on_the_layers_that_are_read(monkeypatch):
    seen = []
    monkeypatch.setattr(
        recipes,
        "train_backprop",
        lambda *a, train=recipes.train_backprop, **k: seen.append(k.get("first")) or train(*a, **k),
    )
    r = replace(RIDGE, method="pairwise", widths=(60, 60, 60))
    weights = {first: run(replace(r, first=first), 0, **QUIET)["weights"] for first in (1, 3, 9)}
    assert seen == [1, 3, 3] and weights[1] != weights[3] == weights[9]


def test_an_objective_without_scale_is_read_by_the_logarithm(tmp_path):
    r = replace(RIDGE, widths=(60, 60), objective="entropic", lr=0.1, first=1)
    row = run(r, 0, keep=tmp_path / "w", **QUIET)
    images = recipes.load("digits")
    assert row["errors"]["test"]["per_label"] == recipes.per_label_goodness(
        recipes.trained(r, tmp_path / "w"),
        images,
        first=1,
        goodness=recipes.log_goodness,
        device="cpu",
        precision="fp32",
    )


def test_parts_of_a_network_add_up_to_its_row(known, tmp_path, monkeypatch):
    monkeypatch.setitem(recipes.RECIPES, "ridge", replace(RIDGE, widths=(60, 60, 60), first=1, centred=10.0, epochs=3))
    row = recipes.run_and_keep("ridge", 0, folder=tmp_path, **QUIET)
    where = dict(folder=tmp_path, device="cpu", precision="fp32")
    parts = recipes.measure("parts", "ridge", 0, **where)["parts"]
    assert parts["sum"]["together"] == pytest.approx(row["errors"]["test"]["per_label"], abs=1e-3)
    for entropy in (parts["entropy"], parts["labels"]):
        assert entropy["total"] == pytest.approx(
            entropy["between"] + entropy["joint"] + entropy["interaction"], abs=3e-4
        )
    course = recipes.measure("course", "ridge", 0, **where)["course"]
    assert (
        len(course) == 4
        and course[-1]["error"] < course[0]["error"]
        and all(len(course[0][key]) == 3 for key in ("g_pos", "g_neg", "entropy_pos", "entropy_neg"))
    )
    travel = recipes.measure("travel", "ridge", 0, **where)["travel"]
    assert (
        len(travel) == 4
        and travel[-1]["home"] != travel[0]["home"]
        and set(travel[0]["away"]) == {"layer_1", "layer_2", "layer_3", "layers_2_to_3"}
    )
    tuned = recipes.measure("tuned", "ridge", 0, **where)["tuned"]["digits"]
    assert set(tuned) == {"few", "all"} and all(
        found["test"] < 30 and found["lr"] in (0.01, 0.03) for found in tuned.values()
    )
    read, moved = (recipes.measure(kind, "ridge", 0, **where)[kind]["digits"] for kind in ("reach", "transfer"))
    assert read["errors"]["usual"]["test"] == {name: moved["test"][name] for name in ("layer_1", "layers_2_to_3")}
    monkeypatch.setitem(recipes.RECIPES, "ridge", replace(RIDGE, method="random", epochs=0))
    with pytest.raises(ValueError, match="no labels to read"):
        recipes.measure("parts", "ridge", 0, **where)


@pytest.mark.parametrize("method", ["ff", "backprop", "pairwise", "random"])
def test_a_kept_network_is_the_one_that_was_measured(method, tmp_path):
    r = replace(RIDGE, method=method, epochs=0 if method == "random" else 1)
    row = run(r, 2, keep=tmp_path / "deep" / "w.safetensors", **QUIET)
    network = recipes.trained(r, tmp_path / "deep" / "w.safetensors")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["w.safetensors"]
    assert recipes._fingerprint(network) == row["weights"]


def test_weights_that_are_not_the_recipes(tmp_path):
    path = tmp_path / "w.safetensors"
    run(RIDGE, 0, keep=path, test=False, probe=False, **QUIET)
    with pytest.raises(ValueError, match="another network than that of recipe 'ridge'"):
        recipes.trained(replace(RIDGE, widths=(61, 60)), path)
    with pytest.raises(ValueError, match="another network"):
        recipes.trained(replace(RIDGE, method="backprop"), path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="holds no weights"):
        recipes.trained(RIDGE, path)
    with pytest.raises(ValueError, match="holds no weights"):
        recipes.trained(RIDGE, tmp_path / "nothing")


@pytest.mark.parametrize("kind", recipes.MEASURES)
def test_a_measure_needs_no_second_training(known, kind, tmp_path, monkeypatch):
    _, row = (recipes.run_and_keep("ridge", seed, folder=tmp_path, **QUIET) for seed in (1, 0))
    trained_again = []
    monkeypatch.setattr(recipes, "run", lambda *a, **k: trained_again.append(a))
    measured = recipes.measure(kind, "ridge", 0, folder=tmp_path, device="cpu", precision="fp32")
    assert (
        not trained_again
        and measured["weights"] == row["weights"]
        and measured["config"] == row["config"]
        and measured[kind]
    )
    assert recipes.measure(kind, "ridge", 0, folder=tmp_path) is None
    assert recipes.measured(kind, "ridge", tmp_path) == [measured]
    assert json.loads(json.dumps(measured)) == measured


def test_a_network_that_was_not_kept_is_trained_for_its_measure(known, tmp_path):
    row = recipes.run_and_keep("ridge", 1, folder=tmp_path, **QUIET)
    (tmp_path / "networks" / "ridge-1.safetensors").unlink()
    assert (
        recipes.measure("diagnostics", "ridge", 1, folder=tmp_path, device="cpu", precision="fp32")["weights"]
        == row["weights"]
    )


def test_networks_are_compared_with_their_start_their_kin_and_backprop(known, tmp_path, monkeypatch):
    monkeypatch.setitem(recipes.RECIPES, "rival", replace(RIDGE, name="rival", method="backprop"))
    found = recipes.measure("cka", "ridge", 4, folder=tmp_path, device="cpu", precision="fp32")["cka"]
    assert list(found) == ["itself", "start", "kin", "backprop"]
    assert {p.name for p in (tmp_path / "networks").iterdir()} == {
        "ridge-4.safetensors",
        "ridge-0.safetensors",
        "rival-4.safetensors",
    }
    for name, table in found.items():
        table = torch.tensor(table)
        assert (
            table.shape == (2, 2)
            and (table <= 1).all()
            and (torch.allclose(table.diag(), torch.ones(2)) == (name == "itself"))
        )
    other = recipes.measure("cka", "rival", 4, folder=tmp_path, device="cpu", precision="fp32")["cka"]
    assert other["backprop"] == other["itself"]
    monkeypatch.setitem(recipes.RECIPES, "ridge", replace(RIDGE, lr=0.0))  # as it started
    found = recipes.measure("cka", "ridge", 0, folder=tmp_path, device="cpu", precision="fp32")["cka"]
    assert found["start"][0][0] > 0.98 and found["kin"][0][0] < found["start"][0][0]


def test_impossible_measures(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'transfer'"):
        recipes.measure("transfr", "random", folder=tmp_path)
    with pytest.raises(ValueError, match="'pixels' has no network"):
        recipes.measure("transfer", "pixels", folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_network_of_other_settings_is_not_measured(known, tmp_path, monkeypatch):
    recipes.run_and_keep("ridge", 0, folder=tmp_path, **QUIET)
    monkeypatch.setitem(recipes.RECIPES, "ridge", replace(RIDGE, lr=2 * RIDGE.lr))
    row = recipes.run_and_keep("ridge", 0, folder=tmp_path / "fresh", **QUIET)
    assert (
        recipes.measure("diagnostics", "ridge", 0, folder=tmp_path, device="cpu", precision="fp32")["weights"]
        == row["weights"]
    )


def test_options_of_the_strategy_a_rate_for_each_layer_and_joined_layers():
    own = Recipe(
        "own",
        "digits",
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
    plain = run(replace(own, strategy_options=(), lr=(0.003, 0.0)), 0, progress=False)
    assert row["weights"] != plain["weights"] and "strategy_options" not in plain["config"]


def test_readings_are_further_probes_of_the_same_network():
    own = Recipe(
        "own",
        "digits",
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
    row, plain = (run(r, 0, progress=False, device="cpu", precision="fp32") for r in (own, replace(own, readings=())))
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
    still = run(replace(own, epochs=0, method="random"), 0, progress=False, device="cpu", precision="fp32")["errors"][
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
    assert recipes.validation_error(row) == row["errors"]["validation"]["ridge"]["layers_1_to_2"]


def test_epochs_for_each_layer(tmp_path):
    own = Recipe(
        "own",
        "digits",
        widths=(20, 20),
        strategy="self_contrastive",
        epochs=(2, 1),
        schedule="greedy",
        lr=(0.003, 0.002),
        optimizer="adamw",
        probes="ridge",
        joined=1,
    )
    assert own.length == "2 + 1" and replace(own, epochs=3).length == "3"
    row = run(own, 0, progress=False, checkpoint=tmp_path / "run.safetensors")
    assert row["config"]["epochs"] == [2, 1] and [len(epoch) for epoch in row["curves"]["loss"]] == [1, 1, 1]
    assert (
        run(own, 0, progress=False, checkpoint=tmp_path / "run.safetensors")["weights"]
        == row["weights"]
        != run(replace(own, epochs=(2, 2)), 0, progress=False)["weights"]
    )


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(strategy_options=(("shfit", 2),)), "has no option 'shfit'; it has thetas"),
        (dict(strategy_options=("shift",)), "pairs"),
        (dict(lr=()), "one for each layer"),
        (dict(lr=(0.1, -1.0)), "one for each layer"),
        (dict(lr=(0.1, 0.1)), "needs method='ff' and 3 of them"),
        (dict(lr=(0.1, 0.1, 0.1), method="backprop"), "needs method='ff'"),
        (dict(joined=0), "joined=0"),
        (dict(readings="smooth"), "readings='smooth'; expected a tuple"),
        (dict(readings=("shrp",)), "names from smooth, sharp"),
        (dict(readings=([],)), "names from smooth"),
        (dict(readings=("smooth",), method="pixels"), "method='pixels' has none"),
        (dict(epochs=()), "a tuple with one for each layer"),
        (dict(epochs=(1, 1.5, 2)), "a tuple with one for each layer"),
        (dict(epochs=(1, 1, 1)), "schedule='greedy'"),
        (dict(epochs=(1, 1), schedule="greedy"), "and 3 of them"),
        (dict(epochs=(1, 1, 1), schedule="greedy", method="backprop"), "need method='ff'"),
        *(
            (dict(full_gradient=True, method=method), "the gradient that there is")
            for method in ("backprop", "pairwise")
        ),
    ],
)
def test_bad_options_of_a_recipe(change, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        Recipe("own", "digits", strategy="self_contrastive", **change)
