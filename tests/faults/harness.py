"""Runs in a forked child, where they may be killed, starved or lied to, and what must be true of the files they leave.

The parent imports everything once and never trains, so a child costs a fork and not a start of Python. The victim is a
small recipe on digits, run and published by the functions that the command line calls.
"""

import contextlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

from ff_research import cli, measures, results, searches
from ff_research.data import load
from ff_research.recipes import load_recipes

FILE = Path(__file__).with_name("victim.toml")
VICTIM = load_recipes(FILE)["victim"]
LATE = (measures, searches)  # the command line imports them when it needs them; a child should find them there
QUIET = dict(progress=False, device="cpu", precision="fp32")


def prepare():
    "Once, in the parent: everything imported, one thread."
    torch.set_num_threads(1)
    os.environ["IN_TEST"] = "1"  # no progress bars
    load("digits")
    weight = torch.zeros(1)
    weight.grad = torch.zeros(1)
    torch.optim.SGD([weight], lr=0.0).step()  # an optimiser's first step imports a thousand modules


def start(work, out):
    """Fork a child that runs `work()` and prints into the open file `out`; gives its process number. It ends with the
    exit code that a command would give.
    """
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except KeyboardInterrupt:
        code = 130
    except BaseException:  # the child must not return into the parent's program
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def at_once(works, timeout=120):
    """Run each `work()` in a forked child, all at the same time; gives for each (exit code, or minus the signal that
    ended it, and what it printed).

    A child that outlives the timeout is killed and reported as -SIGALRM.
    """
    with contextlib.ExitStack() as stack:
        outs = [stack.enter_context(tempfile.TemporaryFile()) for _ in works]
        codes = [wait(pid, timeout) for pid in [start(work, out) for work, out in zip(works, outs)]]
        for out in outs:
            out.seek(0)
        return [(code, out.read().decode(errors="replace")) for code, out in zip(codes, outs)]


def in_child(work, timeout=120):
    "The same for one child."
    return at_once([work], timeout)[0]


def wait(pid, timeout):
    "The exit code of a child, or minus the signal that ended it."
    end = time.monotonic() + timeout
    while (done := os.waitpid(pid, os.WNOHANG))[0] == 0:
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return -signal.SIGALRM
        time.sleep(0.002)
    return os.waitstatus_to_exitcode(done[1])


def command(*words):
    "The work of typing `ff-research …`."
    return lambda: cli.main([str(word) for word in words])


def run_victim(folder):
    "Run and publish the victim, as `ff-research run` and `publish` do."
    cli.main(["run", str(FILE), "--seeds", "1", "--results", str(folder / "results")])
    results.publish("victim", folder / "results", folder / "published")


def rows_of(folder, part="results"):
    "The rows that are there; raises for a damaged line."
    return results.read_rows(folder / part / "victim.jsonl")


def essence(row):
    "What must be the same in every run: all but times, memory and origin."
    return json.dumps(
        {key: row[key] for key in ("recipe", "seed", "config", "errors", "weights", "curves")}, sort_keys=True
    )


def litter(folder):
    "Files that an ended run should not have left: checkpoints, half-written ones, claims."
    return sorted(p.name for p in folder.rglob("*") if p.is_file() and p.suffix not in (".jsonl", ".lock"))
