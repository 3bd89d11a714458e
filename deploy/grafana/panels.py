"""What the dashboards show. `S` in an expression stands for the labels that choose runs.

A panel is: title, unit, what it says, and its queries with the names of their series. Counters are read as rates or
increases over `$__rate_interval`; gauges as they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Query = tuple[str, str]
Step = tuple[float | None, str]
"""From a value on, this colour; the first from None."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel; `width` of 24 columns. `steps` are thresholds. `named` shows a series' name instead of its value."""

    title: str
    unit: str
    description: str
    queries: Sequence[Query]
    kind: Literal["time", "number", "states"] = "time"
    width: int = 12
    steps: Sequence[Step] = ((None, "green"),)
    logarithmic: bool = False
    named: bool = False


def _rate(metric: str, by: str = "") -> str:
    inner = f"rate(longwatch_{metric}{{S}}[$__rate_interval])"
    return f"sum by ({by}) ({inner})" if by else inner


def _increase(metric: str, by: str) -> str:
    return f"sum by ({by}) (increase(longwatch_{metric}{{S}}[$__rate_interval]))"


_LOW = ((None, "red"), (1, "orange"), (3, "green"))
_AGE = ((None, "green"), (3600, "orange"), (4 * 3600, "red"))

HEAD = (
    Panel("State", "short", "1 for the state that the run is in.",
          [("longwatch_state{S} == 1", "{{state}}")], "number", 4, named=True),
    Panel("Step", "short", "Updates done in the surviving lineage.",
          [("longwatch_step{S}", "step")], "number", 4),
    Panel("Progress", "percentunit", "Steps done of those planned.",
          [("longwatch_step{S} / longwatch_planned_steps{S}", "done")], "number", 4),
    Panel("Loss", "short", "Loss of the last step, nats a token.",
          [('longwatch_loss{S, split="train"}', "loss")], "number", 4),
    Panel("Rollbacks left", "short", "What the training budget still allows.",
          [("longwatch_rollbacks_left{S}", "rollbacks")], "number", 4, _LOW),
    Panel("Since the last good checkpoint", "s", "What a rollback would cost at most, in time.",
          [("time() - longwatch_last_good_timestamp_seconds{S}", "age")], "number", 4, _AGE),
)  # fmt: skip

HEALTH = (
    Panel("Loss by split", "short", "Training and validation loss, nats a token.",
          [("longwatch_loss{S}", "{{split}}")], width=24),
    Panel("Gradient norm", "short", "Global L2 norm before clipping; logarithmic.",
          [("longwatch_grad_norm{S}", "norm")], logarithmic=True),
    Panel("Learning rate", "sci", "As applied, overlays included.",
          [("longwatch_learning_rate{S}", "applied")]),
    Panel("Update ratio by layer group", "sci", "Size of the update over size of the weights; healthy is about 1e-3.",
          [("longwatch_update_ratio{S}", "{{layer_group}}")], logarithmic=True),
    Panel("LR factor by overlays", "percentunit", "What a recovery has lowered the learning rate to.",
          [("longwatch_lr_factor{S}", "factor")]),
    Panel("Block output RMS", "short", "Activations by layer group, on the schedule of monitor.details_every.",
          [("longwatch_activation_rms{S}", "{{layer_group}}")]),
    Panel("Largest attention logit", "short", "By layer group; growth precedes divergence.",
          [("longwatch_attention_logit_max{S}", "{{layer_group}}")]),
    Panel("Squared gradient over second moment", "short", "RMS by layer group; far above 1 Adam lags behind.",
          [("longwatch_second_moment_ratio{S}", "{{layer_group}}")]),
    Panel("log Z", "short", "Mean log partition of the output; drift is a sign of output logits that run away.",
          [("longwatch_log_z{S}", "log Z")]),
    Panel("Clipped and skipped updates", "percentunit", "Share of the updates.",
          [(f"{_rate('clipped_steps_total')} / {_rate('steps_total')}", "clipped"),
           (f"{_rate('skipped_steps_total')} / {_rate('steps_total')}", "skipped")]),
    Panel("Tokens a second", "short", "Work done, replays and lost work included.",
          [(_rate("tokens_total"), "tokens/s")]),
    Panel("Where a step goes", "percentunit", "Seconds of each part a second.",
          [(_rate("step_seconds_total", "part"), "{{part}}")]),
    Panel("Non-finite steps", "short", "Steps whose loss or gradient norm was NaN or infinite.",
          [(_increase("nonfinite_total", "signal"), "{{signal}}")]),
)  # fmt: skip

