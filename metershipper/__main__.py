"""`python -m metershipper` and the console script."""

import atexit
import gc
import sys


def main() -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 wrong usage or configuration."""
    # For a command line of its own, which httpx does without where it can't be imported, it would import rich and
    # pygments: a sixth of the start, and some megabytes in every sidecar.
    sys.modules.setdefault("httpx._main", None)  # type: ignore[arg-type]
    # What is left at the exit goes with the process: to look for garbage in it first takes 0.1 s.
    atexit.register(gc.freeze)
    from metershipper.cli import cli

    cli(prog_name="metershipper")


if __name__ == "__main__":
    main()
