"""The exceptions of isolatency, one small tree, kept in the lowest room so that every room can raise them.

IsolatencyError          exit 1   anything that the user has to know; one line: wanted, found, what to do
├── UsageError           exit 2   a flag, a plan or a file of the user's that cannot be used as it is
├── GateError            exit 3   a bound that the user set is exceeded
├── NotComparableError   exit 4   parity is broken, or two results cannot be compared
├── UndecidedError       exit 5   the samples do not decide the question
├── ShellError           exit 1   a host command failed; carries its output
├── MissingError         exit 1   an image, a program or a right is missing; says the command that brings it
└── TargetError          exit 1   a target did not start, or died; carries the tail of its console
"""


class IsolatencyError(Exception):
    """Base class. `str(error)` is the one line that the user reads; `detail` may hold more (a console's tail)."""

    exit_code = 1

    def __init__(self, message: str, detail: str = "") -> None:
        super().__init__(message)
        self.detail = detail


class UsageError(IsolatencyError):
    exit_code = 2


class GateError(IsolatencyError):
    exit_code = 3


class NotComparableError(IsolatencyError):
    exit_code = 4


class UndecidedError(IsolatencyError):
    exit_code = 5


class ShellError(IsolatencyError):
    pass


class MissingError(IsolatencyError):
    pass


class TargetError(IsolatencyError):
    pass
