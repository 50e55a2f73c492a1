"""A pytest plugin: fixtures for tests of VMs, and of a device and its guest without a VM. docs/pytest.md is the manual.

It is there once the package is installed; from a checkout, ask for it: `-p vmbus.pytest_plugin`, or in a conftest.py
`pytest_plugins = ["vmbus.pytest_plugin"]`. It changes nothing for tests that use none of its fixtures.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from vmbus.device.description import DeviceDescription
    from vmbus.providers import Provider
    from vmbus.testkit.blocking import BlockingVm, LoopThread
    from vmbus.testkit.kit import ProviderTest
    from vmbus.testkit.loopback.pair import LoopbackPair
    from vmbus.testkit.vm import VmDevice
    from vmbus.transport.library import Library
    from vmbus.vm.command_line import Programs
    from vmbus.vm.description import VmDescription

_PREFIX = "vmbus-pytest-"
_LOG_LINES = 30

_SUBJECTS: pytest.StashKey[list[BlockingVm]] = pytest.StashKey()
"""The VMs of a test, for its report."""
_FAILED: pytest.StashKey[bool] = pytest.StashKey()
"""Of a test: it has failed."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """--vmbus-config, and the same in the configuration file."""
    group = parser.getgroup("vmbus", "VMs and devices")
    text = "VM description for tests that name none: a .toml file, or one of those that come with the project"
    group.addoption("--vmbus-config", metavar="CONFIG", help=text)
    parser.addini("vmbus_config", text, default="demo")


def pytest_configure(config: pytest.Config) -> None:
    """The marker."""
    config.addinivalue_line(
        "markers",
        "vmbus(config=..., audit=False): which VM the fixture vmbus_vm gives (a description, its path or name), and "
        "whether audit records are kept",
    )
    config.addinivalue_line(
        "markers",
        "vmbus_errors(match=...): a callback of a provider raises in this test, once or more; `match` is a regular "
        "expression that is found in each such error. Without the marker an error fails the test",
    )


# ---- what is there for the whole run ---------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def vmbus_library() -> Library:
    """The libvfio-user that VMBUS_LIBVFIO_USER names, else the one that set-up has found or built."""
    from vmbus.provision.libvfio_user import find_library
    from vmbus.transport.library import load

    return load(find_library())


@pytest.fixture(scope="session")
def vmbus_programs() -> Programs:
    """QEMU, the guest's files and the rest of what a VM needs; set up first where that has not been done."""
    from vmbus.provision import provision
    from vmbus.vm.command_line import programs_from

    return programs_from(provision())


class _Booted:
    """Guests that were booted once in this run: a snapshot of each description, from which each test gets its VM."""

    def __init__(self, thread: LoopThread, programs: Programs, folder: Path) -> None:
        self.thread = thread
        self.programs = programs
        self._folder = folder
        self._snapshots: dict[tuple[bytes, bool], Path] = {}

    def vm(self, description: VmDescription, *, audit: Path | None, capture: Path | None) -> BlockingVm:
        """A VM as it was right after its boot."""
        import msgspec

        from vmbus.testkit.blocking import BlockingVm

        key = (msgspec.json.encode(description), audit is not None)
        if key not in self._snapshots:
            self._snapshots[key] = self._boot(description, audit is not None, self._folder / str(len(self._snapshots)))
        folder = self._snapshots[key]
        vm = BlockingVm.restored_from(
            self.thread, folder / "snapshot", self.programs, audit=audit, capture=capture, clone=True
        )
        if audit is not None:
            vm.audit_before.append(folder / "audit")
        return vm

    def _boot(self, description: VmDescription, audited: bool, folder: Path) -> Path:
        from vmbus.testkit.blocking import BlockingVm

        folder.mkdir(mode=0o700)
        audit = folder / "audit" if audited else None
        with BlockingVm.launch(self.thread, description, self.programs, audit=audit) as vm:
            vm.call(vm.machine.save(folder / "snapshot"))
        return folder


@pytest.fixture(scope="session")
def vmbus_booted(vmbus_programs: Programs) -> Iterator[_Booted]:
    """For the other fixtures."""
    from vmbus.testkit.blocking import LoopThread
    from vmbus.vm.run_directory import own

    _clear_abandoned()
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    thread = LoopThread()
    try:
        lock = own(folder)
        yield _Booted(thread, vmbus_programs, folder)
        lock.close()
    finally:
        thread.close()
        shutil.rmtree(folder, ignore_errors=True)


