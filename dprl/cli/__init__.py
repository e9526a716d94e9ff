"""The command `dprl` and its subcommands."""
