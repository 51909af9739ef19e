"""Measures: answers that belong to the very network that was kept, and come once."""

import json

import pytest
import torch

from ff_research import measures
from ff_research.data import centred, load
from ff_research.measures import MEASURES, measure, measured, publish_measures
from ff_research.pretext import pretext
from ff_research.readout import head_error
from ff_research.recipes import RECIPES
from ff_research.runs import fingerprint, run_and_keep, trained
from ff_research.transfer import transfer_row

QUIET = dict(progress=False, device="cpu", precision="fp32")
RIDGE = RECIPES["digits"].vary(
    name="ridge", widths=(30, 30), full_gradient=False, objective="hinton", probes="ridge", epochs=1, search=()
)


@pytest.mark.parametrize("method", ["ff", "backprop", "random"])
def test_a_pretext_task_takes_the_place_of_the_labels(method, tmp_path):
    r = RIDGE.vary(method=method, epochs=int(method != "random"), pretext="rotation", centred=10.0, widths=(60, 60, 60))
    row = run_and_keep(r, 1, folder=tmp_path, **QUIET)
    assert row["config"]["pretext"] == "rotation" and row["data"] | {"checksum": "29ed85cf83dd941e"} == dict(
        checksum="29ed85cf83dd941e", name="digits, rotation, centred to 10", train=1137, validation=300, test=360
    )
    network, images = (
        trained(r, tmp_path / "networks" / "ridge-1.safetensors"),
        centred(load("digits")),
    )
    assert fingerprint(network) == row["weights"]
    if method == "backprop":
        turned = centred(pretext(load("digits"), "rotation"))
        assert network.head.out_features == 4 and row["errors"]["test"]["head"] == head_error(
            network, turned, device="cpu", precision="fp32"
        )
    found = measure("transfer", r, 1, folder=tmp_path, device="cpu", precision="fp32")["transfer"]
    assert list(found) == ["digits"], "the true classes of the same pictures, upright"
    expected = transfer_row(
        network,
        (1, 8, 8),
        {"digits": images},
        neutral_label=4 if method == "ff" else False,
        shots=(1, 10),
        device="cpu",
        precision="fp32",
    )
    assert found == expected


def test_parts_of_a_network_add_up_to_its_row(tmp_path):
    r = RIDGE.vary(widths=(60, 60, 60), first=1, centred=10.0, epochs=3)
    row = run_and_keep(r, 0, folder=tmp_path, **QUIET)
    where = dict(folder=tmp_path, device="cpu", precision="fp32")
    parts = measure("parts", r, 0, **where)["parts"]
    assert parts["sum"]["together"] == pytest.approx(row["errors"]["test"]["per_label"], abs=1e-3)
    for entropy in (parts["entropy"], parts["labels"]):
        assert entropy["total"] == pytest.approx(
            entropy["between"] + entropy["joint"] + entropy["interaction"], abs=3e-4
        )
    course = measure("course", r, 0, **where)["course"]
    assert (
        len(course) == 4
        and course[-1]["error"] < course[0]["error"]
        and all(len(course[0][key]) == 3 for key in ("g_pos", "g_neg", "entropy_pos", "entropy_neg"))
    )
    travel = measure("travel", r, 0, **where)["travel"]
    assert (
        len(travel) == 4
        and travel[-1]["home"] != travel[0]["home"]
        and set(travel[0]["away"]) == {"layer_1", "layer_2", "layer_3", "layers_2_to_3"}
    )
    tuned = measure("tuned", r, 0, **where)["tuned"]["digits"]
    assert set(tuned) == {"few", "all"} and all(
        found["test"] < 30 and found["lr"] in (0.01, 0.03) for found in tuned.values()
    )
    read, moved = (measure(kind, r, 0, **where)[kind]["digits"] for kind in ("reach", "transfer"))
    assert read["errors"]["usual"]["test"] == {name: moved["test"][name] for name in ("layer_1", "layers_2_to_3")}
    with pytest.raises(ValueError, match="no labels to read"):
        measure("parts", RIDGE.vary(method="random", epochs=0), 0, **where)


