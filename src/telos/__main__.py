"""`python -m telos` is `telos`."""

from __future__ import annotations

import sys

from telos.cli.main import main

if __name__ == "__main__":
    sys.argv[0] = "telos"  # the name under which a run records its command
    raise SystemExit(main())
