"""The exceptions that jointspar raises beyond ValueError and TypeError for bad arguments."""


class JointSparError(RuntimeError):
    """Base of all run-time failures of this library."""


class DesyncError(JointSparError):
    """Ranks disagree about what comes next; raised on every rank before any payload was exchanged."""


class CollectiveTimeout(JointSparError):
    """A wait on other ranks outlived its deadline; the communicator must not be used again."""


class RanksLost(JointSparError):
    """Other ranks have died, and those that are left may go on: see `optimizer.shrink()`."""


class CheckpointError(JointSparError):
    """A checkpoint is missing, damaged, or belongs to another run."""
