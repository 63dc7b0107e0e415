"""Every error a user can meet, as one tree. Each message says what is wrong, where, and what to do next.

MeterShipperError
├── UsageError          wrong usage, configuration or set-up: exit code 2
│   ├── ConfigError     a file, a key, what is wrong with it
│   └── StateInUse      another process holds the state directory
└── StateError          the state can't be read or written: exit code 1
"""


class MeterShipperError(Exception):
    """Base of all errors with a message meant for the user; `exit_code` is what the process ends with."""

    exit_code = 1


class UsageError(MeterShipperError):
    """The user asked for something that can't work as it stands; nothing was read or sent."""

    exit_code = 2


class ConfigError(UsageError):
    """The configuration is wrong; the message holds one line for each problem."""


class StateInUse(UsageError):
    """The state directory belongs to a running process."""


class StateError(MeterShipperError):
    """The checkpoint is damaged, from a newer version, or on a disk that refuses it."""
