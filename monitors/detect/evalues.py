"""How strongly batches speak against one shard: e-values, which hold however often one looks. Pure.

An *event* is a batch that went wrong. Under the null hypothesis of a shard, events come whenever they like (the state
may drift, hard samples may cluster), but do not care which batch the shard is in: it is in the bad one with the chance
q with which it is read, q known before the batch. The bet against it says that it causes a share `stake` of events: one
that has it multiplies the capital by (stake + (1 - stake) q) / q, one that has not by (1 - stake). Both together have
mean at most 1 under the null, so by Ville's inequality (1939) the capital ever reaches 1/a with probability at most a;
mixed over stakes and over beginnings of the poison it stays so (Ramdas et al. 2023, "Game-theoretic statistics and safe
anytime-valid inference"). Over S shards the union bound asks for S/a (Bonferroni), whatever their dependence.
"""

from collections.abc import Sequence

from pydantic.dataclasses import dataclass

#: (share of the events that the shard causes, weight): nearly alone, one of a few causes, or among many others.
_BETS = ((0.95, 0.75), (0.4, 0.15), (0.05, 0.1))
_LATE_EVENTS = 1000  # a poison that begins late is as likely to begin at each of so many events


@dataclass(frozen=True, slots=True)
class Hit:
    """An event with the shard in it.

    `event` and `read` number the run's events and the shard's reads from 1; `chance` is q, of which 1/q counts.
    """

    step: int
    event: int
    read: int
    chance: float


def e_value(hits: Sequence[Hit]) -> float:
    """Capital of the bet after these hits, in order; what was bet on beginnings without a hit is given up as lost."""
    total = 0.0
    for stake, weight in _BETS:
        capital, last = 0.0, 0
        for hit in hits:
            missed = hit.event - last - 1 if last else 0
            capital = (capital * (1 - stake) ** missed + _beginning(hit)) * (stake / hit.chance + 1 - stake)
            last = hit.event
        total += weight * capital
    return total


def _beginning(hit: Hit) -> float:
    """Prior weight of a poison that begins here: at a shard's early reads, at the run's early events, or at any.

    Each of the three sums to at most 1 over its numbers: sum of 1/(n (n + 1)) is 1.
    """
    late = 1 / _LATE_EVENTS if hit.event <= _LATE_EVENTS else 0.0
    return (1 / (hit.read * (hit.read + 1)) + 1 / (hit.event * (hit.event + 1)) + late) / 3
