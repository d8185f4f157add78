"""``python -m shoal.cli`` for where the script is not on the path."""

from shoal.cli.root import main

main(prog_name="shoal")
