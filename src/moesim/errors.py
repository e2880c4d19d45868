"""What goes wrong, by whose fault. A message names the thing, its value and what would be legal."""


class MoesimError(Exception):
    """Base of every error that moesim raises on purpose; the command line prints it in one line."""


class InputError(MoesimError):
    """A file, an option or a parameter that cannot be used."""


class TraceError(InputError):
    """A trace that is broken, or that does not hold what was asked of it."""


class RecordError(InputError):
    """A model whose routing cannot be recorded, or a recording that cannot go on."""


class ModelError(InputError):
    """A model description that is incomplete or unknown."""


class ProfileError(InputError):
    """A hardware profile that is broken or unknown."""


class CalibrationError(InputError):
    """A measurement that cannot be made, or that cannot be true."""


class PolicyError(MoesimError):
    """A decision of a policy that cannot be carried out; names policy, hook, layer and rule."""


class DeadlockError(MoesimError):
    """A wait that can never end."""


class RealError(MoesimError):
    """What went wrong on a real machine: no memory, no kernel, a lane that failed."""


class AuditError(MoesimError):
    """A log that breaks a rule of the machine or of the host program."""
