"""The bugs: what each breaks, by which change of one place, and the tests that should notice."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mutant:
    """`old`, which the file has exactly once, becomes `new`; `tests` are what is run."""

    name: str
    breaks: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


_ENGINE = "tests/orchestrator/test_engine.py"
_SIMULATION = "tests/simulation/test_simulation.py"

STORE: tuple[Mutant, ...] = (
    Mutant(
        "fence not checked before the manifest", "a superseded writer commits", "trainer/keeping/upload.py",
        "    ship()\n    fence.ensure_accepted(store, commit)\n", "    ship()\n",
        ("tests/keeping/test_upload.py",),
    ),
    Mutant(
        "manifest before the data", "a checkpoint exists whose data does not", "trainer/keeping/upload.py",
        "    tier.verify(sealed)\n", "    tier.verify(sealed)\n    store.create(manifest_key(commit), sealed.raw)\n",
        ("tests/keeping/test_keepers.py", "tests/contract/test_every_failure.py"),
    ),
    Mutant(
        "strangers in the lineage", "commits of a branch that was left count", "trainer/contract/fence.py",
        "if commit in inherited or parse_commit_id(commit).epoch == fence.epoch)", "if True)",
        ("tests/contract/test_fence.py",),
    ),
    Mutant(
        "claim over a later epoch", "two writers at once", "trainer/contract/fence.py",
        " newest > fence.epoch:\n        raise FenceLostError(fence.epoch, newest, _holder",
        " newest > fence.epoch + 9**9:\n        raise FenceLostError(fence.epoch, newest, _holder",
        ("tests/contract/test_fence.py",),
    ),
    Mutant(
        "superseded segments count", "a paused supervisor's journal is taken for the run's",
        "trainer/contract/segments.py", "if epoch > segment.epoch), default=None)", "if False), default=None)",
        ("tests/contract/test_segments.py",),
    ),
    Mutant(
        "data deleted before the manifest", "a checkpoint exists whose data does not", "orchestrator/recovery/prune.py",
        "        store.delete(manifest_key(commit))\n        freed += _delete_rest(store, commit)\n",
        "        freed += _delete_rest(store, commit)\n        store.delete(manifest_key(commit))\n",
        ("tests/orchestrator/test_prune.py",),
    ),
    Mutant(
        "pins ignored", "what a person keeps is deleted", "orchestrator/recovery/prune.py",
        "        if verdicts.is_pinned(store, commit):\n            continue\n", "",
        ("tests/orchestrator/test_prune.py",),
    ),
    Mutant(
        "retention forgets what is being restored", "the checkpoint under a rollback is deleted",
        "orchestrator/recovery/retention.py", "elif checkpoint.id in restoring:", "elif False:",
        ("tests/orchestrator/test_retention.py",),
    ),
    Mutant(
        "CRC not compared", "a damaged checkpoint is loaded", "trainer/checkpointing/load.py",
        "    if crc32c(data) != entry.crc32c:\n", "    if False:\n",
        ("tests/trainer/test_checkpoint_damage.py",),
    ),
    Mutant(
        "norms not compared", "what was damaged before its CRC is loaded", "trainer/checkpointing/load.py",
        "    if norm is None or entry.norm is None or not math.isclose(norm, entry.norm, rel_tol=_NORM_TOLERANCE):\n",
        "    if False:\n", ("tests/trainer/test_checkpoint_damage.py", "tests/trainer/test_checkpoint.py"),
    ),
    Mutant(
        "overwritten slot is kept", "a checkpoint of two states", "trainer/keeping/persist.py",
        "        if not arena.holds(slot):\n", "        if False:\n", ("tests/keeping/test_persist.py",),
    ),
)  # fmt: skip

TRAINER: tuple[Mutant, ...] = (
    Mutant(
        "dice thrown again", "random numbers are not restored", "trainer/state.py",
        "    torch.set_rng_state(_from_text(rng[\"torch\"]))\n", "",
        ("tests/trainer/test_state.py", "tests/trainer/test_determinism.py"),
    ),
    Mutant(
        "branch not folded in", "a rollback throws the same dice", "trainer/state.py",
        "    if branch != extra[\"branch\"]:\n", "    if False:\n", ("tests/trainer/test_state.py",),
    ),
    Mutant(
        "overlay a step late", "the first step after a rollback has the full rate", "trainer/contract/plan.py",
        "        if step < self.from_step:\n", "        if step <= self.from_step:\n",
        ("tests/trainer/test_schedule.py", "tests/trainer/test_loop.py"),
    ),
    Mutant(
        "largest overlay wins", "a cut that is escalated does nothing", "trainer/contract/plan.py",
        "    return min((overlay.at(step) for overlay in overlays), default=1.0)\n",
        "    return max((overlay.at(step) for overlay in overlays), default=1.0)\n",
        ("tests/trainer/test_schedule.py", _ENGINE),
    ),
    Mutant(
        "dropped samples come back", "`then: drop` is `defer`", "trainer/data/cursor.py",
        "            values = values[(values < begin) | (values >= end)]\n", "            pass\n",
        ("tests/trainer_data/test_cursor.py",),
    ),
    Mutant(
        "orphans stay", "a trainer without a supervisor never leaves", "trainer/orphan.py",
        "        return time.monotonic() - self._reporter.answered_s > self._patience_s\n", "        return False\n",
        ("tests/trainer/test_main.py",),
    ),
    Mutant(
        "the standby's line is inherited", "a dead standby looks alive as long as a trainer lives",
        "trainer/standby.py", "    channel.close()\n    _become_attempt", "    _become_attempt",
        ("tests/orchestrator/test_standby.py",),
    ),
)  # fmt: skip

SUPERVISOR: tuple[Mutant, ...] = (
    Mutant(
        "journal not synced", "a power cut takes back what was acknowledged", "orchestrator/journal_file.py",
        "PRAGMA synchronous = FULL", "PRAGMA synchronous = OFF", ("tests/powercut",),
    ),
    Mutant(
        "unshipped events forgotten", "another machine lacks a part of the history", "orchestrator/journal.py",
        "(min(oldest, self._unshipped_from(oldest)),)", "(oldest,)", ("tests/orchestrator/test_moving.py",),
    ),
    Mutant(
        "released before it is journaled", "an orphan nobody knows of", "orchestrator/effects.py",
        "        identity = child.identity\n", "        identity = child.identity\n        child.release()\n",
        ("tests/orchestrator/test_release.py",),
    ),
    Mutant(
        "identity not compared", "a stranger with the number of a dead trainer is adopted",
        "orchestrator/process/child.py",
        "    if identify(identity.pid) != identity or child.ended():", "    if child.ended():",
        ("tests/orchestrator/test_child.py",),
    ),
    Mutant(
        "lock not awaited", "a second trainer beside what the first one left", "orchestrator/process/attempt.py",
        "        if is_free(self._paths.child_lock):\n", "        if True:\n",
        ("tests/orchestrator/test_supervisor.py", "tests/orchestrator/test_child.py"),
    ),
    Mutant(
        "killed at the first look", "no evidence is taken", "orchestrator/process/watch.py",
        "            current.verdict == \"suspected\"  # never", "            True  # never",
        ("tests/orchestrator/test_watch.py",),
    ),
    Mutant(
        "own standing still counts", "a suspended machine kills a healthy run", "orchestrator/process/watch.py",
        "    return late_s if late_s > _OVERSLEPT_S else 0.0\n", "    return 0.0\n",
        ("tests/orchestrator/test_watch.py",),
    ),
    Mutant(
        "finished is a crash", "a finished run is reported as failed", "orchestrator/policy/attempts.py",
        "    if event.cause == \"finished\":\n        _end(ctx, \"finished\"",
        "    if False:\n        _end(ctx, \"finished\"",
        (_ENGINE,),
    ),
    Mutant(
        "preemptions are charged", "a spot machine uses up the budget", "orchestrator/policy/attempts.py",
        "    if incident.cls is IncidentClass.PREEMPTION:  # as", "    if False:  # as",
        (_ENGINE, "tests/orchestrator/test_going_on.py", "tests/orchestrator/test_acceptance.py", _SIMULATION),
    ),
    Mutant(
        "the same failure for ever", "a deterministic failure loops", "orchestrator/policy/attempts.py",
        "    return near and before.signature == failure.signature\n", "    return False\n",
        ("tests/orchestrator/test_determinism.py",),
    ),
)  # fmt: skip

POLICY: tuple[Mutant, ...] = (
    Mutant(
        "tainted commits become good", "a rollback loads the damage", "orchestrator/policy/health.py",
        "commit.standing == \"committed\" and not commit.tainted]", "commit.standing == \"committed\"]",
        ("tests/orchestrator/test_target.py",),
    ),
    Mutant(
        "good at once", "what proves itself is not waited for", "orchestrator/policy/health.py",
        "        if proven < needed or ", "        if ", (_ENGINE,),
    ),
    Mutant(
        "budget never refilled", "a healthy run of weeks comes to its end", "orchestrator/policy/budgets.py",
        "        state.restarts_at_s.clear()\n", "", (_ENGINE, _SIMULATION),
    ),
    Mutant(
        "rollback to the newest", "the onset is not looked at", "orchestrator/recovery/target.py",
        "    eligible = [c for c in commits if _is_good(c) and c.step <= latest]\n",
        "    eligible = [c for c in commits if _is_good(c)]\n", ("tests/orchestrator/test_target.py",),
    ),
    Mutant(
        "crash during an incident resumes from the damage", "the diverged loss is a new normal",
        "orchestrator/recovery/target.py",
        "        eligible = [c for c in eligible if _is_good(c) and c.step < max(1, tainted_from_step)]\n",
        "        pass\n", (_ENGINE, "tests/orchestrator/test_acceptance.py", "tests/orchestrator/test_tiers.py"),
    ),
    Mutant(
        "not re-anchored", "a quarantine does not hold over the steps run again", "orchestrator/policy/health.py",
        "\"from_position\": min(q.from_position, record.position)", "\"from_position\": q.from_position",
        ("tests/orchestrator/test_taking_effect.py",),
    ),
    Mutant(
        "late plans hold from when they were decided", "steps run again differ from what they were",
        "orchestrator/policy/health.py",
        "        q.model_copy(update={\"from_position\": max(q.from_position, position)})\n",
        "        q\n", ("tests/orchestrator/test_taking_effect.py",),
    ),
    Mutant(
        "clock set back stops time", "later starts wait for a clock that was wrong", "orchestrator/policy/engine.py",
        "        state.now_s = max(state.now_s, at_s + state.clock_set_back_s)\n",
        "        state.now_s = max(state.now_s, at_s)\n",
        ("tests/orchestrator/test_taking_effect.py",),
    ),
    Mutant(
        "detector not cleared", "a streak goes on over a restart", "monitors/detect/nonfinite.py",
        "        state.key = state.cls = state.streak_from = None\n        state.streak = 0\n", "        pass\n",
        ("tests/monitors/test_nonfinite.py", "tests/monitors/test_diagnosis.py"),
    ),
    Mutant(
        "history kept over a rollback", "the diverged loss is in the window", "monitors/diagnosis.py",
        "        state.history = [row for row in state.history if row.step <= step]\n", "",
        ("tests/monitors/test_diagnosis.py", "tests/monitors/test_spike.py"),
    ),
)  # fmt: skip

MUTANTS: tuple[Mutant, ...] = (*STORE, *TRAINER, *SUPERVISOR, *POLICY)
