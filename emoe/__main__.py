"""``python -m emoe``: the same program as ``emoe``."""

import sys

from emoe.cli.main import main

sys.exit(main())
