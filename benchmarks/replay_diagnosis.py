"""How often a diagnosis by replay names the right cause: seeded faults in real runs of a tiny model.

Each trial trains, meets its fault, is diagnosed by up to four replays on the real trainer, and is answered. What counts
is the verdict, and what the next attempt leaves out. `inconclusive` is no wrong conviction; anything else than the
right verdict is. Step, layer, size and length of a fault are drawn from the trial's seed.
"""

import argparse
import random
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.common import report
from tests.diagnosing import Diagnosed

_BATCH = 8
_LONG = 10**6
_TARGET_OF_TWENTY = 19
#: Kind of fault -> the verdict that is right.
CAUSES = {
    "flip in a weight": "hardware",
    "flip in gradients": "hardware",
    "flip in activations": "hardware",
    "loose contact": "hardware",
    "non-finite data": "data",
    "garbage in the data": "data",
    "LR bomb": "optimisation",
}


@dataclass(frozen=True, slots=True)
class Trial:
    """One seeded fault of a kind, and what came of it."""

    kind: str
    seed: int
    verdict: str = ""
    skips: int = 0
    quarantines: int = 0
    cuts: int = 0
    why: str = ""

    @property
    def right(self) -> bool:
        """The right verdict, and nothing skipped that it does not convict."""
        cause = CAUSES[self.kind]
        left_out = self.skips > 0 if cause == "data" else not self.skips and not self.quarantines
        return self.verdict == cause and left_out and (self.cuts > 0) == (cause == "optimisation")


def fault(kind: str, seed: int) -> dict[str, Any]:
    """The fault of a trial, as run.yaml would give it."""
    draw = random.Random(f"{kind}/{seed}")
    step, layer = draw.randrange(80, 100), draw.randrange(2)
    window = [step, step + draw.randrange(3, 8)]
    data = [step * _BATCH, (step + draw.randrange(3, 8)) * _BATCH]
    match kind:
        case "flip in a weight":
            return {"kind": "bit_flip", "steps": [step, step], "layer": layer}
        case "flip in gradients":
            return {"kind": "bit_flip", "target": "gradient", "steps": window, "layer": layer}
        case "flip in activations":
            return {"kind": "bit_flip", "target": "activation", "steps": window, "layer": layer}
        case "loose contact":
            target = draw.choice(["weight", "activation"])
            steps = [step - 30, _LONG]
            return {"kind": "bit_flip", "target": target, "steps": steps, "layer": layer, "once": False,
                    "chance": 0.05 if target == "weight" else 0.5}  # fmt: skip
        case "non-finite data":
            return {"kind": "nan_loss", "data": data, "once": False}
        case "garbage in the data":
            batches = draw.randrange(12, 20)
            return {"kind": "bad_shard", "data": [step * _BATCH, (step + batches) * _BATCH], "once": False}
        case _:
            factor = 10 ** draw.uniform(2, 3)
            return {"kind": "lr_bomb", "steps": [step, step + 3], "factor": factor, "once": False}


def run(kind: str, seed: int) -> Trial:
    """One trial."""
    with tempfile.TemporaryDirectory() as root:
        diagnosed = Diagnosed(Path(root), [fault(kind, seed)], {"seed": 1000 + seed})
        incident = diagnosed.go()
    if incident is None:
        return Trial(kind, seed, "no incident", why=str([i.cls.value for i in diagnosed.engine.incidents()]))
    after = diagnosed.plans[-1]
    return Trial(
        kind, seed, str(incident.verdict), len(after.skips), len(after.quarantines), len(after.overlays), incident.why
    )


def figures_of(trials: Sequence[Trial]) -> dict[str, Any]:
    """By kind of fault: how often right, inconclusive and without any incident, and the wrong ones with their seed."""
    found: dict[str, Any] = {}
    for kind in dict.fromkeys(trial.kind for trial in trials):
        of = [trial for trial in trials if trial.kind == kind]
        verdicts = Counter(trial.verdict for trial in of)
        harmless = ("inconclusive", "no incident")
        found[kind] = {
            "cause": CAUSES[kind], "trials": len(of), "right": sum(trial.right for trial in of),
            "inconclusive": verdicts["inconclusive"], "no_incident": verdicts["no incident"],
            "wrong": [[t.seed, t.verdict, t.why] for t in of if not t.right and t.verdict not in harmless],
        }  # fmt: skip
    return found


def is_met(figures: dict[str, Any]) -> bool:
    """19 of 20 of each kind in which there was anything to diagnose, none wrongly convicted beyond that."""
    return all(of["right"] >= _TARGET_OF_TWENTY / 20 * (of["trials"] - of["no_incident"]) for of in figures.values())


def table_of(figures: dict[str, Any]) -> str:
    """Markdown: one row for each kind of fault."""
    rows = ["| fault | right verdict | right | inconclusive | no incident | wrong | trials |", "|---" * 7 + "|"]
    for kind, of in figures.items():
        counts = (of["right"], of["inconclusive"], of["no_incident"], len(of["wrong"]), of["trials"])
        rows.append(f"| {kind} | {of['cause']} | {' | '.join(map(str, counts))} |")
    return "\n".join(rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Try and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=20, help="of each kind")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args(argv)
    jobs = [(kind, seed) for kind in CAUSES for seed in range(arguments.trials)]
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
        trials = list(pool.map(run, *zip(*jobs, strict=True)))
    figures = figures_of(trials)
    targets = {"right_of_twenty": _TARGET_OF_TWENTY}
    report("replay-diagnosis", figures, targets, is_met(figures), table_of(figures))


if __name__ == "__main__":
    main()
