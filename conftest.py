"""pytest runs the chapters too: one item a notebook, executed by nbdev's own runner in one warm worker process.

The worker is forked before anything imports torch, so that its threads and ours never meet, and it is started anew should a
cell take it down. `pytest nbs/103_goodness.ipynb` runs one chapter; `--slow` adds the cells and the tests marked slow.
"""

import contextlib
import functools
import io
import multiprocessing
import os
import signal
import subprocess
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here or in the worker
os.environ.setdefault("MPLBACKEND", "agg")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what it runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C is tested

from nbdev.config import get_config
from nbdev.test import test_nb as run_notebook

CONFIG = get_config()


class Worker:
    "One process that runs notebooks, one after another."

    def start(self):
        self.pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork"))
        self.pool.submit(os.getpid).result()

    def run(self, path, flags):
        try:
            return self.pool.submit(run, path, flags).result()
        except BrokenProcessPool:
            self.start()
            return f"{path.name}: the process that ran this notebook died (killed, out of memory, or a cell that exits)"

    def stop(self):
        self.pool.shutdown()


def run(path, flags):
    "Run one notebook; give its traceback, empty if it passed."
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        passed, _ = run_notebook(
            path, skip_flags=CONFIG.tst_flags.split(), force_flags=flags, basepath=CONFIG.config_path
        )
    return "" if passed else stderr.getvalue()


worker = Worker()


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the cells and tests marked slow")


def pytest_configure(config):
    worker.start()


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtestloop(session):
    "Let the worker end inside the loop: coverage is put together right after it."
    try:
        return (yield)
    finally:
        worker.stop()


def pytest_unconfigure(config):
    worker.stop()


@pytest.fixture(scope="session", autouse=True)
def no_waiting():
    """No child process holds up the suite for more than five minutes, and files are not pushed to the disk.

    Nothing here cuts the power, and some disks take a tenth of a second for each file.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        patch.setattr(subprocess, "run", functools.partial(subprocess.run, timeout=300))
        yield


@pytest.fixture(scope="session")
def digits():
    "The bundled digits, for any test to read and none to change."
    from ff_research.data import load

    return load("digits")


def pytest_runtest_setup(item):
    if item.get_closest_marker("slow") and not item.config.getoption("--slow"):
        pytest.skip("slow: runs with --slow")
    for mark in item.iter_markers("data"):
        from ff_research.data import data_root

        path = data_root() / f"{mark.args[0]}.npz"
        if not path.exists():
            pytest.skip(f"{path.name} is not in {path.parent}; ff_research.data.load({mark.args[0]!r}) fetches it once")


def pytest_collect_file(parent, file_path):
    if (
        file_path.suffix == ".ipynb"
        and file_path.is_relative_to(CONFIG.nbs_path)
        and not file_path.name.startswith("_")
    ):
        return Notebook.from_parent(parent, path=file_path)


class NotebookError(Exception):
    pass


class Notebook(pytest.File):
    def collect(self):
        yield Cells.from_parent(self, name="cells")


# Chapters that train longest; what they export has tests of its own.
LONG = """501_convolution 502_channelwise 503_selfcontrast 504_localclassifiers 505_distance 703_models 705_machines
907_cli 909_reliability 923_estimator"""


class Cells(pytest.Item):
    def runtest(self):
        if self.path.stem in LONG.split() and not self.config.getoption("--slow"):
            pytest.skip("a long chapter: runs with --slow")
        if error := worker.run(self.path, ["slow"] if self.config.getoption("--slow") else []):
            raise NotebookError(error)

    def repr_failure(self, excinfo):
        return str(excinfo.value) if excinfo.errisinstance(NotebookError) else super().repr_failure(excinfo)

    def reportinfo(self):
        return self.path, 0, self.path.stem
