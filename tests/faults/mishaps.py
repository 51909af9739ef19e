"""Full disks, read-only folders, clocks that go backwards, several processes at one job, damaged and foreign files.

    python -m tests.faults.mishaps --out ff_research/published/reliability/mishaps.jsonl

Each mishap is a function that stages it, looks at what was said and at what is left, and raises AssertionError where
something was lost. It returns the one line that the user saw.
"""

import argparse
import ctypes
import json
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path

import ff_research
from ff_research import cli, results, runs
from ff_research.data import load
from ff_research.network import Network
from ff_research.strategies import STRATEGIES
from ff_research.training import train
from tests.faults.harness import (
    FILE,
    QUIET,
    VICTIM,
    at_once,
    command,
    essence,
    in_child,
    litter,
    prepare,
    rows_of,
    run_victim,
)


class NotHere(Exception):
    "This machine cannot stage the mishap; says why."


def run(folder, seeds=1):
    "The work of `ff-research run victim.toml`."
    return command("run", FILE, "--seeds", seeds, "--results", folder / "results")


def one_line(said):
    "The one line that a user saw, without the numbers of the rows made before it."
    lines = [line for line in said.splitlines() if not line.startswith("victim, seed")]
    assert len(lines) == 1 and lines[0].startswith("ff-research: "), said
    return lines[0]


def refused(folder, work):
    """What a child that runs `work` is told, in one line and with exit code 2; the files that were there keep every
    byte.
    """
    before = {p: p.read_bytes() for p in folder.rglob("*.jsonl")}
    code, said = in_child(work)
    assert code == 2, (code, said)
    assert {p: p.read_bytes() for p in before} == before, "a file was changed"
    return one_line(said)


def then_it_works(folder, expected, seeds=1):
    "The same command, when the mishap is over, ends with the rows of an undisturbed run and leaves nothing behind."
    code, said = in_child(run(folder, seeds))
    assert code == 0, said
    assert essence(rows_of(folder)[0]) == expected and sorted(row["seed"] for row in rows_of(folder)) == list(
        range(seeds)
    )
    assert not litter(folder), litter(folder)


def limited(size, work):
    "No file may grow beyond `size` bytes, as on a disk that is full."
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    work()


def disk_full_at_the_checkpoint(folder, expected):
    said = refused(folder, partial(limited, 10_000, run(folder)))
    assert "cannot write the checkpoint" in said and not rows_of(folder)
    then_it_works(folder, expected)
    return said


def disk_full_at_the_row(folder, expected):
    "The row does not fit behind the rows that are there: they stay, and the checkpoint keeps what was trained."
    path = folder / "results" / "victim.jsonl"
    in_child(run(folder))
    other = json.dumps({"recipe": "other", "seed": 0, "config": {}, "text": "x" * 60_000})
    with open(path, "a", encoding="utf-8") as f:
        f.write(other + "\n")
    size = path.stat().st_size + 100
    said = refused(folder, partial(limited, max(size, 50_000), run(folder, 2)))
    assert "cannot write a row, the rows before it are untouched" in said
    assert [name for name in litter(folder) if name.endswith(".safetensors")] == ["victim-1.safetensors"]
    then_it_works_with(folder, 2)
    return said


def then_it_works_with(folder, seeds):
    code, said = in_child(run(folder, seeds))
    assert code == 0 and sorted(row["seed"] for row in rows_of(folder) if row["recipe"] == "victim") == list(
        range(seeds)
    ), said
    assert not litter(folder)


def small_disk(folder, expected):
    "A file system of its own with 256 kB, most of which a big file takes."
    place = folder / "results"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], capture_output=True, text=True
    )
    if done.returncode:
        raise NotHere(f"a small file system cannot be mounted here: {done.stderr.strip() or 'not permitted'}")
    try:
        (place / "big").write_bytes(b"\0" * 240_000)
        said = refused(folder, run(folder))
        assert "No space left" in said
        (place / "big").unlink()
        then_it_works(folder, expected)
    finally:
        subprocess.run(["umount", str(place)], check=True)
    return said


def bound_by_permissions(work):
    "Root may write everywhere, unless it gives that right away (the capability CAP_DAC_OVERRIDE, Linux)."
    if os.geteuid() == 0:
        libc, header, rights = (
            ctypes.CDLL(None, use_errno=True),
            (ctypes.c_uint32 * 2)(0x20080522, 0),
            (ctypes.c_uint32 * 6)(),
        )
        assert libc.capget(header, rights) == 0
        rights[0] &= ~(1 << 1)
        assert libc.capset(header, rights) == 0
    work()


