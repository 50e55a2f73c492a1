"""``python -m vmbus.cli``."""

from vmbus.cli.commands import main

main(prog_name="vmbus")