DEEDS = (
    Panel("State over time", "short", "1 where the run was in the state.",
          [("longwatch_state{S} == 1", "{{state}}")], "states", 24),
    Panel("Incidents by class", "short", "What was seen.",
          [(_increase("incidents_total", "class") + " > 0", "{{class}}")]),
    Panel("Actions of the policy", "short", "What was done about it.",
          [(_increase("actions_total", "action") + " > 0", "{{action}}")]),
    Panel("Ends of attempts by cause", "short", "Why trainer processes ended.",
          [(_increase("attempt_exits_total", "cause") + " > 0", "{{cause}}")]),
    Panel("Budgets left", "short", "Restarts and rollbacks before the run halts.",
          [("longwatch_restarts_left{S}", "restarts"), ("longwatch_rollbacks_left{S}", "rollbacks")], steps=_LOW),
    Panel("Silence that is suspected", "s", "Deadlines by phase, as learned from this run.",
          [("longwatch_deadline_seconds{S}", "{{phase}}")]),
    Panel("Quarantined shards", "short", "Shards that are not read any more.",
          [("longwatch_quarantined_shards{S}", "shards")]),
)  # fmt: skip

COST = (
    Panel("Training of the wall time", "percentunit", "Seconds in steps a second; replays and lost work included.",
          [(f"sum by (job, instance) ({_rate('step_seconds_total')})", "in steps")]),
    Panel("Steps given up", "short", "Updates that a rollback or restart took back.",
          [("increase(longwatch_lost_steps_total{S}[$__rate_interval])", "steps")]),
    Panel("Checkpoints", "short", "Saves by how far they came.",
          [(_increase("checkpoints_total", "outcome"), "{{outcome}}")]),
    Panel("Age of the newest checkpoint", "s", "On the node's disk, and in the store.",
          [("time() - longwatch_last_local_commit_timestamp_seconds{S}", "disk"),
           ("time() - longwatch_last_commit_timestamp_seconds{S}", "store")], steps=_AGE),
    Panel("Training held up by saves", "percentunit", "Share of the time; the target is under a thousandth.",
          [(_rate("checkpoint_stall_seconds_total"), "stall")]),
    Panel("Evaluations", "percentunit", "Share of the time.",
          [(_rate("evaluation_seconds_total"), "evaluation")]),
    Panel("Bytes to the store", "Bps", "Checkpoints on their way.",
          [(_rate("checkpoint_bytes_total"), "bytes/s")]),
    Panel("Store calls repeated", "short", "Calls that failed and were tried again.",
          [("increase(longwatch_store_retries_total{S}[$__rate_interval])", "repeated")]),
)  # fmt: skip

FLEET = (
    Panel("Loss of every run", "short", "Training loss, nats a token.",
          [('longwatch_loss{S, split="train"}', "{{instance}}")], width=24),
    Panel("Tokens a second by run", "short", "Work done, replays and lost work included.",
          [(_rate("tokens_total"), "{{instance}}")]),
    Panel("Incidents by run", "short", "Of all classes.",
          [(_increase("incidents_total", "job, instance"), "{{instance}}")]),
    Panel("Training of the wall time by run", "percentunit", "Seconds in steps a second.",
          [(f"sum by (job, instance) ({_rate('step_seconds_total')})", "{{instance}}")]),
    Panel("Age of the last good checkpoint by run", "s", "What a rollback would cost at most, in time.",
          [("time() - longwatch_last_good_timestamp_seconds{S}", "{{instance}}")], steps=_AGE),
    Panel("Progress by run", "percentunit", "Steps done of those planned.",
          [("longwatch_step{S} / longwatch_planned_steps{S}", "{{instance}}")], width=24),
)  # fmt: skip
