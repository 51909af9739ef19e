"""Forward-Forward learning: layers that each learn alone, ways to make negatives, read-outs, and results measured over seeds.

The names below are loaded when they are first used, so that `import ff_research` costs nothing; everything else stands in the
modules (`from ff_research.training import train`).
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.2.0"

if TYPE_CHECKING:
    from ff_research.backprop import train_backprop
    from ff_research.callbacks import EarlyStopping
    from ff_research.data import Images, from_arrays, from_dataset, load
    from ff_research.estimator import FFClassifier
    from ff_research.layers import FFConv, FFLinear, Layer
    from ff_research.modelfiles import load_network, save
    from ff_research.network import Network
    from ff_research.objectives import Objective
    from ff_research.predictions import fit_readout, predict
    from ff_research.readout import linear_probe, per_label_goodness, scores_errors
    from ff_research.runs import run
    from ff_research.strategies import STRATEGIES, Strategy, register
    from ff_research.training import train

_ROOMS = {
    "EarlyStopping": "callbacks",
    "Images": "data",
    "from_arrays": "data",
    "from_dataset": "data",
    "load": "data",
    "FFConv": "layers",
    "FFLinear": "layers",
    "Layer": "layers",
    "Network": "network",
    "Objective": "objectives",
    "STRATEGIES": "strategies",
    "Strategy": "strategies",
    "register": "strategies",
    "train": "training",
    "train_backprop": "backprop",
    "linear_probe": "readout",
    "per_label_goodness": "readout",
    "scores_errors": "readout",
    "run": "runs",
    "save": "modelfiles",
    "load_network": "modelfiles",
    "predict": "predictions",
    "fit_readout": "predictions",
    "FFClassifier": "estimator",
}
__all__ = [
    "EarlyStopping",
    "FFClassifier",
    "FFConv",
    "FFLinear",
    "Images",
    "Layer",
    "Network",
    "Objective",
    "STRATEGIES",
    "Strategy",
    "fit_readout",
    "from_arrays",
    "from_dataset",
    "linear_probe",
    "load",
    "load_network",
    "per_label_goodness",
    "predict",
    "register",
    "run",
    "save",
    "scores_errors",
    "train",
    "train_backprop",
]


def __getattr__(name: str) -> object:
    if name not in _ROOMS:
        raise AttributeError(f"module 'ff_research' has no attribute {name!r}; its names: {', '.join(__all__)}")
    if name == "STRATEGIES":  # all chapters that enter strategies of their own there
        import_module("ff_research.modelfiles")
    value = getattr(import_module(f"ff_research.{_ROOMS[name]}"), name)
    globals()[name] = value  # found at once from now on
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
