"""The ``shoal`` command (`shoal.cli.root.main`), and what servers and other programs use of its parts.

The rule: nothing is imported here, because a server that shares a flag with the command needs none of its subcommands.
"""
