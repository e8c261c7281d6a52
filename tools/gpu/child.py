"""One stage in its own process."""

from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path

from gpu.files import results_path
from gpu.results import Abandoned, Finding, Results, Setting, Skipped
from gpu.stage import STAGES


def run_stage(name: str, work: Path, rehearse: bool) -> int:
    """Run a stage, which writes its measurements to its file. Returns the exit code."""
    stage = next(each for each in STAGES if each.name == name)
    setting = Setting(rehearse, work)
    results = Results(results_path(work, name), broken=lambda: not rehearse and _device_is_broken())
    try:
        import_module(f"gpu.{stage.module}").run(setting, results, stage.subject)
    except Abandoned:
        pass
    except Skipped as reason:
        results.measure("the stage", partial(_skip, reason))
    except SystemExit as end:
        return end.code
    except Exception as error:
        with suppress(SystemExit):  # a new process would fail in the same way
            results.fail("the stage", error)
    return 0


def _skip(reason: Skipped) -> Finding:
    raise reason


def _device_is_broken() -> bool:
    """Whether an earlier error, such as an illegal address, has ended this process's use of the device."""
    import torch

    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.zeros(1, device="cuda").item() != 0
    except RuntimeError:
        return True
