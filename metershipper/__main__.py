"""`python -m metershipper` and the console script: run the command line, turn errors into one line and an exit code."""

import sys

from metershipper.errors import MeterShipperError


def main() -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 wrong usage or configuration, 3 partial."""
    from metershipper.cli import cli

    try:
        cli(prog_name="metershipper")
    except MeterShipperError as error:
        print(f"metershipper: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
