"""``python -m groundstate`` is the command ``groundstate``."""

from groundstate.cli.main import run

if __name__ == "__main__":
    run()
