"""Kill a run at random points, start it again, and compare with a run that nobody disturbed.

    python -m tests.faults.kills --count 200 --seed 0 --out ff_research/published/reliability/kills.jsonl

The victim counts what the interpreter does, every call and return of a function, Python's or C's, and stops itself at
an event that was drawn beforehand: in the middle of training, of writing a checkpoint, of reading the network out, of
appending its row, or of publishing. Every fourth is stopped a second time while it resumes. Then it is left in peace.
It must end with the weights of the undisturbed run, bit by bit (the row carries their fingerprint), with one row, one
published row, and nothing else left behind.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
from collections import Counter
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import ff_research
from tests.faults.harness import essence, in_child, litter, prepare, rows_of, run_victim

PHASES = {
    "training": "one_epoch",
    "checkpoint": "save_checkpoint",
    "read-out": "errors_of",
    "row": "append_row",
    "publishing": "publish",
}
FUNCTIONS = set(PHASES.values())
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


class Watch:
    """A profile function that counts the events within each call of a phase's function, or stops the process at one.

    at: (the function's name, its how manieth call, the event's number in it); None counts only. The innermost phase has
    the event.
    """

    def __init__(self, at=None, stop=None):
        self.at, self.stop = at, stop
        self.open, self.calls, self.events = [], Counter(), {}

    def __call__(self, frame, event, argument):
        name = frame.f_code.co_name
        if event == "call" and name in FUNCTIONS:
            self.open.append((name, self.calls[name]))
            self.calls[name] += 1
        if not self.open:
            return
        self.events[self.open[-1]] = number = self.events.get(self.open[-1], 0) + 1
        if self.at == (*self.open[-1], number):
            os.kill(os.getpid(), self.stop)
        if event == "return" and name == self.open[-1][0]:
            self.open.pop()


def watched(folder, at=None, stop=None, report=None):
    "Run the victim under a watch; without `at` it is undisturbed, and the events counted are written to `report`."
    watch = Watch(at, stop)
    sys.setprofile(watch)
    try:
        run_victim(folder)
    finally:
        sys.setprofile(None)
        if report is not None:
            report.write_text(json.dumps([[*call, events] for call, events in watch.events.items()]))


def undisturbed(folder):
    "The run that all others must equal: what it made, and the number of events in each call of each phase."
    code, said = in_child(partial(watched, folder, report=folder / "events.json"))
    assert code == 0, said
    counted = json.loads((folder / "events.json").read_text())
    events = {
        phase: [(name, call, n) for name, call, n in counted if name == function] for phase, function in PHASES.items()
    }
    assert all(events.values()), events
    return essence(rows_of(folder)[0]), events


def draw(rng, calls):
    "An event of a phase, every one as likely as any other."
    k = rng.randrange(sum(n for _, _, n in calls))
    for name, call, n in calls:
        if k < n:
            return name, call, k + 1
        k -= n


def trial(expected, events, phase, stop, rng, twice):
    "Stop a run once or twice, let it end, and say what is wrong; nothing, if all is well."
    with tempfile.TemporaryDirectory() as place:
        folder, wrong = Path(place), []
        for time in range(1 + twice):
            code, said = in_child(partial(watched, folder, draw(rng, events[phase]), stop))
            # a resumed run may end before the event comes; and where Python runs a destructor it cannot be
            # interrupted, and says so
            if code not in (-stop, 128 + stop) and not (code == 0 and (time or "Exception ignored" in said)):
                wrong.append(f"ended with {code}: {said[-300:]}")
            try:
                if max(len(rows_of(folder)), len(rows_of(folder, "published"))) > 1:
                    wrong.append("a row is doubled already")
            except ValueError as error:
                wrong.append(str(error))
        code, said = in_child(partial(run_victim, folder))
        if code != 0:
            return [*wrong, f"does not resume: {said[-300:]}"]
        for part in ("results", "published"):
            rows = rows_of(folder, part)
            if len(rows) != 1:
                wrong.append(f"{len(rows)} rows in {part}")
            elif essence(rows[0]) != expected:
                wrong.append(f"another row in {part}")
        if left := litter(folder):
            wrong.append(f"left behind: {', '.join(left)}")
        return wrong


def kill(count, seed, tell=print):
    "`count` runs, phases and signals in turn; one line of counts for each pair of them, and the faults found."
    prepare()
    with tempfile.TemporaryDirectory() as place:
        expected, events = undisturbed(Path(place))
    lines, faults = {}, []
    for i in range(count):
        phase, stop = list(PHASES)[i % len(PHASES)], SIGNALS[i // len(PHASES) % len(SIGNALS)]
        wrong = trial(expected, events, phase, stop, random.Random(f"{seed}/{i}"), twice=i % 4 == 3)
        line = lines.setdefault((phase, stop.name), Counter())
        line.update(
            stopped=1,
            survived=not wrong,
            rows_lost=any("0 rows" in w for w in wrong),
            rows_doubled=any("doubled" in w or "2 rows" in w for w in wrong),
        )
        if wrong:
            faults.append(f"stop {i} (seed {seed}), {phase}, {stop.name}: {'; '.join(wrong)}")
            tell(faults[-1])
    made = dict(
        seed=seed, version=ff_research.__version__, time=datetime.now(timezone.utc).isoformat(timespec="seconds")
    )
    return [
        dict(phase=phase, signal=name, **{key: int(v) for key, v in line.items()}, **made)
        for (phase, name), line in lines.items()
    ], faults


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    lines, faults = kill(args.count, args.seed)
    for line in lines:
        print(f"{line['phase']:11} {line['signal']:8} {line['survived']} of {line['stopped']} survived")
    survived, lost, doubled = (sum(line[key] for line in lines) for key in ("survived", "rows_lost", "rows_doubled"))
    print(f"{survived} of {args.count} survived, {lost} rows lost, {doubled} doubled")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
