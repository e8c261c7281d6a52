"""Start of DeepSpeed in this process, and the device that it chooses."""

import logging
import warnings

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator, set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.runtime import bf16_optimizer, compiler


def device_type() -> str:
    """ "cuda" or "cpu": DeepSpeed's choice, which DS_ACCELERATOR overrides."""
    return torch.device(get_accelerator().device_name()).type


def use_cpu() -> None:
    """Make the CPU DeepSpeed's device, also where it has found a GPU."""
    set_accelerator(CPU_Accelerator())


def start_deepspeed(backend: str) -> None:
    """Hand the default process group to DeepSpeed."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)  # it logs every step of its set-up on every rank
    # DeepSpeed still calls torch's collectives by their old names.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # On a CPU it would ask the compiler which of its operators could be built, and compile an all-reduce that only its
    # inference uses. A rank that is killed while torch compiles leaves a lock, for which later runs wait in silence.
    deepspeed.ops.__compatible_ops__ = {}
    # Its bf16 optimizer collects garbage and prints the memory in use before and after each parameter group.
    bf16_optimizer.see_memory_usage = lambda *_, **__: None
    # It imports its Muon whatever the optimizer is, and Muon's functions are compiled where they are defined: every
    # rank would import torch's compiler, which takes 0.8 s.
    compiler.compile = lambda: compiler.dummy_decorator
    deepspeed.init_distributed(backend)