def read_only_folder(folder, expected):
    (folder / "results").mkdir()
    (folder / "results").chmod(0o555)
    try:
        said = refused(folder, partial(bound_by_permissions, run(folder)))
        assert "Permission denied" in said and "results" in said, said
    finally:
        (folder / "results").chmod(0o755)
    then_it_works(folder, expected)
    return said


def clock_goes_backwards(folder, expected):
    "Every reading of the calendar is an hour before the last one."

    class Backwards(datetime):
        hours = 0

        @classmethod
        def now(cls, tz=None):
            cls.hours += 1
            return datetime(2030, 1, 1, tzinfo=timezone.utc) - timedelta(hours=cls.hours)

    def work():
        readings = iter(range(10**9, 0, -3600))
        time.time = lambda: float(next(readings))
        runs.datetime = Backwards
        run(folder, 3)()
        rows = results.latest(rows_of(folder))
        assert len(rows) == 3 and rows[0]["time"] > rows[2]["time"]
        results.publish("victim", folder / "results", folder / "published")

    code, said = in_child(work)
    assert code == 0, said
    assert essence(rows_of(folder)[0]) == expected and [row["seed"] for row in rows_of(folder, "published")] == [
        0,
        1,
        2,
    ]
    return "nothing to say: rows are known by their order in the file"


def processes_at_the_same_job(folder, expected, processes=2):
    ended = at_once([run(folder)] * processes)
    assert [code for code, _ in ended] == [0] * processes, ended
    assert len(rows_of(folder)) == 1 and essence(rows_of(folder)[0]) == expected and not litter(folder)
    assert sum("is there already" not in said for _, said in ended) == 1, "one made the row, the others found it"
    return next(said for _, said in ended if "is there already" in said).strip()


def processes_at_one_results_folder(folder, expected, processes=4):
    "Four jobs that append to one file."

    def job(seed):
        return lambda: runs.run_and_keep(VICTIM, seed, folder=folder / "results", **QUIET)

    ended = at_once([job(seed) for seed in range(processes)])
    assert [code for code, _ in ended] == [0] * processes, ended
    assert sorted(row["seed"] for row in rows_of(folder)) == list(range(processes)) and not litter(folder)
    return "nothing to say: four rows, each whole"


def processes_at_one_checkpoint(folder, expected, processes=4):
    "`train` with one path in four processes: one trains, the others are turned away."
    held, free = multiprocessing.Event(), multiprocessing.Event()

    class Slow(STRATEGIES["label_embedding"]):
        name = "slow"

        def streams(self, *arguments):
            held.set()
            free.wait(60)
            return super().streams(*arguments)

    def first():
        train(Network([64, 20]), load("digits"), Slow(10), epochs=1, checkpoint=folder / "run.safetensors", **QUIET)

    def later():
        held.wait(60)
        try:
            train(
                Network([64, 20]),
                load("digits"),
                STRATEGIES["label_embedding"](10),
                epochs=1,
                checkpoint=folder / "run.safetensors",
                **QUIET,
            )
        except ValueError as error:
            print(error)
            raise SystemExit(2) from None

    def let_go():
        held.wait(60)
        time.sleep(1.0)
        free.set()

    ended = at_once([first, *[later] * (processes - 1), let_go])
    assert [code for code, _ in ended] == [0, *[2] * (processes - 1), 0], ended
    assert [p.name for p in folder.iterdir()] == ["run.safetensors"]
    said = ended[1][1].strip()
    assert "under way" in said
    return said.replace(str(folder), "…")


def half_written_last_line(folder, expected):
    in_child(run(folder))
    path = folder / "results" / "victim.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 2])
    said = refused(folder, run(folder, 2))
    assert "victim.jsonl, line 2: damaged" in said
    path.write_bytes(whole)
    then_it_works(folder, expected, 2)
    return said


def checkpoint_of_another_version(folder, expected):
    "A setting that this version does not know stands in the checkpoint."
    return foreign_checkpoint(
        folder,
        expected,
        lambda settings: settings | {"momentum_form": "nesterov"},
        "momentum_form is 'nesterov' there, None here",
    )


def checkpoint_of_another_network(folder, expected):
    return foreign_checkpoint(
        folder, expected, lambda settings: settings | {"network": settings["network"].replace("32", "48")}, "network is"
    )


