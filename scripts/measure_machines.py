"""Measures what one machine, two cores and a disk can do, for the chapters on machines and memory.

    python scripts/measure_machines.py memory|steps|pipeline|disk --out rows.jsonl

Each part appends rows to a file: memory by torch's allocator, times in turn within one process group, one thread each.
"""

import argparse
import gc
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import torch

from ff_research.data import Images
from ff_research.layers import FFLinear
from ff_research.memory import backprop_step, ff_step, on_disk, peak_bytes, train_on_disk
from ff_research.network import Network
from ff_research.pipeline import in_processes, split, train_pipeline
from ff_research.results import append_row
from ff_research.runs import fingerprint, origin
from ff_research.strategies import STRATEGIES
from ff_research.training import train

MB = 2**20
BATCH, MICRO = 100, 10


def images(count=BATCH):
    "Random images of MNIST's size: neither memory nor time depends on what they show."
    g = torch.Generator().manual_seed(0)
    x, y = torch.randint(0, 256, (count, 1, 28, 28), dtype=torch.uint8, generator=g), torch.arange(count) % 10
    return Images("random images", x, y, x[:10], y[:10], 10)


def ways(network, depth):
    "{name: (a function that makes the step, micro-batch, segments)}"
    data, root = images(), max(1, round(depth**0.5))
    x, y, labels = data.x_train, data.y_train, STRATEGIES["label_embedding"](10)
    return {
        "ff": (lambda: ff_step(network, labels, x, y), None, None),
        "ff, micro-batches": (lambda: ff_step(network, labels, x, y, micro_batch=MICRO), MICRO, None),
        "backprop": (lambda: backprop_step(network, x, y), None, None),
        "backprop, checkpointing": (lambda: backprop_step(network, x, y, segments=root), None, root),
        "backprop, micro-batches": (lambda: backprop_step(network, x, y, micro_batch=MICRO), MICRO, None),
        "backprop, both": (lambda: backprop_step(network, x, y, root, MICRO), MICRO, root),
    }


def memory(args):
    "Peak activity memory of a first step against depth."
    for depth in args.depths:
        network = Network([784] + [args.width] * depth)
        weights = [p for layer in network.layers for p in layer.parameters()]
        mb = sum(w.nbytes for w in weights) / MB
        for way, (make, micro, segments) in ways(network, depth).items():
            if args.ways and way not in args.ways:
                continue
            gc.collect()  # steps hold themselves in circles
            found = peak_bytes(make(), weights)
            row = dict(what="memory", way=way, depth=depth, width=args.width, batch_size=BATCH, micro_batch=micro)
            row |= dict(segments=segments, weights_mb=round(mb, 2), optimiser_mb=round(mb, 2))
            row |= dict(sums_mb=round(mb, 2) if micro else 0.0)
            keep(args, row | {f"{kind}_mb": round(n / MB, 3) for kind, n in found.items()})


def steps(args):
    "Time of a step of each way, in turn, as a ratio to plain backprop; CPU seconds, which neighbours disturb less."
    for depth in args.depths:
        network = Network([784] + [args.width] * depth)
        made = {way: make() for way, (make, _, _) in ways(network, depth).items()}
        times = {way: [] for way in made}
        for _ in range(args.rounds + 1):
            for way, work in made.items():
                start = time.process_time()
                work()
                times[way].append(time.process_time() - start)
        for way, found in times.items():
            ratios = [a / b for a, b in zip(found[1:], times["backprop"][1:])]
            row = dict(what="steps", way=way, depth=depth, width=args.width, batch_size=BATCH, runs=args.rounds)
            keep(args, row | spread("ratio", ratios) | dict(step_ms=round(1e3 * statistics.median(found[1:]), 1)))


def spread(name, values):
    "Median, least and most, for a row."
    values = dict(zip((name, f"{name}_low", f"{name}_high"), (statistics.median(values), min(values), max(values))))
    return {key: round(v, 4) for key, v in values.items()}


def keep(args, row):
    "Append a row with the machine and what else it did."
    row |= origin("cpu", "fp32") | dict(load=round(os.getloadavg()[0], 1))
    append_row(args.out, row)
    print({key: v for key, v in row.items() if key not in ("version", "torch", "numerics", "time")}, flush=True)


def session(widths, stages, rounds, count):
    """In each process of a group: the network in one process, with one thread and with two, and in the pipeline, in turn.

    Of two epochs the second counts, without what is made once.
    """
    data, labels, found = images(count), STRATEGIES["label_embedding"](10), []
    options = dict(epochs=2, batch_size=BATCH, precision="fp32", device="cpu")
    first = torch.distributed.get_rank() == 0
    for _ in range(rounds):
        network, told = Network(widths), {}
        torch.distributed.barrier()
        told["pipeline"] = train_pipeline(network, data, labels, **options).epochs[-1]
        torch.distributed.barrier()
        if first:
            for name, threads in (("one", 1), ("threads", stages)):
                torch.set_num_threads(threads)
                alone, cpu = Network(widths), []
                ticks = dict(after_epoch=lambda *given, cpu=cpu: cpu.append(time.process_time()), progress=False)
                told[name] = train(alone, data, labels, **options, **ticks).epochs[-1]
                told[name] |= dict(cpu=cpu[1] - cpu[0], weights=fingerprint(alone.layers))
            torch.set_num_threads(1)
        torch.distributed.barrier()
        found.append(told | dict(weights=fingerprint(network.layers)))
    return found


