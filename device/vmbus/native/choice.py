"""Which core runs in this process: the native one, or its pure twin (`vmbus.ring.pure`, `vmbus.wire.packet`)."""

from types import ModuleType

from vmbus.errors import EnvironmentProblem
from vmbus.native import SETTING, load, wanted


def _choose() -> tuple[ModuleType | None, str]:
    setting = wanted()
    if setting == "pure":
        return None, f"{SETTING} is pure"
    try:
        return load(), ""
    except ImportError as error:
        if setting == "native":
            raise EnvironmentProblem(
                f"{SETTING} is native and the native core cannot be loaded: {error}; run scripts/setup, or unset it"
            ) from None
        return None, str(error)


core, _why_pure = _choose()
"""The native core, or None: the pure twin runs."""

CORE = "native" if core is not None else f"pure ({_why_pure})"
"""For people: which one it is, and why it is the pure one."""
