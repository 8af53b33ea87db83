"""What each subcommand of `mobula` does; `runtime.cli` only parses and dispatches."""
