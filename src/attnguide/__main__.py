"""`python -m attnguide`, the same as the command `attnguide`; for launchers that start a module."""

from attnguide.cli.main import main

if __name__ == "__main__":
    main(prog_name="attnguide")
