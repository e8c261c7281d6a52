"""What every worker process of the data path does first."""

import multiprocessing
import os
import threading
from multiprocessing import connection


def end_with_parent() -> None:
    """End this process as soon as the one that asked for it is gone, also by SIGKILL.

    A process from a fork server is a child of that server, so that the usual look at the parent's id tells nothing.
    """
    threading.Thread(target=_wait, name="end_with_parent", daemon=True).start()


def _wait() -> None:
    connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
