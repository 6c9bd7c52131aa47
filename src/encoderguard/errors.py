"""The error tree: caller mistakes and run failures are different branches.

EncoderGuardError
├── UsageError              the caller can fix it: one sentence, exit code 4
│   ├── ImageError          images missing, unreadable, of the wrong shape, or too few
│   ├── EncoderError        an encoder or checkpoint cannot be loaded as asked
│   ├── SettingError        unknown option, impossible value, unknown method name
│   └── OutputError         the output path cannot be written as asked
└── RunError                the run itself failed: exit code 2
    ├── NonFiniteError      a loss or feature became NaN or infinite
    └── StorageError        the machine could not store the result (disk full, I/O error)
"""

__all__ = [
    "EncoderError",
    "EncoderGuardError",
    "ImageError",
    "NonFiniteError",
    "OutputError",
    "RunError",
    "SettingError",
    "StorageError",
    "UsageError",
]


class EncoderGuardError(Exception):
    """Base of every error that EncoderGuard raises on purpose."""

    exit_code: int = 2


class UsageError(EncoderGuardError, ValueError):
    """The caller can fix it. The message says what was expected, what was found, what to do."""

    exit_code = 4


class ImageError(UsageError):
    """An image set is missing, unreadable, of the wrong shape or type, or too small."""


class EncoderError(UsageError):
    """An encoder specification or checkpoint cannot be loaded as asked."""


class SettingError(UsageError):
    """An unknown option, an impossible value, or an unknown method name."""


class OutputError(UsageError):
    """The output path cannot be written as asked."""


class RunError(EncoderGuardError, RuntimeError):
    """The run failed for a reason that is not the caller's."""


class NonFiniteError(RunError):
    """A loss or a feature became NaN or infinite."""


class StorageError(RunError):
    """The machine could not store the result (disk full, input/output error)."""
