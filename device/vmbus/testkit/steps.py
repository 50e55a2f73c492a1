"""`every_step`: a script that is run with a save and restore at every step of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from vmbus.providers import Provider
from vmbus.testkit.contract import ContractViolation, differing
from vmbus.testkit.kit import ProviderTest

Script = Callable[[ProviderTest], Any]
Outcome = Callable[[ProviderTest, Any], Any]


def _everything(kit: ProviderTest, returned: Any) -> Any:
    return {"returned": returned, "guests": kit.transcript()}


def every_step(
    script: Script,
    provider: type[Provider] | str,
    *,
    options: Mapping[str, Any] | None = None,
    outcome: Outcome = _everything,
    points: Iterable[int] | None = None,
) -> int:
    """Run a script once as it is, then once per step of it with a save and restore at that step, then once with one at
    every step; each must come to the same outcome: the same answers, exactly once.

    Args:
        script: called with a fresh `ProviderTest`; must do the same every time (no real time, no random numbers).
        outcome: what is compared, from the kit and what the script returned; by default that and the transcripts of
            all guests' ends.
        points: the steps to save at, from 1; None for all.

    Returns the number of runs with saves. Raises ContractViolation when an outcome differs, and what a run raised,
    with a note that says where the save was.
    """

    def run(save_at: Callable[[int], bool], label: str) -> tuple[Any, int]:
        place = "?"
        try:
            with ProviderTest(provider, options=options) as kit:

                def asked(step: int) -> bool:
                    nonlocal place
                    if not save_at(step):
                        return False
                    place = kit.last_step
                    return True

                kit.save_at = asked
                result = outcome(kit, script(kit))
                kit.save_at = None
        except Exception as error:
            if label:
                error.add_note(f"{label}, after {place}")
            raise
        if label and result != expected:
            raise ContractViolation(
                f"{label}, after {place}, the outcome is another one: {difference(expected, result)}"
            )
        return result, kit.steps

    expected: Any = None
    expected, steps = run(lambda _: False, "")
    runs = 0
    for point in range(1, steps + 1) if points is None else points:
        run(lambda step, point=point: step == point, f"with a save and restore at step {point} of {steps}")  # type: ignore[misc]
        runs += 1
    run(lambda _: True, "with a save and restore at every step")
    return runs + 1


def difference(expected: Any, found: Any, where: str = "") -> str:
    """The first place in which two outcomes differ, as text."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in [*expected, *(key for key in found if key not in expected)]:
            if expected.get(key) != found.get(key):
                return difference(expected.get(key), found.get(key), f"{where}/{key}")
    if isinstance(expected, (list, tuple)) and isinstance(found, (list, tuple)):
        for index, (one, other) in enumerate(zip(expected, found, strict=False)):
            if one != other:
                return difference(one, other, f"{where}/{index}")
        return f"{where or 'the outcome'} has {len(found)} entries, and {len(expected)} without the save"
    if isinstance(expected, bytes) and isinstance(found, bytes):
        without, with_save = differing(expected, found)
        return f"{where or 'the outcome'} is {with_save}, and {without} without the save"
    return f"{where or 'the outcome'} is {found!r}, and {expected!r} without the save"
