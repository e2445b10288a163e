"""The command line: one module per verb, each light to import. Start at ``rxlm.cli.main``."""