def _clear_abandoned() -> None:
    """Remove what killed runs of this user have left: their processes are gone with them, their snapshots are not."""
    from vmbus.vm.run_directory import remove_abandoned

    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            status = folder.lstat()
            if status.st_uid == os.getuid() and not folder.is_symlink():
                remove_abandoned(folder)


# ---- what a test asks for --------------------------------------------------------------------------------------------


@pytest.fixture
def vmbus_vms(
    request: pytest.FixtureRequest, vmbus_booted: _Booted, tmp_path: Path, vmbus_provider_errors: ProviderErrors
) -> Iterator[Callable[..., BlockingVm]]:
    """Call it for a VM: `vmbus_vms(config="demo", audit=False, capture=None)`. All of them end with the test."""
    from vmbus.vm.description import VmDescription

    vms: list[BlockingVm] = []
    request.node.stash[_SUBJECTS] = vms

    def make(
        config: str | Path | VmDescription | None = None, *, audit: bool = False, capture: Path | None = None
    ) -> BlockingVm:
        description = config if isinstance(config, VmDescription) else _description(request.config, config)
        records = tmp_path / f"audit-{len(vms)}" if audit else None
        vms.append(vmbus_booted.vm(description, audit=records, capture=capture))
        return vms[-1]

    try:
        yield make
    finally:
        try:
            _tell(request, vms)
        finally:
            for vm in vms:
                vmbus_provider_errors.texts += vm.note_provider_errors()
                vm.kill()


@pytest.fixture
def vmbus_vm(request: pytest.FixtureRequest, vmbus_vms: Callable[..., BlockingVm]) -> BlockingVm:
    """A running VM (`vmbus.testkit.blocking.BlockingVm`), as it is right after its boot."""
    marker = request.node.get_closest_marker("vmbus")
    return vmbus_vms(**(marker.kwargs if marker is not None else {}))


@pytest.fixture
def vmbus_kit(request: pytest.FixtureRequest) -> Iterator[Callable[..., ProviderTest]]:
    """Call it for a provider alone, with virtual time: `vmbus_kit("echo", options={"hold": 8})`, or with a class. Each
    is finished when the test has passed."""
    from vmbus.testkit.kit import ProviderTest

    with contextlib.ExitStack() as stack:

        def make(provider: type[Provider] | str, *, options: Mapping[str, Any] | None = None) -> ProviderTest:
            kit = ProviderTest(provider, options=options)

            def end() -> None:
                failed = request.node.stash.get(_FAILED, False)
                kit.__exit__(AssertionError if failed else None, None, None)

            stack.callback(end)
            return kit

        yield make


@pytest.fixture
def vmbus_loopback(
    request: pytest.FixtureRequest, vmbus_library: Library, vmbus_provider_errors: ProviderErrors
) -> Iterator[Callable[..., LoopbackPair]]:
    """Call it for a device server and a guest in this process: `vmbus_loopback("echo", options={"hold": 8})`, with a
    class, or with a `DeviceDescription`. All of them end with the test."""
    from vmbus.device.description import DeviceDescription
    from vmbus.providers import PROVIDERS
    from vmbus.testkit.device import describe_provider
    from vmbus.testkit.loopback.pair import LoopbackPair

    pairs: list[LoopbackPair] = []
    with contextlib.ExitStack() as stack:

        def make(
            provider: type[Provider] | str | DeviceDescription,
            *,
            options: Mapping[str, Any] | None = None,
            capture: Path | None = None,
        ) -> LoopbackPair:
            if not isinstance(provider, DeviceDescription):
                if not isinstance(provider, str):
                    patch = stack.enter_context(pytest.MonkeyPatch.context())
                    patch.setitem(PROVIDERS, provider.kind, provider)
                provider = describe_provider(provider, options)
            pairs.append(LoopbackPair(provider, vmbus_library, capture=capture))
            stack.callback(pairs[-1].close)
            return pairs[-1]

        try:
            yield make
        finally:
            properties = request.node.user_properties
            properties.append(("vmbus_save_restores", sum(pair.saves for pair in pairs)))
            properties.append(("vmbus_packets", sum(pair.packets for pair in pairs)))


