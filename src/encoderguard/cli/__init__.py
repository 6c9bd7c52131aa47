"""The command line: arguments to a job, its record to words or JSON, and an exit code.

0 no finding, 1 finding, 2 the run failed, 3 inconclusive, 4 usage error, 130 stopped by the user.
"""

from encoderguard.cli.app import main

__all__ = ["main"]
