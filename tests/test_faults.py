"""Kills, mishaps and the soak, in short. `make faults` runs them at length and writes what the book shows.

They run in processes of their own, whose children are forked: a fork needs a parent in which nothing was trained yet.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.kills import PHASES, SIGNALS
from tests.faults.mishaps import MISHAPS

ROOT = Path(__file__).resolve().parents[1]


def lines(module, out, *options, timeout=500):
    "What a module of tests.faults writes, a dictionary a line; its output if it failed."
    done = subprocess.run(
        [sys.executable, "-m", f"tests.faults.{module}", *map(str, options), "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    return (
        [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else [],
        done.returncode,
        done.stdout + done.stderr,
    )


def test_killed_runs_resume_to_the_same_bits_and_one_row(tmp_path):
    found, code, said = lines("kills", tmp_path / "kills.jsonl", "--count", 15, "--seed", 1)
    assert code == 0, said
    assert {(line["phase"], line["signal"]) for line in found} == {
        (phase, stop.name) for phase in PHASES for stop in SIGNALS
    }
    assert all(
        line["survived"] == line["stopped"] == 1 and line["rows_lost"] == line["rows_doubled"] == 0 for line in found
    )


@pytest.mark.slow
def test_the_harness_notices_a_run_that_comes_back_differently(tmp_path):
    "A library that forgets its momentum resumes to other weights, and the harness must say so."
    script = """
import sys
from ff_research.optimisers import MomentumSGD
MomentumSGD.state = lambda self: {}
from tests.faults import kills
lines, faults = kills.kill(4, seed=3, tell=lambda text: None)
sys.exit(not any("another row" in fault for fault in faults))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def mishaps(tmp_path_factory):
    found, _, said = lines("mishaps", tmp_path_factory.mktemp("mishaps") / "mishaps.jsonl")
    assert found, said
    return {line["mishap"]: line for line in found}


@pytest.mark.slow
@pytest.mark.parametrize("name", MISHAPS)
def test_mishaps(mishaps, name):
    line = mishaps[name]
    if line["outcome"] == "not here":
        pytest.skip(line["said"])
    assert line["outcome"] == "held", line["said"]


@pytest.mark.slow
def test_a_soak_of_two_rounds_leaves_no_file_open(tmp_path):
    found, code, said = lines("soak", tmp_path / "soak.jsonl", "--minutes", 1)
    assert code == 0 and len(found) >= 2, said
    assert len({(line["files"], line["threads"]) for line in found}) == 1
