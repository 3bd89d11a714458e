"""`python -m tests.powercut --cuts N --seed S`: many power cuts, over many lives of a journal. `make powercuts`."""

import argparse
import sys

from tests.powercut.work import cut, work

_CUTS_A_LIFE = 200


def main() -> int:
    """Cut and tell; the last line says how many were survived."""
    parser = argparse.ArgumentParser(prog="python -m tests.powercut", description=__doc__)
    parser.add_argument("--cuts", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    failed, lives = 0, -(-arguments.cuts // _CUTS_A_LIFE)
    for life in range(lives):
        seed = arguments.seed * 1_000_003 + life
        for wrong in cut(work(seed, batches=300), seed, min(_CUTS_A_LIFE, arguments.cuts - life * _CUTS_A_LIFE)):
            failed += 1
            print(wrong, flush=True)
    print(f"{arguments.cuts - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
