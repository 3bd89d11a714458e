"""The one line of dependency: who may import whom, and that the supervisor stays without torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_OURS = ("orchestrator", "trainer", "monitors")


def _modules(package: str) -> list[Path]:
    return sorted((ROOT / package.replace(".", "/")).rglob("*.py"))


def _imports(file: Path) -> Iterator[str]:
    """Every module of ours that a file names in an import, also inside functions."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        match node:
            case ast.Import():
                yield from (alias.name for alias in node.names if alias.name.split(".")[0] in _OURS)
            case ast.ImportFrom() if node.level == 0 and node.module and node.module.split(".")[0] in _OURS:
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            case ast.ImportFrom() if node.level:
                pytest.fail(f"{file}: imports are written from the root")


def _below(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("orchestrator", ("orchestrator", "monitors", "trainer.contract")),
        ("trainer", ("trainer", "monitors")),
        ("trainer.contract", ("trainer.contract",)),
        ("monitors", ("monitors",)),
    ],
)
def test_no_arrow_points_up(package: str, allowed: tuple[str, ...]) -> None:
    """orchestrator -> trainer.contract -> nothing, orchestrator -> monitors, trainer -> monitors; no other arrow."""
    files = _modules(package)
    wrong = [
        f"{file.relative_to(ROOT)}: {module}"
        for file in files
        for module in _imports(file)
        if not any(_below(module, target) for target in allowed)
    ]

    assert files
    assert wrong == []


_IMPORT_ALL = """
import importlib, pkgutil, sys
import orchestrator
names = [module.name for module in pkgutil.walk_packages(orchestrator.__path__, "orchestrator.")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
assert len(names) > 30, names
sys.exit("torch" in sys.modules)
"""


def test_importing_all_of_the_supervisor_leaves_torch_out() -> None:
    """A CUDA fault cannot take down a process that never loaded torch, and it starts fast."""
    done = subprocess.run([sys.executable, "-c", _IMPORT_ALL], cwd=ROOT, capture_output=True, text=True, timeout=60)

    assert done.returncode == 0, done.stderr


def test_every_file_stays_small() -> None:
    """Files under 400 lines, so that each can be read in one sitting."""
    counted = {file: file.read_text(encoding="utf-8").count("\n") for name in _OURS for file in _modules(name)}

    assert {str(file.relative_to(ROOT)): lines for file, lines in counted.items() if lines >= 400} == {}
