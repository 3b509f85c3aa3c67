"""Errors a user can act on: one line, the next step, and the process exit code that scripts rely on."""


class NexusError(Exception):
    """A failure with a one-line message (value, what was expected), a `hint` (next step) and an exit `code`."""

    code = 1

    def __init__(self, message: str, *, hint: str | None = None):
        super().__init__(" ".join(str(message).split()))
        self.hint = hint


class UsageError(NexusError):
    """A bad flag or value."""

    code = 2


class InputError(NexusError):
    """Bad input: prompt, batch line, picture, audio, video, config or data set."""

    code = 3


class ModelError(NexusError):
    """A model or checkpoint is missing, damaged, of the wrong kind, or refused as unsafe."""

    code = 4


class DeviceError(NexusError):
    """The device is missing or out of memory."""

    code = 5


class OutputError(NexusError):
    """Output cannot be written: disk full, no permission, or it exists already."""

    code = 6


class PartialError(NexusError):
    """A batch finished with some items failed."""

    code = 7


class BusyError(NexusError):
    """Another process holds this run directory."""

    code = 8


class DivergedError(NexusError):
    """Training met a non-finite loss or gradient; the last good checkpoint is kept."""

    code = 9


class StoppedError(NexusError):
    """Stopped on request after saving; the same command again continues."""

    code = 75


def is_full(error: BaseException) -> bool:
    """Whether an error says that memory is full: torch's kind for a graphics card, or its words for the CPU."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in said or "can't allocate memory" in said
