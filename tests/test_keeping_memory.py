"Memory on the CPU that is used again: what the C library is told, when, and that it works."

import os
import resource
import subprocess
import sys

import pytest
import torch

import ff_research as ff
from ff_research import checks


def test_memory_is_kept_within_and_given_back_after(monkeypatch):
    told = []
    monkeypatch.setattr(checks, "_mallopt", lambda: lambda parameter, value: told.append((parameter, value)))
    with pytest.raises(KeyError), checks.keeping_memory():
        kept = len(told)
        with checks.keeping_memory():
            pass
        assert kept == len(told) > 0  # the inner block leaves the outer one's memory alone
        raise KeyError
    assert told[:kept] == list(checks._KEEPING.items()) and told[kept:] == list(checks._USUAL.items())


def test_training_keeps_memory(digits, monkeypatch):
    told = []
    monkeypatch.setattr(checks, "_mallopt", lambda: lambda parameter, value: told.append(value))
    train = ff.train
    options = dict(epochs=1, progress=False, device="cpu", after_epoch=lambda *given: told.append("epoch"))
    train(ff.Network([64, 8]), digits, ff.STRATEGIES["label_embedding"](10), **options)
    assert told == [*checks._KEEPING.values(), "epoch", *checks._USUAL.values()]


def test_a_users_own_settings_of_memory_are_left_alone():
    code = "from ff_research import checks; print(checks._mallopt())"
    for name, value in (
        ("MALLOC_TRIM_THRESHOLD_", "1000000"),
        ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=1000000"),
    ):
        told = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {name: value}, capture_output=True, text=True
        )
        assert told.stdout.strip() == "None", told.stderr


@pytest.mark.skipif(checks._mallopt() is None, reason="another C library than glibc, or its own settings")
def test_memory_between_blocks_in_use_is_given_back():
    "In a process of its own, whose heap holds nothing else."
    code = """
import torch
from ff_research import checks
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20
with checks.keeping_memory():
    blocks = [torch.ones(4 << 20) for _ in range(20)]  # of 16 MiB
    last = torch.ones(4 << 20)
    del blocks
    before = resident()
    checks.give_memory_back()
    print(before - resident())
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert int(told.stdout) > 250, told.stderr


@pytest.mark.skipif(checks._mallopt() is None, reason="another C library than glibc, or its own settings")
def test_large_tensors_take_the_same_memory_again():
    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            torch.ones(12 << 20)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults()
    outside = faults()
    with checks.keeping_memory():
        faults()
        assert faults() < outside / 5