@pytest.fixture
def vmbus_qemu(vmbus_vms: Callable[..., BlockingVm], monkeypatch: pytest.MonkeyPatch) -> Callable[..., VmDevice]:
    """Call it for a VM with a provider: `vmbus_qemu("echo", options={"hold": 8})`, with a class, or with a
    `VmDescription`. All of them end with the test."""
    from vmbus.providers.loading import ALLOW_VARIABLE, PATH_VARIABLE
    from vmbus.testkit.device import describe_provider, importable
    from vmbus.testkit.vm import VmDevice
    from vmbus.vm.description import VmDescription

    def make(
        provider: type[Provider] | str | VmDescription, *, options: Mapping[str, Any] | None = None, **more: Any
    ) -> VmDevice:
        if isinstance(provider, VmDescription):
            return VmDevice(vmbus_vms(provider, **more))
        kind, root = (provider, None) if isinstance(provider, str) else importable(provider)
        if root is not None:
            monkeypatch.setenv(PATH_VARIABLE, str(root), prepend=os.pathsep)
            monkeypatch.setenv(ALLOW_VARIABLE, kind, prepend=",")
        device = describe_provider(provider, options, kind=kind)
        return VmDevice(vmbus_vms(VmDescription(device.providers[0].name, device), **more))

    return make


def _description(config: pytest.Config, wanted: str | Path | None) -> VmDescription:
    from vmbus.places import DESCRIPTIONS
    from vmbus.vm.description import find_description, load_description

    name = str(wanted or config.getoption("--vmbus-config") or config.getini("vmbus_config"))
    found = find_description(name, DESCRIPTIONS)
    if not found.is_absolute() and not found.exists():
        found = config.rootpath / found
    return load_description(found)


# ---- errors of providers -------------------------------------------------------------------------------------------


class ProviderErrors:
    """What callbacks of providers have raised in a test, as text: on servers in this process, and on those of VMs."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def observe(self, provider: str, callback: str, error: BaseException) -> None:
        """An error in this process."""
        self.texts.append(f"provider {provider}: {callback} raised {error!r}")

    def judge(self, node: pytest.Item) -> None:
        """Fail the test for what it has not said that it expects."""
        marker = node.get_closest_marker("vmbus_errors")
        texts = list(dict.fromkeys(self.texts))
        if marker is None:
            wrong = texts
        else:
            match = marker.kwargs.get("match", "")
            wrong = [text for text in texts if not re.search(match, text)]
            if not texts:
                pytest.fail(f"a callback of a provider was to raise (marker vmbus_errors, match {match!r}); none has")
        if wrong:
            pytest.fail(
                "callbacks of providers have raised, and the test does not say that they may (marker vmbus_errors):\n"
                + "\n".join(wrong)
            )


@pytest.fixture
def vmbus_provider_errors(request: pytest.FixtureRequest) -> Iterator[ProviderErrors]:
    """What callbacks of providers have raised so far (`texts`). A test that uses another fixture need not name it."""
    from vmbus.providers.faults import observed

    errors = ProviderErrors()
    with observed(errors.observe):
        yield errors
    errors.judge(request.node)


# ---- what a test's report says ---------------------------------------------------------------------------------------


def _tell(request: pytest.FixtureRequest, vms: list[BlockingVm]) -> None:
    """Figures for the report of the test: with --junitxml they are properties of its case."""
    operations = [operation for vm in vms for operation in vm.operations]
    properties: list[tuple[str, object]] = request.node.user_properties
    properties.append(("vmbus_vms", len(vms)))
    properties.append(("vmbus_operations", len(operations)))
    for kind in sorted({operation.kind for operation in operations}):
        properties.append((f"vmbus_operations_{kind}", sum(one.kind == kind for one in operations)))
    properties.append(("vmbus_transactions", sum(vm.transactions for vm in vms)))
    for state in ("queued", "sent"):
        properties.append((f"vmbus_in_flight_{state}", sum(one.packets.get(state, 0) for one in operations)))
    downtimes = [one.downtime for one in operations if one.downtime is not None]
    if downtimes:
        properties.append(("vmbus_downtime_max_s", f"{max(downtimes):.3f}"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """The ends of a VM's logs, where a test of it has failed."""
    report = yield
    if report.failed:
        item.stash[_FAILED] = True
        for vm in item.stash.get(_SUBJECTS, []):
            for name, text in vm.logs(_LOG_LINES).items():
                report.sections.append((f"{name} of VM {vm.name!r}", text))
    return report
