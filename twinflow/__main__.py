"""`python -m twinflow`: the command line where its script is not on the path."""

import sys

from twinflow.cli import main

sys.exit(main())
