"""The fork server of worker processes."""

import subprocess
import sys

import pytest

_STARTED = """
import multiprocessing, sys
from megavl.data.worker import preload_workers

{call}
# A worker's first act, before it unpickles a function of megavl: is the loader there?
asked = "import sys; sys.exit('megavl.data.loader' in sys.modules)"
worker = multiprocessing.get_context("forkserver").Process(target=exec, args=(asked,))
worker.start()
worker.join()
print(bool(worker.exitcode))
"""


@pytest.mark.parametrize(("call", "imported"), [("preload_workers()", True), ("", False)])
def test_workers_start_with_the_loader_imported(call, imported):
    done = subprocess.run(
        [sys.executable, "-c", _STARTED.format(call=call)], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{imported}\n", done.stderr
