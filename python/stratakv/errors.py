"""Everything this package raises.

    StrataKVError
    ├── InputError          (ValueError)    an argument does not fit: tokens, tensors, geometry
    ├── ConfigError         (ValueError)    a setting does not make sense
    ├── ModelExistsError    (ValueError)    the name is registered already
    ├── ModelNotFoundError  (KeyError)      no model of that name is registered
    ├── ClosedError         (RuntimeError)  the store or the match was closed before
    └── StoreError          (OSError)       the directory cannot be used
        ├── StoreLockedError                another process holds it
        └── StoreFormatError                another format version, another secret, or damaged beyond reading

A cache problem while serving is none of these: it is a miss with a reason, see `stratakv.Explanation`.
"""


class StrataKVError(Exception):
    """Base of every error that this package raises."""


class InputError(StrataKVError, ValueError):
    """An argument does not fit: tokens, tensors or geometry."""


class ConfigError(StrataKVError, ValueError):
    """A setting does not make sense."""


class ModelExistsError(StrataKVError, ValueError):
    """A model of that name is registered already."""


class ModelNotFoundError(StrataKVError, KeyError):
    """No model of that name is registered."""

    def __str__(self) -> str:
        """The message as it was given; KeyError would show its repr."""
        return str(self.args[0]) if self.args else ""


class ClosedError(StrataKVError, RuntimeError):
    """The store, or the match, was closed before."""


class StoreError(StrataKVError, OSError):
    """The store's directory cannot be used."""


class StoreLockedError(StoreError):
    """Another process holds the store's directory."""


class StoreFormatError(StoreError):
    """The directory was written by another format version or with another secret, or is damaged beyond reading."""
