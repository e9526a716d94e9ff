"""Runs `python -m dprl` as the command `dprl`."""

from dprl.cli.main import main

if __name__ == "__main__":
    main()
