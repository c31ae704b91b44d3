"""`python -m modeling_lavit.command_line`, for launchers that take a module."""

import sys

from .main import main


sys.exit(main())
