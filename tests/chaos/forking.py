"""Work in a forked process, so that a harness that forks stays free of threads and open files itself."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from typing import Any


def in_a_child(work: Callable[[], Any]) -> Any:
    """Do something in a forked process and take its result; ends this process where that failed."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        code = 1
        try:
            with os.fdopen(writing, "wb") as pipe:
                pickle.dump(work(), pipe)
            code = 0
        except BaseException as error:
            sys.excepthook(type(error), error, error.__traceback__)
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(pid, 0)
    if status:
        raise SystemExit("the check itself failed; its traceback is above")
    return pickle.loads(data)
