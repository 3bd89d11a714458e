"""`python -m trainer.standby --socket FD`: a trainer that is warm already, forked for each attempt.

Imports are most of a restart on a CPU: this process has done them and waits. For each request it forks twice, so that
the attempt's parent is the supervisor (a child subreaper), which alone knows how it ends. It never runs a backward
pass, starts a thread or touches a GPU: a fork of a process that has done any of these hangs or fails. It leaves when
its socket closes, that is, with its supervisor.
"""

import argparse
import gc
import importlib
import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

_LIBRARIES = (
    "torch", "torch._dynamo", "torch._inductor.compile_fx", "torch.distributed.checkpoint", "torch.utils.data",
)  # fmt: skip
_OURS = ("trainer.__main__", "trainer.loop", "trainer.setup")
_REQUEST_BYTES = 1 << 18
_PARENT_POLL_S = 0.001
#: In the order in which their descriptors come: the release pipe, the run's child lock, standard output and error.
DESCRIPTORS = ("release", "lock", "output")


def main(argv: Sequence[str] | None = None) -> int:
    """Warm up, say so, and fork whenever asked."""
    parser = argparse.ArgumentParser(prog="python -m trainer.standby", description=__doc__)
    parser.add_argument("--socket", type=int, required=True, help="descriptor of the socket to the supervisor")
    with socket.socket(fileno=parser.parse_args(argv).socket) as channel:
        for name in (*_LIBRARIES, *_OURS):
            importlib.import_module(name)
        code = _newest_code_ns()
        gc.collect()
        gc.freeze()  # what is shared stays shared: no collection in a fork writes to it
        channel.send(json.dumps({"ready": os.getpid()}).encode())
        while True:
            raw, descriptors, _, _ = socket.recv_fds(channel, _REQUEST_BYTES, len(DESCRIPTORS))
            if not raw:
                return 0
            if _newest_code_ns() != code:  # the next attempt runs what is installed now
                channel.send(json.dumps({"stale": True}).encode())
                return 0
            if os.fork() == 0:
                _become_middle(channel, json.loads(raw), descriptors)
            for descriptor in descriptors:
                os.close(descriptor)
            os.wait()


def _newest_code_ns() -> int:
    """When any of our modules that are loaded was last changed."""
    files = (
        module.__file__
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] in ("trainer", "monitors") and getattr(module, "__file__", None)
    )
    return max(Path(file).stat().st_mtime_ns for file in files if file is not None)


def _become_middle(channel: socket.socket, request: dict[str, object], descriptors: list[int]) -> None:
    """Fork again and leave: the attempt is then nobody's child but the subreaper's, and only then says who it is."""
    own = os.getpid()
    if os.fork():
        os._exit(0)
    os.setsid()
    while os.getppid() == own:
        time.sleep(_PARENT_POLL_S)
    channel.send(json.dumps({"pid": os.getpid()}).encode())
    channel.close()
    _become_attempt(request, dict(zip(DESCRIPTORS, descriptors, strict=True)))


def _become_attempt(request: dict[str, object], descriptors: dict[str, int]) -> None:
    """From here on everything is as in `python -m trainer`."""
    from trainer.__main__ import LOCK_FD, RELEASE_FD, leave, main

    for standard in (1, 2):
        os.dup2(descriptors["output"], standard)
    os.close(descriptors["output"])
    environment = request["environment"]
    assert isinstance(environment, dict)
    os.environ.clear()
    os.environ.update(environment)
    os.environ[RELEASE_FD], os.environ[LOCK_FD] = str(descriptors["release"]), str(descriptors["lock"])
    leave(main(["--run-dir", str(request["run_dir"]), "--attempt", str(request["attempt"])]))


if __name__ == "__main__":
    sys.exit(main())
