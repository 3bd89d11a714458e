"""`python -m orchestrator.cli` is `longwatch`."""

import sys

from orchestrator.cli.app import main

sys.exit(main())
