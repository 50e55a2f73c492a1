"""``python -m vmbus.cli``."""

from vmbus.cli import main

main(prog_name="vmbus")
