"""`python -m jointspar`: the same as the command `jointspar`."""

import sys

from jointspar.cli import main

sys.exit(main())
