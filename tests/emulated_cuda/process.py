"""A process with an emulated CUDA device, which calls the functions that it is sent; see `tests.warm` for its start.

python -m tests.emulated_cuda.process SOCKET        with EMULATED_CUDA_DEVICES, ... in the environment
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests import warm

REPOSITORY = Path(__file__).parents[2]


class DeviceProcess:
    """A process of its own with emulated devices; ends with the context.

    Args:
        devices: How many.
        gigabytes: Memory of each.
    """

    def __init__(self, devices: int = 1, gigabytes: float = 24) -> None:
        visible = {"EMULATED_CUDA_DEVICES": str(devices), "EMULATED_CUDA_GB": str(gigabytes)}
        with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"{folder}/socket")
            listener.listen()
            listener.settimeout(300)
            self._process = warm.start(f"{folder}/socket", cwd=REPOSITORY, module=__name__, **visible)
            self._connection = Connection(listener.accept()[0].detach())

    def __enter__(self) -> DeviceProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._process.wait(60)

    def __call__(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call a function of a module there; what it returns, or raises."""
        self._connection.send((function, arguments, options))
        returned, found = self._connection.recv()
        if not returned:
            raise found
        return found


def _serve(connection: Connection) -> None:
    """Call what arrives until nobody is there any more."""
    while True:
        try:
            function, arguments, options = connection.recv()
        except EOFError:
            return
        try:
            answer = True, function(*arguments, **options)
        except Exception as error:
            error.add_note(f"In the process with the device:\n{traceback.format_exc()}")
            answer = False, error
        connection.send(answer)


if __name__ == "__main__":
    from tests.emulated_cuda import runs

    os.dup2(1, 2)  # a file: nobody reads the pipe that errors go to while the process runs
    client = socket.socket(socket.AF_UNIX)
    client.connect(sys.argv[1])
    runs.start()
    _serve(Connection(client.detach()))
    os._exit(0)
