"""Worker processes of the data path: what their fork server imports for them, and what each does first."""

import multiprocessing
import os
import threading
from multiprocessing import connection


def preload_workers() -> None:
    """Let the fork server of this process import the loader once, for all workers that it forks.

    Each would otherwise import torch by itself: four workers took 5.5 s of CPU time to start and 178 MB each, and take
    1.6 s and 43 MB. The list of modules is the process's own, so that its main program decides, not a library; without
    effect once the server runs.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(["__main__", "megavl.data.loader"])


def end_with_parent() -> None:
    """End this process as soon as the one that asked for it is gone, also by SIGKILL.

    A process from a fork server is a child of that server, so that the usual look at the parent's id tells nothing.
    """
    threading.Thread(target=_wait, name="end_with_parent", daemon=True).start()


def _wait() -> None:
    connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
