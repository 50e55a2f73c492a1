"""QEMU's background jobs, started over the monitor and followed to their end."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Mapping

from vmbus.errors import WaitTimeout, code_in
from vmbus.qemu.connections import QemuMonitor
from vmbus.qemu.qmp import QmpCommandFailed
from vmbus.util.patience import patient

_POLL_INTERVAL = 0.1  # seconds between looks at the job when no event comes


async def run_job(
    monitor: QemuMonitor, command: str, arguments: Mapping[str, object], timeout: float, what: str
) -> None:
    """Starts a job and waits until it has ended.

    Raises `QmpCommandFailed` with QEMU's reason if it fails, `WaitTimeout` naming `what`. A job cannot be called off:
    if we are cancelled, its end is still waited for, so that nothing goes on behind our back.
    """
    timeout = patient(timeout)
    name = f"vmbus-{secrets.token_hex(6)}"
    with monitor.listen("JOB_STATUS_CHANGE") as events:
        await monitor.execute(command, {"job-id": name, **arguments})

        async def concluded() -> str | None:
            deadline = time.monotonic() + timeout
            while True:
                jobs = await monitor.execute("query-jobs")
                job = next((one for one in jobs if one["id"] == name), None)
                if job is None:
                    return "the job is gone, and nobody knows how it ended"
                if job["status"] == "concluded":
                    await monitor.execute("job-dismiss", {"id": name})
                    return None if job.get("error") is None else str(job["error"])
                left = deadline - time.monotonic()
                if left <= 0:
                    raise WaitTimeout(f"{what} (QEMU's job {command} is {job['status']!r})", timeout)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(left, _POLL_INTERVAL)):
                        await events.get()
                events.clear()

        task = asyncio.create_task(concluded())
        try:
            error = await asyncio.shield(task)
        except asyncio.CancelledError:
            await asyncio.wait({task})
            task.exception()  # looked at: the cancellation is what is told
            raise
    if error is not None:
        raise QmpCommandFailed(f"{what}: QEMU's {command} failed: {error}", code=code_in(error))
