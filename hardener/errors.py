"""Every error a user can meet, with the exit code on the class.

    HardenerError                 70  a bug in hardener (never raised itself)
    ├── UsageError                 2  nothing was started
    │   ├── RecipeError               a recipe is wrong; all its problems at once
    │   ├── DataError                 a dataset is missing, incomplete, or leaks between uses
    │   ├── UnsupportedModelError     the checkpoint is of a kind that hardener refuses
    │   └── RunError                  a run folder is in use, foreign or does not fit
    ├── HubError                   3  Hub, network or permission
    ├── CannotEdit                70  an attack's edit finds no hold on a model; the attack counts as failed
    ├── GateError                  1  the evidence does not allow what was asked
    ├── VerifyError                1  a release does not agree with its own evidence
    └── ResourceError              5  the run failed: memory, disk, or training that diverged
        ├── DivergedError             a loss or gradient stopped being a number
        └── LostError                 one of several processes is gone

A message says what happened, names the value, and says what to do.
"""

from __future__ import annotations

import errno


def out_of_memory(error: BaseException) -> bool:
    """Python's own, CUDA's (known by name, as torch may not be imported), or that of torch's CPU allocator."""
    named = type(error).__name__ in ("MemoryError", "OutOfMemoryError")
    return named or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def disk_full(error: BaseException) -> bool:
    """No space is left, no quota, or a file is larger than it may be."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class HardenerError(Exception):
    """Base of all errors; `exit_code` is what the command line ends with."""

    exit_code = 70


class UsageError(HardenerError):
    """The request cannot be carried out as it stands; nothing was started."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe is wrong. The message lists every problem with its path and line."""


class DataError(UsageError):
    """A dataset is missing, lacks a column, is empty, or shares rows between uses."""


class UnsupportedModelError(UsageError):
    """The checkpoint is of a kind that cannot be hardened (quantised, adapter only, pickle, ...)."""


class RunError(UsageError):
    """A run folder is in use by another process, is not one, or belongs to another request."""


class HubError(HardenerError):
    """The Hub, the network or a permission stands in the way."""

    exit_code = 3


class CannotEdit(HardenerError):  # noqa: N818 - it ends one attack, and no user meets it
    """An attack's edit of the weights does not apply to this model; the attack is a failed run."""


class GateError(HardenerError):
    """The evidence of a run does not allow its release to be pushed."""

    exit_code = 1


class VerifyError(HardenerError):
    """A release folder disagrees with its own sums, report or recipe."""

    exit_code = 1


class ResourceError(HardenerError):
    """The run failed for lack of memory, disk or a healthy training."""

    exit_code = 5


class DivergedError(ResourceError):
    """A loss or gradient norm is not finite; the last good state is kept."""


class LostError(ResourceError):
    """One of several processes ended, or cannot be reached; the last state is kept."""
