"""What the scripts have in common: the checkout, the cache's virtual environment, and running something in it.

Standard library only, and no syntax that an old Python would choke on before `require_python` has spoken.
"""

import os
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
ROOTS = [str(CHECKOUT / "device"), str(CHECKOUT / "guest")]
MINIMUM = (3, 11)
_RETRY = "VMBUS_SETUP_PYTHON_TRIED"


def require_python() -> None:
    """Start again under a newer Python if this one is too old, or say that there is none."""
    if sys.version_info >= MINIMUM:
        os.environ.pop(_RETRY, None)
        return
    if _RETRY not in os.environ:
        for name in ("python3.13", "python3.12", "python3.11", "/usr/bin/python3"):
            probe = "import sys; sys.exit(sys.version_info < (3, 11))"
            try:
                suitable = subprocess.call([name, "-c", probe], stderr=subprocess.DEVNULL) == 0
            except OSError:
                continue
            if suitable:
                os.environ[_RETRY] = name
                os.execvp(name, [name] + sys.argv)  # noqa: RUF005
    sys.exit("Python 3.11 or later is needed, and python3 is %s" % sys.version.split()[0])  # noqa: UP031


def execute(python: Path, arguments: "list[str]") -> None:
    """Replace this process by the environment's Python with our packages on its path."""
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(ROOTS))
    environment.pop("PYTHONHOME", None)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(str(python), [str(python), *arguments], environment)


def use_packages() -> None:
    """Make our packages importable in this process."""
    sys.path[:0] = ROOTS
