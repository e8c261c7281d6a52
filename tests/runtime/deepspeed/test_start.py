"""Start of DeepSpeed: what it does not import."""

import subprocess
import sys

import pytest

# What DeepSpeed imports while it looks whether ZeRO supports an optimizer.
_MUON = "import sys, deepspeed.runtime.zero.muon.muon_optimizer; print('torch._dynamo' in sys.modules)"
_STARTED = (
    "from datetime import timedelta; from megavl.runtime.env import Env, start_process_group; "
    "start_process_group(Env(0, 0, 1), timedelta(seconds=30)); "
)


@pytest.mark.parametrize(("before", "imported"), [(_STARTED, "False"), ("", "True")], ids=["started", "by itself"])
def test_muon_does_not_import_the_compiler(before, imported):
    done = subprocess.run([sys.executable, "-c", before + _MUON], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == imported
