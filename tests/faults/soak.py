"""An hour of training and reading out in one process: does memory stay flat, and is every file closed again?

    python -m tests.faults.soak --minutes 60 --out ff_research/published/reliability/soak.jsonl

Every strategy is trained in turn on digits, with a checkpoint that is resumed once, and read out in every way that it
has; a row is kept, read and looked up again. Each round writes one line: minutes, resident memory, open files, threads,
networks trained so far.
"""

import argparse
import gc
import json
import os
import tempfile
import threading
import time
from pathlib import Path

import torch

import ff_research
from ff_research import cka, results
from ff_research.backprop import train_backprop
from ff_research.data import load
from ff_research.network import Network
from ff_research.readout import features, linear_probe, per_label_goodness, softmax_head
from ff_research.recipes import RECIPES
from ff_research.runs import run_and_keep
from ff_research.strategies import STRATEGIES
from ff_research.training import train

QUIET = dict(progress=False, device="cpu", precision="fp32")


def memory_mb():
    "Resident memory of this process."
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def one_round(images, folder, seed):
    "Every strategy once, and backpropagation; gives how many networks were trained."
    sizes = [images.num_pixels, 100, 100]
    for strategy in STRATEGIES.values():
        network, path = Network(sizes, seed=seed), folder / "run.safetensors"
        for epochs in (2, 2):  # the second call finds the finished checkpoint
            train(network, images, strategy(images.num_classes), epochs=epochs, seed=seed, checkpoint=path, **QUIET)
        path.unlink()
        linear_probe(network, images, neutral_label=strategy.contrasts_labels)
        if strategy.contrasts_labels:
            per_label_goodness(network, images)
            softmax_head(network, images)
    baseline = Network(sizes, seed=seed)
    train_backprop(baseline, images, epochs=2, seed=seed, **QUIET)
    cka.cka_matrix(features(network, images.x_test), features(baseline, images.x_test))
    small = RECIPES["digits"].vary(name="soak", widths=(40, 40), epochs=1)
    run_and_keep(small, seed, folder=folder, **QUIET)
    results.summary(results.latest(results.read_rows(folder / "soak.jsonl")), "errors.test.per_label")
    return len(STRATEGIES) + 2


def soak(minutes, write=print):
    "Rounds until the time is over; `write` gets one dictionary a round."
    images, start, trained, seed = load("digits"), time.perf_counter(), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        while seed == 0 or time.perf_counter() - start < 60 * minutes:
            trained += one_round(images, Path(folder), seed)
            (Path(folder) / "soak.jsonl").unlink()  # what a results file holds is not a leak
            seed += 1
            gc.collect()
            write(
                dict(
                    minutes=round((time.perf_counter() - start) / 60, 3),
                    memory_mb=round(memory_mb(), 1),
                    files=len(os.listdir("/proc/self/fd")),
                    threads=threading.active_count(),
                    trained=trained,
                    torch=torch.__version__,
                    version=ff_research.__version__,
                )
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = []

    def write(line):
        lines.append(line)
        print(json.dumps(line), flush=True)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    soak(args.minutes, write)


if __name__ == "__main__":
    main()
