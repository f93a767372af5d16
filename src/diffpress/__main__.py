"""`python -m diffpress`: the command line, where its script is not on the path."""

import sys

from diffpress.cli import main

sys.exit(main())
