import os
import platform
import subprocess
import sys

import pytest

from bmjax import models

# Fills an array twice, the second time in the memory of the first: in this thread, or in another.
CODE = """
import resource, sys, threading
import numpy as np
from bmjax.ops.memory import keep_memory, share_memory
_, mebibytes, keep, where = sys.argv
if keep == "keep":
    share_memory()
    keep_memory()
faults = []
def fill():
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        np.ones(int(mebibytes) << 20, np.uint8)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
if where == "here":
    fill()
else:
    thread = threading.Thread(target=fill)
    thread.start()
    thread.join()
print(faults[1])
"""

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="the C library is not glibc"
)
FEW = 16  # huge pages make few faults of what memory from the system costs, but more than these


def second_faults(mebibytes, keep="keep", where="here", **environment):
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(mebibytes), keep, where],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


def test_memory_that_was_freed_is_kept():
    assert second_faults(64) < FEW
    assert second_faults(64, keep="") > FEW


def test_it_is_kept_in_other_threads_however_large():
    assert second_faults(100, where="thread") < FEW


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [("here", "MALLOC_TOP_PAD_", "0"), ("thread", "MALLOC_ARENA_MAX", "4")],
)
def test_a_setting_of_ones_own_is_respected(where, name, value):
    assert second_faults(100, where=where, **{name: value}) > FEW


def test_what_is_free_is_returned_when_asked_for():
    code = """
import os
import numpy as np
from bmjax.ops.memory import keep_memory, release_memory, share_memory
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20
share_memory()
keep_memory()
before = resident()
np.ones(200 << 20, np.uint8)
kept = resident()
release_memory()
print(kept - before, resident() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    kept, left = map(int, done.stdout.split())
    assert kept > 150
    assert left < 20


def test_what_grows_between_calls_is_returned():
    code = """
import os
import numpy as np
from bmjax.ops.memory import keep_memory, release_if_grown, share_memory
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20
def call():
    np.ones(100 << 20, np.uint8)
    release_if_grown()
    return resident()
share_memory()
keep_memory()
first = call()
again = call()
np.ones(300 << 20, np.uint8)  # something large that was needed once
grown = resident()
print(again - first, grown - first, call() - first, call() - first)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    again, grown, released, after = map(int, done.stdout.split())
    assert abs(again) < 20  # what each call needs is kept
    assert grown > 150
    assert released < -80  # with what the call had freed itself
    assert abs(after) < 20


def test_a_model_that_convolves_shares_memory(monkeypatch):
    shared = []
    monkeypatch.setattr("bmjax.models.registry.share_memory", lambda: shared.append(1))
    models.create_model("mlp", 2)
    assert not shared
    models.create_model("cnn_tiny", 2)
    assert shared