def foreign_checkpoint(folder, expected, change, words):
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = folder / "results" / "checkpoints" / "victim-0.safetensors"

    def stopped():
        runs.append_row = lambda *_, **__: os._exit(0)  # trained, and the row not yet written
        run(folder)()

    in_child(stopped)
    with safe_open(path, "pt") as f:
        header, tensors = f.metadata(), {key: f.get_tensor(key) for key in f.keys()}
    header["settings"] = json.dumps(change(json.loads(header["settings"])))
    save_file(tensors, path, header)
    bits = path.read_bytes()
    said = refused(folder, run(folder))
    assert "belongs to another run" in said and words in said and path.read_bytes() == bits
    path.unlink()
    then_it_works(folder, expected)
    return said


def stopped_with_workers(folder, expected):
    "A scheduler's SIGTERM to a command that has two worker processes: nobody goes on behind its back."

    def work():
        from concurrent.futures import ProcessPoolExecutor

        real = ProcessPoolExecutor.submit

        def submit(self, *arguments, **options):  # when both jobs are handed out, the signal comes
            done = real(self, *arguments, **options)
            submit.count += 1
            if submit.count == 2:
                (folder / "pids").write_text(" ".join(map(str, self._processes)))
                signal.setitimer(signal.ITIMER_REAL, 0.5)
            return done

        submit.count = 0
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        ProcessPoolExecutor.submit = submit
        cli.main(["run", "digits", "--seeds", "2", "--workers", "2", "--results", str(folder / "results")])

    code, said = in_child(work)
    assert code == 143, (code, said)
    for pid in (folder / "pids").read_text().split():
        end = time.monotonic() + 20
        while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
            assert time.monotonic() < end, f"worker {pid} goes on"
            time.sleep(0.05)
    (folder / "pids").unlink()
    return one_line("\n".join(line for line in said.splitlines() if line.startswith("ff-research: ")))


def fault_of_ours(folder, expected):
    "What is no user's fault ends with 1 and a traceback, and the checkpoint is still there."

    def work():
        def broken(*_, **__):
            return 1 / 0

        runs.append_row = broken
        run(folder)()

    code, said = in_child(work)
    assert code == 1 and "ZeroDivisionError" in said and "Traceback" in said, (code, said)
    assert not rows_of(folder)
    then_it_works(folder, expected)
    return "ZeroDivisionError, with its traceback"


MISHAPS = {
    "disk full while a checkpoint is written": disk_full_at_the_checkpoint,
    "disk full while a row is appended": disk_full_at_the_row,
    "a file system of 256 kB that is full": small_disk,
    "a folder without permission to write": read_only_folder,
    "a clock that goes backwards": clock_goes_backwards,
    "two processes at the same job": processes_at_the_same_job,
    "four processes at the same job": partial(processes_at_the_same_job, processes=4),
    "four processes, one results folder": processes_at_one_results_folder,
    "four processes, one checkpoint": processes_at_one_checkpoint,
    "a half-written last line": half_written_last_line,
    "a checkpoint of another version": checkpoint_of_another_version,
    "a checkpoint of another network": checkpoint_of_another_network,
    "SIGTERM with two workers under way": stopped_with_workers,
    "a fault of ours": fault_of_ours,
}


def undisturbed():
    "What the victim makes when nothing happens."
    with tempfile.TemporaryDirectory() as place:
        code, said = in_child(partial(run_victim, Path(place)))
        assert code == 0, said
        return essence(rows_of(Path(place))[0])


def stage(name, expected):
    "One mishap in a folder of its own; gives (held, what was said)."
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place).resolve()
        try:
            said = MISHAPS[name](folder, expected)
            return "held", re.sub(r"[^\s']*/(results|published)\b", r"…/\1", said.replace(str(folder), "…"))
        except NotHere as reason:
            return "not here", str(reason)
        except AssertionError as error:
            return "failed", str(error)[:2000]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="some of the mishaps; all, if left out")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    prepare()
    expected, lines = undisturbed(), []
    for name in args.names or MISHAPS:
        outcome, said = stage(name, expected)
        lines.append(
            dict(
                mishap=name,
                outcome=outcome,
                said=said,
                version=ff_research.__version__,
                time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            )
        )
        print(f"{outcome:8} {name}: {said}", flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    sys.exit(any(line["outcome"] == "failed" for line in lines))


if __name__ == "__main__":
    main()
