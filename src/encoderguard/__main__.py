"""``python -m encoderguard``."""

import sys

from encoderguard.cli import main

if __name__ == "__main__":
    sys.exit(main())
