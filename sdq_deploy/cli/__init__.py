"""The command line: one file per command group, imported without anything heavy."""