def pipeline(args):
    "Speed-up of a pipeline over one process, measured on the clock and predicted from CPU seconds."
    for stages in args.stages:
        widths = [784] + [args.width] * 4
        cuts = split([a * b for a, b in zip(widths, widths[1:])], stages)
        rounds = in_processes(stages, session, widths, stages, args.rounds, args.count)[0]
        row = dict(what="pipeline", widths=widths, stages=stages, blocks=cuts, batch_size=BATCH, runs=args.rounds)
        row |= dict(steps=-(-args.count // BATCH), sent_mb=round(2 * BATCH * args.width * 4 / MB, 3))
        row |= spread("speedup", [r["one"]["seconds"] / r["pipeline"]["seconds"] for r in rounds])
        row |= spread("speedup_threads", [r["one"]["seconds"] / r["threads"]["seconds"] for r in rounds])
        row |= spread("predicted", [r["one"]["cpu"] / max(r["pipeline"]["cpu"]) for r in rounds])
        row |= spread("overhead", [sum(r["pipeline"]["cpu"]) / r["one"]["cpu"] for r in rounds])
        row["stage_cpu"] = [round(statistics.median(v), 4) for v in zip(*(r["pipeline"]["cpu"] for r in rounds))]
        row["one_cpu"] = round(statistics.median(r["one"]["cpu"] for r in rounds), 4)
        keep(args, row | dict(equal=all(r["weights"] == r["one"]["weights"] for r in rounds)))


def layers(width, depth):
    "The layers of a network, one at a time."
    generator, widths = torch.Generator().manual_seed(0), [784] + [width] * depth
    return (FFLinear(a, b, generator=generator) for a, b in zip(widths, widths[1:]))


def limited(args):
    "In a process of its own: train from disk or in memory under a limit on memory; prints the fingerprint."
    data, labels, settings = images(args.count), STRATEGIES["label_embedding"](10), dict(epochs=1, batch_size=BATCH)
    settings["progress"] = False
    with tempfile.TemporaryDirectory() as folder:
        train_on_disk(Network([784, 20]), data, labels, folder=f"{folder}/warm", **settings)
        held = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData"))
        if args.limit:
            resource.setrlimit(resource.RLIMIT_DATA, (held * 1024 + args.limit * MB,) * 2)
        start = time.perf_counter()
        if args.where == "disk":
            network = Network(list(on_disk(layers(args.width, args.depth), f"{folder}/big")))
            train_on_disk(network, data, labels, folder=f"{folder}/big", **settings)
        else:
            network = Network(list(layers(args.width, args.depth)))
            train(network, data, labels, schedule="greedy", precision="fp32", device="cpu", **settings)
        seconds = time.perf_counter() - start
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY,) * 2) if not args.limit else None
        print(fingerprint(network.layers), round(seconds, 2))


def disk(args):
    "Under a limit the network in memory is refused and the one on disk is trained, to the weights of one in memory."
    told = {}
    for where, limit in (("disk", args.limit), ("memory", args.limit), ("memory", 0)):
        command = [sys.executable, __file__, "limited", "--where", where, "--limit", str(limit)]
        command += [f"--width={args.width}", f"--depth={args.depth}", f"--count={args.count}"]
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        told[where, limit] = done.stdout.split() or [done.stderr.strip().splitlines()[-1][:120]]
        print(where, limit, told[where, limit], flush=True)
    made, whole = told["disk", args.limit], told["memory", 0]
    mb = sum(layer.weight.nbytes + layer.bias.nbytes for layer in layers(args.width, args.depth)) / MB
    row = dict(
        what="disk", width=args.width, depth=args.depth, images=args.count, weights_mb=round(mb), limit_mb=args.limit
    )
    row |= dict(refused_in_memory="allocate memory" in " ".join(told["memory", args.limit]), equal=made[0] == whole[0])
    keep(args, row | dict(disk_s=float(made[1]), memory_s=float(whole[1])))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["memory", "steps", "pipeline", "disk", "limited"])
    parser.add_argument("--out", default="machines.jsonl")
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64, 128])
    parser.add_argument("--stages", type=int, nargs="+", default=[2])
    for name, default in dict(width=2000, rounds=7, count=1000, limit=160, depth=16).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--where", default="disk")
    parser.add_argument("--ways", nargs="+")
    args = parser.parse_args()
    torch.set_num_threads(1)
    globals()[args.part](args)


if __name__ == "__main__":
    main()
