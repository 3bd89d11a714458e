"""GPUs as NVIDIA's own tool describes them."""

import csv
import shutil
import subprocess
from collections.abc import Iterator

from orchestrator.findings import Finding, Verdict

_FIELDS = (
    "index", "name", "memory.used", "memory.total", "ecc.errors.uncorrected.volatile.total",
    "retired_pages.pending", "remapped_rows.pending", "remapped_rows.failure", "temperature.gpu", "pstate",
)  # fmt: skip
_TOOL_S = 30.0
_USED_MB = 1024.0  # a context of somebody else's
_HOT_C = 85.0


def examine_gpus() -> list[Finding]:
    """One finding a GPU."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return [Finding("gpu", "pass", "no nvidia-smi: training runs on the CPU")]
    command = [tool, f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TOOL_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [Finding("gpu", "fail", f"nvidia-smi does not answer ({type(error).__name__})", "reboot the node")]
    if done.returncode != 0:
        why = (done.stdout + done.stderr).strip().splitlines() or ["it said nothing"]
        return [Finding("gpu", "fail", f"nvidia-smi failed: {why[0][:120]}", "look at the driver with dmesg")]
    return list(read_gpus(done.stdout))


def read_gpus(answer: str) -> Iterator[Finding]:
    """What nvidia-smi's CSV says, one finding a line. Fields that a device does not have are `[N/A]`. Pure."""
    for row in csv.reader(answer.splitlines(), skipinitialspace=True):
        facts = dict(zip(_FIELDS, row, strict=False))
        used = f"{facts['memory.used']} of {facts['memory.total']} MiB used"
        verdict, remedy = _judged(facts)
        yield Finding(
            f"gpu {facts['index']}", verdict, f"{facts['name']}, {used}, {facts['temperature.gpu']} C", remedy
        )


def _judged(facts: dict[str, str]) -> tuple[Verdict, str]:
    """What is wrong, the worst first."""

    def above(field: str, limit: float) -> bool:
        try:
            return float(facts.get(field, "")) > limit
        except ValueError:
            return facts.get(field) == "Yes"

    if above("remapped_rows.failure", 0):
        return "fail", "memory rows cannot be remapped any more: have the device replaced"
    if above("ecc.errors.uncorrected.volatile.total", 0):
        return "fail", "uncorrected memory errors since the last reset: reset the device (nvidia-smi -r) and look again"
    if above("retired_pages.pending", 0) or above("remapped_rows.pending", 0):
        return "warn", "memory waits for a reset to be taken out of use: reset the device before a long run"
    if above("memory.used", _USED_MB):
        return "warn", "somebody else's process holds memory there: end it (nvidia-smi names it)"
    if above("temperature.gpu", _HOT_C):
        return "warn", "it is hot and will slow itself down: look at the cooling"
    return "pass", ""
