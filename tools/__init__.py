"""The `ibq` command (tools/cli.py) and one thin module for each subcommand."""
