"""A real Slurm of one node with its own key, sockets, ports and directories; root may start it."""

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.deploy.tools import tool
from tests.s3 import free_ports

_WITHIN_S = 60.0

_CONFIG = """\
ClusterName=longwatch
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={at}/munge/socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={at}/state
SlurmdSpoolDir={at}/spool
SlurmctldPidFile={at}/slurmctld.pid
SlurmdPidFile={at}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_res
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """Its commands."""

    def __init__(self, directory: Path) -> None:
        self._environment = {**os.environ, "SLURM_CONF": str(directory / "slurm.conf")}

    def call(self, program: str, *arguments: str, cwd: Path | None = None, **more: str) -> str:
        """What a command says."""
        return subprocess.run(
            [tool(program), *arguments], cwd=cwd, env={**self._environment, **more}, capture_output=True, text=True,
            timeout=60, check=True,
        ).stdout  # fmt: skip

    def is_up(self) -> bool:
        """Whether the node takes jobs."""
        done = subprocess.run(
            [tool("sinfo"), "-h", "-o", "%T"], env=self._environment, capture_output=True, text=True, timeout=30,
            check=False,
        )  # fmt: skip
        return done.stdout.strip() == "idle"


@contextmanager
def slurm(directory: Path) -> Iterator[Slurm]:
    """Start munge, the controller and a node; end them afterwards. `directory` should have a short path."""
    for name in ("munge", "state", "spool"):
        (directory / name).mkdir(mode=0o700)
    (directory / "munge" / "key").write_bytes(os.urandom(128))
    (directory / "munge" / "key").chmod(0o400)
    host, cores = socket.gethostname().partition(".")[0], os.cpu_count()
    text = _CONFIG.format(host=host, ports=free_ports(2), at=directory, cores=cores)
    (directory / "slurm.conf").write_text(text)
    munge = directory / "munge"
    commands = (
        [tool("munged"), "--foreground", "--force", f"--key-file={munge}/key", f"--socket={munge}/socket",
         f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed", "--num-threads=1"],
        [tool("slurmctld"), "-D"],
        [tool("slurmd"), "-D"],
    )  # fmt: skip
    environment = {**os.environ, "SLURM_CONF": str(directory / "slurm.conf")}
    started: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            with (directory / f"{Path(command[0]).name}.log").open("wb") as log:
                started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            if len(started) == 1:
                _until((munge / "socket").exists, "munge")
        ours = Slurm(directory)
        _until(ours.is_up, "the node")
        yield ours
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(30)


def _until(condition: object, what: str) -> None:
    assert callable(condition)
    deadline_s = time.monotonic() + _WITHIN_S
    while not condition():
        assert time.monotonic() < deadline_s, f"{what}: not within {_WITHIN_S:.0f} s"
        time.sleep(0.1)
