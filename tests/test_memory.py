import os
import platform
import subprocess
import sys

import pytest

# Touches 64 MiB twice; where memory is kept, the second time faults no page.
CODE = """
import resource, sys
import numpy as np
from bmjax.models.memory import keep_memory
if "keep" in sys.argv:
    keep_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(64 << 20, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def second_faults(*arguments, **environment):
    done = subprocess.run(
        [sys.executable, "-c", CODE, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_memory_that_was_freed_is_kept_and_a_setting_of_ones_own_is_respected():
    assert second_faults("keep") < 16
    # Huge pages make few faults of them, but some.
    assert second_faults() > 16
    assert second_faults("keep", MALLOC_TOP_PAD_="0") > 16
