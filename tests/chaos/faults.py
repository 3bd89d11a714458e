"""What is done to a run: each a few lines on real processes, chosen by a seed, over within seconds."""

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from tests.chaos.world import World

Fault = Callable[[World, random.Random], None]
_FULL_LEFT_BYTES = 4096


def _signalled(find: Callable[[World], int | None], signum: signal.Signals) -> Fault:
    def fault(world: World, _: random.Random) -> None:
        _send(find(world), signum)

    return fault


def _stopped(find: Callable[[World], int | None], most_s: float) -> Fault:
    """Stands still for a while, as on a machine that is suspended or swaps."""

    def fault(world: World, chance: random.Random) -> None:
        pid = find(world)
        _send(pid, signal.SIGSTOP)
        time.sleep(chance.uniform(0.1, most_s))
        _send(pid, signal.SIGCONT)

    return fault


def _send(pid: int | None, signum: signal.Signals) -> None:
    if pid is not None:
        with suppress(ProcessLookupError):
            os.kill(pid, signum)


def _supervisor(world: World) -> int | None:
    return world.supervisor.pid if world.supervisor is not None and world.supervisor.poll() is None else None


def _standby(world: World) -> int | None:
    return next((pid for pid, name in world.members().items() if name == "standby.out"), None)


def _store(world: World) -> int | None:
    return world.weed.process.pid if world.weed.process is not None else None


def _store_away(world: World, chance: random.Random) -> None:
    """Connections are refused, then the same server is back."""
    world.weed.kill()
    time.sleep(chance.uniform(0.2, 2.0))
    world.weed.start()


def _everything(world: World, _: random.Random) -> None:
    """The machine resets: all that belongs to the run dies at once."""
    for pid in (_supervisor(world), world.trainer(), *world.members()):
        _send(pid, signal.SIGKILL)


def _supervisor_twice(world: World, chance: random.Random) -> None:
    """Killed, launched again, killed while it takes over."""
    _send(_supervisor(world), signal.SIGKILL)
    assert world.supervisor is not None
    world.supervisor.wait()
    world.relaunch_if_ended()
    time.sleep(chance.uniform(0.3, 1.5))
    _send(_supervisor(world), signal.SIGKILL)


def _full_disk(world: World, chance: random.Random) -> None:
    """No byte can be written for a while. Only where the run lies on a disk of its own."""
    with filled(world):
        time.sleep(chance.uniform(0.3, 2.0))


@contextmanager
def filled(world: World) -> Iterator[None]:
    """The disk is full while the block runs."""
    filler = world.disk / "filler"
    descriptor = os.open(filler, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        with suppress(OSError):
            while True:
                os.write(descriptor, bytes(1 << 20))
        with suppress(OSError):
            while True:
                os.write(descriptor, bytes(_FULL_LEFT_BYTES))
        yield
    finally:
        os.close(descriptor)
        filler.unlink()


@dataclass(frozen=True, slots=True)
class Kind:
    """A fault by name, and how often it is chosen beside the others."""

    name: str
    weight: int
    fault: Fault
    own_disk: bool = False


def _keeper_faults() -> Iterator[Kind]:
    yield Kind("writer killed", 2, _signalled(lambda world: world.keeper("writer"), signal.SIGKILL))
    yield Kind("writer stopped", 1, _stopped(lambda world: world.keeper("writer"), 1.0))
    yield Kind("writer asked to leave", 1, _signalled(lambda world: world.keeper("writer"), signal.SIGTERM))
    yield Kind("uploader killed", 2, _signalled(lambda world: world.keeper("uploader"), signal.SIGKILL))
    yield Kind("uploader stopped", 1, _stopped(lambda world: world.keeper("uploader"), 1.0))


KINDS: tuple[Kind, ...] = (
    Kind("trainer killed", 6, _signalled(World.trainer, signal.SIGKILL)),
    Kind("trainer stopped", 2, _stopped(World.trainer, 1.0)),
    Kind("trainer asked to leave", 3, _signalled(World.trainer, signal.SIGTERM)),
    Kind("trainer told of a preemption", 1, _signalled(World.trainer, signal.SIGUSR1)),
    Kind("supervisor killed", 3, _signalled(_supervisor, signal.SIGKILL)),
    Kind("supervisor killed twice", 1, _supervisor_twice),
    Kind("supervisor stopped", 2, _stopped(_supervisor, 2.0)),
    Kind("supervisor asked to leave", 1, _signalled(_supervisor, signal.SIGTERM)),
    Kind("standby killed", 1, _signalled(_standby, signal.SIGKILL)),
    Kind("everything killed", 1, _everything),
    *_keeper_faults(),
    Kind("store stopped", 2, _stopped(_store, 2.0)),
    Kind("store away", 2, _store_away),
    Kind("disk full", 2, _full_disk, own_disk=True),
)


def choose(chance: random.Random, *, own_disk: bool) -> Kind:
    """One of those that are possible here."""
    possible = [kind for kind in KINDS if own_disk or not kind.own_disk]
    return chance.choices(possible, [kind.weight for kind in possible])[0]
