"""Train on `digits` with two commits on this machine and compare the weights bit for bit.

    python scripts/same_weights.py e0aab86

checks that commit out beside the repository, trains every case there and in the working tree (CPU, one thread), and prints
the cases whose weights differ. Exit code 1 where any does. What a commit refuses is a case of its own: both must refuse it.
"""

import hashlib
import inspect
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
WIDTHS = [64, 60, 60, 60]


def cases():
    "Every strategy x schedule x precision x collaboration, then what else changes the arithmetic: name -> settings."
    names = [
        "label_embedding",
        "class_confusion",
        "hard_mining",
        "image_mixing",
        "masking",
        "random_noise",
        "layer_wise",
        "adversarial",
        "self_contrastive",
        "mono_forward",
        "all_labels",
    ]
    axes = itertools.product(names, ("together", "greedy"), ("fp32", "bf16"), (None, "previous", "all"))
    for name, schedule, precision, mode in axes:
        yield (
            f"{name} {schedule} {precision} {mode}",
            dict(strategy=name, schedule=schedule, precision=precision, collaboration=mode),
        )
    for precision in ("fp32", "bf16"):
        more = {
            "peers": dict(peer=0.03),
            "peers, full gradient": dict(peer=0.03, full_gradient=True),
            "peers, greedy": dict(peer=0.03, schedule="greedy"),
            "peers, all": dict(peer=0.03, collaboration="all"),
            "adamw": dict(optimizer="adamw"),
            "adamw, mono_forward": dict(optimizer="adamw", strategy="mono_forward"),
            "mono_forward, peers": dict(strategy="mono_forward", peer=0.03),
            "swish_symba, hard": dict(objective="swish_symba", strategy="hard_mining", lr=0.3),
            "symba, all": dict(objective="symba", lr=0.3, collaboration="all"),
            "linear goodness": dict(objective="linear"),
            "rounds": dict(schedule="greedy", rounds=2, epochs=4),
            "rounds, all": dict(schedule="greedy", rounds=2, epochs=4, collaboration="all"),
            "epochs of each layer": dict(schedule="greedy", epochs=(1, 3, 2)),
            "rate of each layer, exponential": dict(lr=(1e-3, 5e-4, 2e-4), lr_schedule="exponential"),
            "SCFF as published": dict(
                strategy="self_contrastive", options=dict(shift=1), triangle=True, optimizer="adamw"
            ),
            "SCFF greedy": dict(strategy="self_contrastive", options=dict(shift=1), triangle=True, schedule="greedy"),
            "SCFF paired anew": dict(strategy="self_contrastive", options=dict(repair=True)),
            "SCFF paired anew, greedy, triangle": dict(
                strategy="self_contrastive", options=dict(repair=True), schedule="greedy", triangle=True
            ),
            "triangle, labels": dict(triangle=True),
            "backprop": dict(method="backprop"),
            "pairwise backprop": dict(method="pairwise"),
            "pairwise backprop, hard": dict(method="pairwise", strategy="hard_mining"),
        }
        for name, settings in more.items():
            yield f"{name} {precision}", dict(precision=precision) | settings


def train_one(
    strategy="label_embedding",
    method="ff",
    options=(),
    objective=None,
    peer=0.0,
    full_gradient=False,
    triangle=False,
    epochs=2,
    **settings,
):
    "Train one case with whatever ff_research is imported; the hash of all weights, or the first words of its refusal."
    from ff_research.data import load
    from ff_research.strategies import STRATEGIES

    from ff_research.goodness import mean_activity, symba_loss

    try:
        from ff_research import objectives as made_of
        from ff_research.backprop import train_backprop
        from ff_research.network import Network
    except ImportError:  # before they had rooms of their own
        from ff_research import goodness as made_of
        from ff_research.layers import Network
        from ff_research.training import train_backprop
    from ff_research.training import train

    images = load("digits")
    made = {"full_gradient": full_gradient, "triangle": triangle}
    common = dict(epochs=epochs, batch_size=50, device="cpu", progress=False, seed=3) | settings
    if "peer" in inspect.signature(Network).parameters:
        made["peer"] = peer
    else:
        common |= {"peer": peer} if peer and method == "ff" else {}
    objectives = {
        "swish_symba": made_of.swish_symba,
        "symba": made_of.symba,
        "linear": lambda: made_of.GoodnessObjective(mean_activity, symba_loss),
    }
    network = Network(WIDTHS, seed=5, **made)
    strategy = STRATEGIES[strategy](images.num_classes, **dict(options))
    try:
        if method == "ff":
            train(network, images, strategy, objective=objectives[objective]() if objective else None, **common)
        else:
            train_backprop(network, images, strategy=strategy if method == "pairwise" else None, **common)
    except ValueError as error:
        return f"refused ({type(error).__name__})"
    digest = hashlib.sha256()
    for layer in network.layers:
        for p in (layer.weight, layer.bias):
            digest.update(p.detach().numpy().tobytes())
    return digest.hexdigest()[:16]


def child(tree):
    "Train every case with the package of a tree; print one JSON dictionary."
    sys.path.insert(0, tree)
    import torch

    torch.set_num_threads(1)
    import ff_research

    assert str(Path(ff_research.__file__)).startswith(tree), ff_research.__file__
    print(json.dumps({name: train_one(**settings) for name, settings in cases()}))


def weights(tree):
    done = subprocess.run([sys.executable, __file__, "--child", str(tree)], cwd=tree, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main(commit):
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        subprocess.run(
            ["git", "worktree", "add", "--detach", str(tree), commit], cwd=HERE, check=True, capture_output=True
        )
        try:
            there = weights(tree)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=HERE, check=True)
    here = weights(HERE)
    more = [name for name in there if there[name].startswith("refused") and not here[name].startswith("refused")]
    differ = [name for name in there if there[name] != here[name] and name not in more]
    for name in differ:
        print(f"DIFFERS  {name}: {there[name]} at {commit}, {here[name]} here")
    refused = sum(value.startswith("refused") for value in here.values())
    agree = len(there) - len(differ) - len(more)
    print(f"{agree} of {len(there)} cases agree bit for bit ({refused} of them refused by both); {len(differ)} differ")
    print(f"refused at {commit}, trained here: {', '.join(more) or 'none'}")
    return 1 if differ else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2])
    elif len(sys.argv) == 2:
        sys.exit(main(sys.argv[1]))
    else:
        sys.exit(__doc__)
