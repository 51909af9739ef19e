"""The command as a shell sees it: exit codes, one line for wrong input, no traceback, and nothing lost when it is stopped."""

import csv
import io
import os
import re
import signal
import subprocess
import sys
import time
import types
from concurrent.futures import BrokenExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from importlib.util import find_spec

import numpy as np
import pytest

import ff_research
from ff_research import cli, jobs, measures, results
from ff_research.cli import main
from ff_research.recipes import RECIPES
from ff_research.results import append_row, read_rows
from ff_research.strategies import STRATEGIES
from ff_research.training import Diverged

COMMANDS = ("list", "data", "run", "tune", "measure", "table", "leaderboard", "compare", "predict", "publish", "bench")
PROGRAM = [sys.executable, "-c", "from ff_research.cli import main; main()"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    "Each test has a folder, a results folder and a terminal of its own."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FF_RESEARCH_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


@pytest.fixture
def shell(capsys):
    def call(*arguments):
        "Exit code, stdout and stderr of a command in this process."
        capsys.readouterr()
        try:
            main(arguments)
            code = 0
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return call


def row(recipe="r", seed=0, data="mnist", **changes):
    test = dict(per_label=1.5 + seed, probe=dict(layer_1=2.0, layers_2_to_3=1.0 + seed))
    return (
        dict(recipe=recipe, seed=seed, config={}, data=dict(name=data), errors=dict(test=test), seconds=10.0) | changes
    )


# Help


def test_help_lists_every_command_untruncated(shell):
    code, out, err = shell("--help")
    assert (code, err) == (0, "") and shell() == shell("-h") == (0, out, "")
    listed = dict(re.findall(r"^  (\w+)  +(.+)$", out.split("Commands:")[1], re.M))
    assert tuple(listed) == COMMANDS and all(
        line.endswith(".") and not line.endswith("...") for line in listed.values()
    )


def test_version_is_the_packages(shell):
    assert shell("--version")[:2] == (0, f"ff-research {ff_research.__version__}\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_ends_with_an_example(command, shell):
    code, out, _ = shell(command, "--help")
    assert code == 0 and re.search(rf"Examples?: ff-research {command}\b", out)
    assert all(len(line) <= 80 for line in out.splitlines())


# Wrong input

WRONG = [
    (["tabel"], "'table'"),
    (["--nonsense"], "--nonsense"),
    (["run"], "(?i)names"),
    (["run", "lowe"], "did you mean 'loewe'"),
    (["run", "loewe", "bakprop"], "did you mean 'backprop'"),
    (["run", "loewe", "--seeds", "0"], "--seeds"),
    (["run", "loewe", "--seeds", "three"], "--seeds"),
    (["run", "loewe", "--workers", "-1"], "--workers"),
    (["run", "loewe", "--engine", "slurm"], "local, ray"),
    (["run", "loewe", "--sed", "3"], "--seeds"),
    (["data", "minst"], "did you mean 'mnist'"),
    (["data", "absent.npz"], "absent.npz"),
    (["data", "digits", "more"], "more"),
    (["table"], "(?i)name"),
    (["table", "fashion-mnist"], "did you mean 'fashion_mnist'"),
    (["table", "pixls"], "did you mean 'pixels'"),
    (["table", "?"], "unknown recipe"),
    (["publish", "lowe"], "did you mean 'loewe'"),
    (["compare", "--seeds", "0"], "--seeds"),
    (["bench", "--runs", "0"], "--runs"),
    (["run", "digits", "--device", "gpu"], "device 'gpu' cannot be used here"),
    (["run", "digits", "--precision", "fp16"], "unknown precision 'fp16'"),
    (["run", "digits", "--data", "minst"], "did you mean 'mnist'"),
    (["run", "digits", "--data", "absent.npz"], "absent.npz: no such file"),
    (["tune", "digits", "--data", "absent.npz"], "absent.npz: no such file"),
    (["measure", "parts", "digits", "--data", "absent.npz"], "absent.npz: no such file"),
    (["compare", "--data", "absent.npz"], "absent.npz: no such file"),
    (["compare", "--precision", "fp8"], "unknown precision"),
    (["run", "digits", "--module", "absent.py"], "absent.py: there is no such file of Python"),
    (["compare", "--module", "absent.py"], "absent.py: there is no such file of Python"),
    (["predict", "absent.safetensors"], "(?i)images"),
    (["predict", "absent.safetensors", "absent.png"], "absent.png: there is no such file or folder"),
    (["predict", "absent.safetensors", "."], "no image in this folder"),
    (["predict", "absent.safetensors", ".", "--format", "html"], "unknown format 'html'"),
]


@pytest.mark.parametrize("arguments, said", WRONG, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_wrong_input_is_one_line_and_exit_code_2(arguments, said, shell, folder):
    code, out, err = shell(*arguments)
    assert (code, out) == (2, "") and re.fullmatch(r"ff-research: [^\n]+\n", err) and re.search(said, err)
    assert not (folder / "results").exists()


def test_in_a_process_of_its_own():
    done = subprocess.run([*PROGRAM, "run", "lowe"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and re.fullmatch(
        r"ff-research: unknown recipe 'lowe'; did you mean 'loewe'\?[^\n]*\n", done.stderr
    )


def test_a_reader_that_stops_reading_is_no_error():
    done = subprocess.run(
        ["bash", "-c", '"$0" -c "$1" list | head -n 1', sys.executable, PROGRAM[2]], capture_output=True, text=True
    )
    assert done.stdout.count("\n") == 1 and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "error",
    [
        Diverged("training diverged in epoch 3, layer 1"),
        BrokenProcessPool("a\nb"),
        BrokenExecutor(),
        OSError(28, "No space left on device", "results/x.jsonl"),
        ImportError("needs\nthe extra"),
    ],
)
def test_what_a_run_cannot_help_is_one_line(error, shell, monkeypatch):
    def failing(*arguments, **options):
        raise error

    monkeypatch.setattr(jobs, "run_many", failing)
    code, out, err = shell("run", "loewe")
    assert (code, out) == (2, "") and re.fullmatch(r"ff-research: [^\n]+\n", err)


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(jobs, "run_many", lambda *arguments, **options: {}["nothing"])
    with pytest.raises(KeyError):
        main(["run", "loewe"])


def test_a_folder_that_cannot_be_written(shell, folder):
    (folder / "file").write_text("")
    code, _, err = shell("run", "pixels-digits", "--seeds", "1", "--results", "file")
    assert code == 2 and re.fullmatch(r"ff-research: [^\n]*file[^\n]*\n", err)


# Running


def test_run_skips_what_is_there(shell, folder):
    assert [shell("run", "pixels-digits", "--seeds", n)[1].count("is there already") for n in "122"] == [0, 1, 2]
    assert len(read_rows(folder / "results" / "pixels-digits.jsonl")) == 2
    assert shell("run", "pixels-digits", "--seeds", "1", "--results", "elsewhere")[1].startswith(
        "pixels-digits, seed 0: probe pixels "
    )
    assert (folder / "elsewhere" / "pixels-digits.jsonl").exists()


def test_stopped_by_hand_says_so_and_goes_on(folder):
    checkpoint, path = folder / "results" / "checkpoints" / "digits-0.safetensors", folder / "results" / "digits.jsonl"
    heed = partial(
        signal.signal, signal.SIGINT, signal.SIG_DFL
    )  # a shell that puts the tests into the background has it ignored
    process = subprocess.Popen(
        [*PROGRAM, "run", "digits", "--seeds", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed,
    )
    # until the first epoch is done: before it the signal may meet a progress bar that is being made, which Python tells
    for _ in range(6000):
        if (
            process.poll() is not None
            or checkpoint.exists()
            and not re.search(rb'"epoch":"0"', checkpoint.read_bytes())
        ):
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (
        process.returncode == 130
        and err.splitlines()[-1].startswith("ff-research: stopped; ")
        and "Traceback" not in err
    )
    assert checkpoint.exists() and read_rows(path) == []


@pytest.fixture
def small(monkeypatch):
    "`compare` with recipes that take a moment; their names."
    usual = cli.compared(RECIPES)
    made = [
        r.vary(widths=r.network.widths and (40, 40), epochs=min(2, r.schedule.epochs), batch_size=200) for r in usual
    ]
    monkeypatch.setattr(cli, "compared", lambda recipes, network: made)
    return tuple(r.name for r in usual)


@pytest.mark.parametrize("seeds", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_compare(seeds, small, shell, folder):
    code, out, err = shell("compare", "--seeds", seeds, "--workers", "1", "--figure", "new/figure.png")
    assert code == 0 and "100%" in err and f"{16 * int(seeds)}/{16 * int(seeds)}" in err
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("|")]
    table = {line[0]: dict(zip(lines[0], line)) for line in lines[2:]}
    assert tuple(table) == small and {line["seeds"] for line in table.values()} == {seeds}
    known = {
        name: [line[key] != "n/a" for key in ("per-label goodness", "trained head", "linear probe")]
        for name, line in table.items()
    }
    of = {name: RECIPES[name] for name in table}
    assert known == {
        name: [r.method == "ff" and STRATEGIES[r.strategy.name].contrasts_labels, r.method == "backprop", True]
        for name, r in of.items()
    }
    assert (
        sorted(r.strategy.name for r in of.values() if r.method == "ff")
        == sorted(
            [
                "distance",
                "generator",
                *(n for n, cls in STRATEGIES.items() if cls.__module__ == "ff_research.strategies"),
            ]
        )
        and sum(known[name][0] for name in of) == 4
    )
    assert all(("±" in line["linear probe"]) == (seeds == "2") for line in table.values())
    assert (folder / "new" / "figure.png").read_bytes().startswith(b"\x89PNG")
    before = {path.name: path.read_bytes() for path in (folder / "results").glob("*.jsonl")}
    assert (
        shell("compare", "--seeds", seeds, "--workers", "1", "--figure", "again.pdf")[1].split("Figure")[0]
        == out.split("Figure")[0]
    )
    assert {path.name: path.read_bytes() for path in (folder / "results").glob("*.jsonl")} == before and (
        folder / "again.pdf"
    ).exists()


def test_compare_keeps_the_rows_when_the_figure_cannot_be_written(small, shell, folder):
    code, _, err = shell("compare", "--seeds", "1", "--workers", "1", "--figure", "figure.nonsense")
    assert code == 2 and "nonsense" in err.splitlines()[-1] and "Traceback" not in err
    assert len(list((folder / "results").glob("*.jsonl"))) == len(small)


def test_drawing_changes_no_settings(small, shell):
    import matplotlib

    backend, before = matplotlib.get_backend(), dict(matplotlib.rcParams)
    shell("compare", "--seeds", "1", "--workers", "1")
    assert matplotlib.get_backend() == backend and dict(matplotlib.rcParams) == before


# Files of recipes


MINE = """
[mine]
like      = "loewe"
data      = "digits"
network   = { widths = [30, 30] }
schedule  = { epochs = 1 }
readout   = { probes = "ridge" }
search    = [{ lr = [0.001, 0.01] }]

[mine-random]
like     = "mine"
method   = "random"
schedule = { epochs = 0 }
"""


def test_a_file_of_ones_own_is_run_tuned_and_measured(shell, folder):
    (folder / "mine.toml").write_text(MINE)
    assert [line.split()[0] for line in shell("list", "mine.toml")[1].splitlines()] == ["mine", "mine-random"]
    code, out, err = shell("run", "mine.toml", "--seeds", "1")
    assert code == 0 and [line.split(":")[0] for line in out.splitlines()] == ["mine, seed 0", "mine-random, seed 0"]
    assert "is there already" in shell("run", "mine.toml", "mine", "--seeds", "1")[1]
    assert shell("run", "mine.toml", "mine-random", "pixels-digits", "--seeds", "1")[1].count("\n") == 2
    assert shell("tune", "mine.toml", "mine")[1].count("validation error") == 2
    assert "mine, seed 0: diagnostics measured" in shell("measure", "diagnostics", "mine.toml", "--seeds", "1")[1]
    assert "| mine-random |" in shell("table", "mine-random", "--own")[1]
    assert len(read_rows(folder / "results" / "mine.jsonl")) == 1


@pytest.mark.slow
def test_a_file_of_ones_own_reaches_worker_processes(folder):
    (folder / "mine.toml").write_text(MINE)
    command = [*PROGRAM, "run", "mine.toml", "--seeds", "1", "--workers", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert sorted(line.split(",")[0] for line in done.stdout.splitlines()) == ["mine", "mine-random"]


@pytest.mark.parametrize(
    "arguments, text, said",
    [
        (["run", "mine.toml"], None, "mine.toml: there is no such file of recipes"),
        (["run", "mine.toml", "mien"], MINE, "unknown recipe 'mien'; did you mean 'mine'?"),
        (["run", "mine.toml"], '[mine]\nlike = "lowe"', "recipe 'mine': like = 'lowe' is no recipe; did you mean"),
        (["list", "mine.toml"], "[mine", "mine.toml: no TOML file"),
        (["tune", "mine.toml", "mine-random"], MINE, "unknown search 'mine-random'"),
        (["measure", "transfr", "mine.toml"], MINE, "did you mean 'transfer'"),
        (["measure", "transfer", "mine.toml"], '[mine]\nlike = "pixels"', "'mine' has no network to measure"),
    ],
)
def test_a_wrong_file_is_one_line_and_exit_code_2(arguments, text, said, shell, folder):
    if text is not None:
        (folder / "mine.toml").write_text(text)
    code, out, err = shell(*arguments)
    assert (code, out) == (2, "") and re.fullmatch(r"ff-research: [^\n]+\n", err) and said in err
    assert not (folder / "results").exists()


def test_help_names_every_measure(shell):
    shown = shell("measure", "--help")[1]
    assert all(kind in shown for kind in measures.MEASURES)


def test_help_does_not_wait_for_torch():
    code = "import sys, ff_research.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# Reading


def test_data(shell, folder):
    assert shell("data")[1].split() == ["digits", "mnist", "fashion_mnist", "cifar10"]
    assert "1437 training and 360 test images of 1 x 8 x 8, 10 classes" in shell("data", "digits")[1]
    x, y = (2 * np.arange(120)).astype(np.uint8).reshape(4, 5, 6), np.array([0, 1, 0, 1])
    np.savez(folder / "mine.npz", x_train=x, y_train=y, x_test=x[:2], y_test=y[:2])
    assert shell("data", "mine.npz")[1] == "mine: 4 training and 2 test images of 1 x 5 x 6, 2 classes\n"


def test_list_shows_every_recipe_and_target(shell):
    lines = shell("list")[1].splitlines()
    assert [line.split()[0] for line in lines] == list(RECIPES)
    assert all(r.target in line for r, line in zip(RECIPES.values(), lines))
    found = shell("list", "--grep", "Hard_Mining")[1].splitlines()
    assert found == [line for line in lines if "hard_mining" in line.lower()] and 0 < len(found) < len(lines)
    assert shell("list", "--grep", "nothing like it") == (0, "", "")


def test_table_of_published_and_of_own_rows(shell, folder, monkeypatch):
    for seed in range(3):
        append_row(folder / "results" / "r.jsonl", row(seed=seed))
    monkeypatch.setattr(
        results, "published", lambda: [row("loewe", data="mnist"), row("loewe-fashion", data="fashion_mnist")]
    )
    table = list(csv.DictReader(io.StringIO(shell("table", "mnist", "--own", "--format", "csv")[1])))
    assert table == [
        {
            "recipe": "r",
            "data": "mnist",
            "seeds": "3",
            "per-label goodness": "2.50 ± 1.00",
            "class scores": "n/a",
            "trained head": "n/a",
            "linear probe": "2.00 ± 1.00",
            "probe of": "layers 2 to 3",
            "seconds": "10 ± 0",
        }
    ]
    assert "| loewe " in shell("table", "mnist")[1] and "fashion" not in shell("table", "mnist")[1]
    assert "| loewe-fashion " in shell("table", "loewe-fashion")[1]
    assert shell("table", "r", "--own")[0] == 0 and "unknown recipe or data set 'r'" in shell("table", "r")[2]
    assert (
        "no rows of 'cifar10' are published" in shell("table", "cifar10")[2]
        and "no rows of 'loewe' in" in shell("table", "loewe", "--own")[2]
    )


def test_table_keeps_two_files_of_one_name_apart():
    "Their contents differ by checksum; a row from before checksums counts as the first content's."
    a, b = (dict(name="mine", checksum=letter * 32) for letter in "ab")
    rows = [row(seed=0) | dict(data=a), row(seed=1) | dict(data=b), row(seed=2) | dict(data=dict(name="mine"))]
    assert [(line["data"], line["seeds"]) for line in cli.summary_table(rows)] == [
        ("mine (aaaaaaaa)", 2),
        ("mine (bbbbbbbb)", 1),
    ]
    assert [(line["data"], line["seeds"]) for line in cli.summary_table(rows[::2])] == [("mine", 2)]


@pytest.mark.skipif(not (find_spec("great_tables") and find_spec("polars")), reason="needs the extra: book")
def test_table_as_html(shell, folder):
    append_row(folder / "results" / "r.jsonl", row())
    code, out, _ = shell("table", "r", "--own", "--format", "html")
    assert code == 0 and "<table" in out and "layers 2 to 3" in out


def test_unknown_format(shell, folder):
    append_row(folder / "results" / "r.jsonl", row())
    assert shell("table", "r", "--own", "--format", "xlsx")[::2] == (
        2,
        "ff-research: unknown format 'xlsx'; known: md, csv, html\n",
    )


@pytest.mark.parametrize(
    "line, said",
    [
        ('{"recipe": "r"', "line 2: damaged"),
        ("[]", "line 2: expected a JSON object"),
        ('{"recipe": "r", "seed": 0}', "no data.name, no errors"),
        ("{}", "no recipe"),
    ],
)
def test_strange_files_among_the_rows(line, said, shell, folder):
    append_row(folder / "results" / "r.jsonl", row())
    with open(folder / "results" / "r.jsonl", "a") as f:
        f.write(line + "\n")
    code, out, err = shell("table", "r", "--own")
    assert (code, out) == (2, "") and "r.jsonl" in err and said in err and err.count("\n") == 1


def test_rows_without_test_errors_show_no_number(shell, folder):
    append_row(folder / "results" / "r.jsonl", row(errors=dict(validation=dict(per_label=1.0))))
    assert re.search(r"\| n/a +\| n/a +\| n/a +\|", shell("table", "r", "--own")[1])


def test_publish(shell, folder, monkeypatch):
    monkeypatch.setattr(results, "files", lambda package: folder / package)
    append_row(folder / "results" / "loewe.jsonl", row("loewe"))
    assert shell("publish", "loewe", "lowe")[0] == 2 and not (folder / "ff_research").exists()
    assert shell("publish", "loewe", "random")[1] == "loewe: 1 new rows\nrandom: 0 new rows\n"
    assert shell("publish", "loewe")[1] == "loewe: 0 new rows\n" and "| loewe " in shell("table", "mnist")[1]


# Data and methods of one's own


METHODS = """
import torch
from ff_research.strategies import LabelsOnPixels, register
from ff_research.labels import overlay

@register
class Shifted(LabelsOnPixels):
    "The next label is the wrong one."

    name = "shifted_label"

    def generate(self, x, y):
        return overlay(x, (y + 1) % self.num_classes, self.num_classes)
"""


@pytest.fixture
def own(folder):
    "A data set of three classes, a file of Python with a strategy, and a small recipe that names it."
    draw = np.random.default_rng(0)
    y = np.arange(90) % 3
    x = draw.integers(0, 60, (90, 6, 6)).astype(np.uint8) + (np.arange(6) // 2 == y[:, None, None]) * np.uint8(150)
    np.savez(folder / "mine.npz", x_train=x[:60], y_train=y[:60], x_test=x[60:], y_test=y[60:])
    (folder / "my_methods.py").write_text(METHODS)
    (folder / "mine.toml").write_text(
        MINE.replace("[mine-random]", 'strategy = { name = "shifted_label" }\n[mine-random]')
    )
    yield folder
    STRATEGIES.pop("shifted_label", None)


def test_a_recipe_on_other_images_is_another_run(own, shell):
    code, out, err = shell(
        "run", "mono-forward" if "mono-forward" in RECIPES else "pixels", "--seeds", "1", "--data", "mine.npz"
    )
    name = out.split(",")[0]
    assert code == 0 and name.endswith("-on-mine"), err
    (made,) = read_rows(own / "results" / f"{name}.jsonl")
    assert made["config"]["data"] == "mine.npz" and made["data"]["name"] == "mine"
    assert "is there already" in shell("run", name.removesuffix("-on-mine"), "--seeds", "1", "--data", "mine.npz")[1]


def test_convolutional_methods_are_compared_on_images_of_any_size_and_number_of_classes(folder, shell):
    y = np.arange(90) % 3
    x = np.random.default_rng(0).integers(0, 60, (90, 3, 20, 24)).astype(np.uint8)
    x += ((np.arange(24) // 8 == y[:, None, None, None]) * np.ones((1, 3, 20, 1)) * 150).astype(np.uint8)
    np.savez(folder / "mine.npz", x_train=x[:60], y_train=y[:60], x_test=x[60:], y_test=y[60:])
    code, out, err = shell("compare", "--network", "conv", "--data", "mine.npz", "--seeds", "1", "--workers", "1")
    assert code == 0, err
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("|")]
    table = {line[0].removesuffix("-on-mine"): dict(zip(lines[0], line)) for line in lines[2:]}
    assert {"cwcomp", "scff", "softhebb", "label-channel", "locally-connected", "spread-labels"} <= set(table)
    assert {"corner-labels", "conv-image-mixing", "conv-distance", "local-flat", "local-predsim"} <= set(table)
    assert all(float(line["linear probe"]) < 60 for line in table.values()), table
    assert table["cwcomp"]["class scores"] != "n/a" and table["spread-labels"]["per-label goodness"] != "n/a"
    assert shell("compare", "--network", "convv")[0] == 2


def test_device_and_precision_stand_in_the_row(own, shell):
    (own / "mine.toml").write_text(MINE)
    for precision in ("fp32", "bf16"):
        options = ["--seeds", "1", "--device", "cpu", "--precision", precision, "--results", precision]
        assert shell("run", "mine.toml", "mine", *options)[0] == 0
        (made,) = read_rows(own / precision / "mine.jsonl")
        assert made["precision"] == precision and made["device"].startswith("cpu")


@pytest.mark.parametrize("workers", [pytest.param("1", marks=pytest.mark.slow), "2"])
def test_a_strategy_of_ones_own_is_known_to_every_process(own, workers):
    without = subprocess.run([*PROGRAM, "list", "mine.toml"], capture_output=True, text=True, cwd=own)
    assert without.returncode == 2 and "shifted_label" in without.stderr
    command = [*PROGRAM, "run", "mine.toml", "--seeds", "1", "--workers", workers, "--module", "my_methods.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=own)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("ff-research: running my_methods.py\n") == 1
    (made,) = read_rows(own / "results" / "mine.jsonl")
    assert made["config"]["strategy"] == "shifted_label" and "per_label" in made["errors"]["test"]


@pytest.mark.slow
def test_compare_on_ones_own_images_with_ones_own_method(own, small, shell):
    options = ["--seeds", "1", "--data", "mine.npz", "--module", "my_methods.py"]
    for workers in ("1", "2"):
        code, out, err = shell("compare", *options, "--workers", workers, "--results", f"with-{workers}")
        assert code == 0, err
        lines = [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("|")][2:]
        assert lines[0] == "shifted_label-on-mine" and len(lines) == len(small) + 1
        assert "backprop-on-mine" in lines and "ff-research: running my_methods.py" in err
        made = read_rows(own / f"with-{workers}" / "shifted_label-on-mine.jsonl")
        assert [row["config"]["strategy"] for row in made] == ["shifted_label"]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_compare_leaves_out_what_does_not_fit_and_says_why(workers, small, shell, folder, monkeypatch):
    usual = cli.compared(RECIPES, "mlp")[:3]
    wrong = RECIPES["mono-forward-digits"].vary(name="wrong", network_options=(("pool", 3),))
    monkeypatch.setattr(cli, "compared", lambda recipes, network: [wrong, *usual])
    code, out, err = shell("compare", "--seeds", "1", "--workers", workers)
    assert code == 0, err
    assert "Left out: wrong: images of 8 x 8 are too small" in out and out.count("Left out") == 1
    table = [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("|")][2:]
    assert table == [r.name for r in usual]
    monkeypatch.setattr(cli, "compared", lambda recipes, network: [wrong])
    code, out, err = shell("compare", "--seeds", "1", "--workers", workers)
    assert code == 2 and "too small" in err and "Traceback" not in err


def test_a_row_older_than_the_users_file_is_warned_of(own, shell):
    options = ["mine.toml", "mine", "--seeds", "1", "--module", "my_methods.py"]
    assert shell("run", *options)[0] == 0
    os.utime(own / "my_methods.py", (time.time() - 100,) * 2)
    assert "is older than" not in shell("run", *options)[2]
    os.utime(own / "my_methods.py", (time.time() + 100,) * 2)
    with pytest.warns(UserWarning, match="mine, seed 0: its row is older than my_methods.py"):
        shell("run", *options)


@pytest.mark.parametrize(
    "text, said",
    [
        ("x = 1\ny = nonsense\n", "my_methods.py, line 2: NameError: name 'nonsense' is not defined"),
        ("def f(:\n", "my_methods.py, line 1: SyntaxError"),
        ("import no_such_module\n", "my_methods.py, line 1: ModuleNotFoundError"),
        ("raise SystemExit(3)\n", "my_methods.py, line 1: SystemExit: 3"),
        ("\0", "my_methods.py"),
    ],
)
def test_a_faulty_file_of_python_is_one_line(text, said, own, shell):
    (own / "my_methods.py").write_text(text)
    code, out, err = shell("run", "digits", "--module", "my_methods.py")
    told, line = err.splitlines()
    assert (code, out) == (2, "") and told == "ff-research: running my_methods.py" and said in line
    assert not (own / "results").exists()


def test_a_file_of_python_takes_no_modules_place(own, shell):
    import statistics

    (own / "statistics.py").write_text("from beside import value\n")
    (own / "beside.py").write_text("value = 1\n")
    assert shell("list", "--grep", "digits", "--module", "statistics.py")[0] == 0
    assert sys.modules["statistics"] is statistics and hasattr(statistics, "median")


def test_a_network_that_learned_nothing_is_one_line(own, shell):
    slow = 'optimizer = { lr = 1e-9 }\nstrategy = { name = "label_embedding" }\n'
    (own / "mine.toml").write_text(
        MINE.replace("epochs = 1", "epochs = 3").replace("[mine-random]", slow + "[mine-random]")
    )
    done = subprocess.run([*PROGRAM, "run", "mine.toml", "mine", "--seeds", "1"], capture_output=True, text=True)
    told = [line for line in done.stderr.splitlines() if "no layer's goodness has moved" in line]
    assert done.returncode == 0 and len(told) == 1 and told[0].startswith("ff-research: after 3 epochs")


@pytest.mark.parametrize("format", ["text", "csv"])
def test_predict_names_each_image(format, folder, shell, digits):
    models = pytest.importorskip("ff_research.models")
    from PIL import Image

    from ff_research.network import Network
    from ff_research.training import train

    network = Network([64, 100, 100])
    train(network, digits, STRATEGIES["label_embedding"](10), 3, progress=False, precision="fp32", device="cpu")
    models.save(network, folder / "model.safetensors")
    (folder / "images").mkdir()
    for i in range(3):
        Image.fromarray(digits.x_test[i, 0].numpy()).save(folder / "images" / f"{i}.png")
    options = ["--format", format, "--precision", "fp32", "--device", "cpu"]
    code, out, err = shell("predict", "model.safetensors", "images", *options)
    expected = models.predict(network, digits.x_test[:3], precision="fp32", device="cpu").tolist()
    lines = out.splitlines()[format == "csv" :]
    assert code == 0, err
    assert lines == [f"images/{i}.png{',' if format == 'csv' else ': '}{label}" for i, label in enumerate(expected)]
    Image.new("L", (9, 8)).save(folder / "images" / "large.png")
    code, _, err = shell("predict", "model.safetensors", "images/large.png", *options)
    assert code == 2 and err.count("\n") == 1 and "large.png" in err
    (folder / "images" / "broken.png").write_bytes(b"no image")
    code, _, err = shell("predict", "model.safetensors", "images/broken.png", *options)
    assert code == 2 and err.count("\n") == 1 and "broken.png: not an image" in err


def test_predict_with_a_stand_in(folder, shell, monkeypatch):
    "What the command itself does: find the files, pass own classes on, write names."
    from PIL import Image

    given = {}

    def load_network(path, layers=()):
        given.update(path=path, layers=layers)
        return types.SimpleNamespace(class_names=["cat", "a, b"])

    stand_in = types.ModuleType("ff_research.models")
    stand_in.load_network = load_network
    stand_in.predict = lambda network, image, **where: [int(image.size == (2, 2))]
    monkeypatch.setitem(sys.modules, "ff_research.models", stand_in)
    (folder / "images" / "deep").mkdir(parents=True)
    Image.new("L", (2, 2)).save(folder / "images" / "deep" / "b.PNG")
    Image.new("L", (3, 2)).save(folder / "images" / "a.jpg")
    (folder / "images" / "notes.txt").write_text("no image")
    (folder / "layers.py").write_text("import torch\nfrom torch import nn\nclass Mine(nn.Linear):\n    pass\n")
    options = ["--module", "layers.py", "--device", "cpu"]
    code, out, err = shell("predict", "m.safetensors", "images", "--format", "csv", *options)
    assert (code, out) == (0, 'file,class\nimages/a.jpg,cat\nimages/deep/b.PNG,"a, b"\n'), err
    assert str(given["path"]) == "m.safetensors" and [cls.__name__ for cls in given["layers"]] == ["Mine"]
    assert shell("predict", "m.safetensors", "images/a.jpg")[1] == "images/a.jpg: cat\n"


def test_help_is_there_in_a_second():
    "In seconds of one core: what else runs on the machine is not measured."
    code = "import time; from ff_research.cli import main; main(['--help']); print(time.process_time())"
    took = [float(subprocess.check_output([sys.executable, "-c", code], text=True).split()[-1]) for _ in range(3)]
    assert min(took) < 1
