"""`python -m innermax.cli`, where the command is not on the path."""

import sys

from innermax.cli import main

sys.exit(main())
