"""What every rank of the pool would otherwise import by itself, which takes a second or two each."""

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  its decorators import torch.compile's backends

import tests.runtime.cases  # noqa: F401
