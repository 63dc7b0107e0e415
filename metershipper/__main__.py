"""`python -m metershipper` and the console script."""


def main() -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 wrong usage or configuration."""
    from metershipper.cli import cli

    cli(prog_name="metershipper")


if __name__ == "__main__":
    main()
