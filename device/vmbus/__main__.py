"""``python -m vmbus COMMAND``, and the program ``vmbus``: Ctrl-C ends them in good order from the first moment on."""

from __future__ import annotations

import signal
import sys


def main() -> None:
    """Run the command line."""
    try:
        # Who starts us may have kept Ctrl-C from an interpreter that was not ready for it.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        from vmbus.cli.commands import main as commands
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    commands(prog_name="vmbus")


if __name__ == "__main__":
    main()
