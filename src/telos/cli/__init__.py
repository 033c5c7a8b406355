"""The command line: one module per group of commands, imported when its command is called, so that `telos list` never waits for torch."""