@pytest.mark.parametrize("kind", MEASURES)
def test_a_measure_needs_no_second_training(kind, tmp_path, monkeypatch):
    _, row = (run_and_keep(RIDGE, seed, folder=tmp_path, **QUIET) for seed in (1, 0))
    trained_again = []
    monkeypatch.setattr(measures, "run", lambda *a, **k: trained_again.append(a))
    found = measure(kind, RIDGE, 0, folder=tmp_path, device="cpu", precision="fp32")
    assert not trained_again and found["weights"] == row["weights"] and found["config"] == row["config"] and found[kind]
    assert measure(kind, RIDGE, 0, folder=tmp_path) is None
    assert measured(kind, RIDGE, tmp_path) == [found]
    assert json.loads(json.dumps(found)) == found


def test_measures_under_an_old_name_are_found_and_published_once(tmp_path):
    found = measure("diagnostics", RIDGE, 0, folder=tmp_path, device="cpu", precision="fp32")
    now = RIDGE.vary(name="renamed", alias=("ridge",))
    assert measured("diagnostics", now, tmp_path) == [found | {"recipe": "renamed"}]
    assert measured("diagnostics", "ridge", tmp_path, recipes={"renamed": now}) == [found | {"recipe": "renamed"}]
    assert measure("diagnostics", now, 0, folder=tmp_path) is None
    assert [publish_measures(now, tmp_path, target=tmp_path / "shipped") for _ in range(2)] == [1, 0]
    assert (tmp_path / "shipped" / "diagnostics" / "ridge.jsonl").exists(), "under the name it was made with"


def test_a_network_that_was_not_kept_is_trained_for_its_measure(tmp_path):
    row = run_and_keep(RIDGE, 1, folder=tmp_path, **QUIET)
    (tmp_path / "networks" / "ridge-1.safetensors").unlink()
    assert (
        measure("diagnostics", RIDGE, 1, folder=tmp_path, device="cpu", precision="fp32")["weights"] == row["weights"]
    )


def test_networks_are_compared_with_their_start_another_seed_and_backprop(tmp_path):
    book = {"ridge": RIDGE, "baseline": RIDGE.vary(name="baseline", method="backprop")}
    where = dict(recipes=book, folder=tmp_path, device="cpu", precision="fp32")
    found = measure("cka", "ridge", 4, **where)["cka"]
    assert list(found) == ["itself", "start", "kin", "backprop"]
    assert {p.name for p in (tmp_path / "networks").iterdir()} == {
        "ridge-4.safetensors",
        "ridge-0.safetensors",
        "baseline-4.safetensors",
    }
    for name, table in found.items():
        table = torch.tensor(table)
        assert (
            table.shape == (2, 2)
            and (table <= 1).all()
            and (torch.allclose(table.diag(), torch.ones(2)) == (name == "itself"))
        )
    other = measure("cka", "baseline", 4, **where)["cka"]
    assert other["backprop"] == other["itself"]
    found = measure("cka", RIDGE.vary(lr=0.0), 0, **where)["cka"]  # as it started
    assert found["start"][0][0] > 0.98 and found["kin"][0][0] < found["start"][0][0]


def test_impossible_measures(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'transfer'"):
        measure("transfr", "random", folder=tmp_path)
    with pytest.raises(ValueError, match="'pixels' has no network"):
        measure("transfer", "pixels", folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_network_of_other_settings_is_not_measured(tmp_path):
    run_and_keep(RIDGE, 0, folder=tmp_path, **QUIET)
    r = RIDGE.vary(lr=0.5)
    row = run_and_keep(r, 0, folder=tmp_path / "fresh", **QUIET)
    assert measure("diagnostics", r, 0, folder=tmp_path, device="cpu", precision="fp32")["weights"] == row["weights"]
