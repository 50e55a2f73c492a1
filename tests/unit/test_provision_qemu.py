"""QEMU, libvfio-user and the accelerator: what is accepted, what is refused, and in which words."""

from __future__ import annotations

import json
import os
import subprocess
import tarfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support import pace
from support.debs import script
from support.processes import alive
from vmbus.errors import EnvironmentProblem
from vmbus.provision import accel, libvfio_user, qemu
from vmbus.provision.accel import Accelerator, boot_trial, choose_accelerator
from vmbus.provision.archive import place_below
from vmbus.provision.cache import Cache
from vmbus.provision.guest_files import Kernel
from vmbus.provision.libvfio_user import VfioUserLibrary
from vmbus.provision.qemu import QemuProgram, find_qemu, parse_version
from vmbus.provision.report import SilentReporter
from vmbus.provision.roots import Root
from vmbus.transport import bindings, library


def fake_qemu(path: Path, version: str = "10.1.0", devices: tuple[str, ...] = ("vfio-user-pci",)) -> Path:
    """Write a program that answers like QEMU."""
    listing = "\n".join(f'name "{device}", bus PCI' for device in devices)
    return script(
        path,
        f"""case "$*" in
*--version) echo 'QEMU emulator version {version} (a build)' ;;
*help) echo '{listing}' ;;
*) exit 2 ;;
esac""",
    )


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("QEMU emulator version 11.1.3 (Debian 1:11.1.3+ds-1~bpo13+1)\nCopyright", (11, 1, 3)),
        ("QEMU emulator version 7.2.19 (Debian 1:7.2+dfsg-7+deb12u16)", (7, 2, 19)),
        ("QEMU emulator version 10.1 (custom)", (10, 1, 0)),
        ("QEMU emulator version 10.0.92 (v10.1.0-rc2)", (10, 0, 92)),
    ],
)
def test_version(text: str, version: tuple[int, int, int]) -> None:
    assert parse_version(text) == version


def test_no_version() -> None:
    with pytest.raises(ValueError, match="no version"):
        parse_version("GNU bash, version 5.2")


def test_explicit_program(tmp_path: Path) -> None:
    program = fake_qemu(tmp_path / "q", "10.2.1")
    found = find_qemu(Cache(tmp_path / "cache"), environment={"VMBUS_QEMU": str(program), "PATH": ""})
    assert (found.argv, found.version, found.source) == ((str(program),), (10, 2, 1), "VMBUS_QEMU")


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (lambda path: fake_qemu(path, "10.0.8"), r"VMBUS_QEMU cannot be used: .*QEMU 10\.0\.8; 10\.1 is the first"),
        (
            lambda path: fake_qemu(path, "11.0.0", ("vfio-pci", "vfio-user-pci-x")),
            "VMBUS_QEMU cannot be used: .*built without the device vfio-user-pci",
        ),
        (lambda path: path, "no such program"),
        (lambda path: script(path, "echo hello"), "is not QEMU"),
        (lambda path: script(path, "echo libfoo.so missing >&2; exit 127"), r"status 127: libfoo\.so missing"),
        (lambda path: script(path, "exec tail -f /dev/null"), r"did not answer within 0\.3 s"),
    ],
    ids=["old", "without the device", "missing", "something else", "broken", "hangs"],
)
def test_explicit_program_that_does_not_qualify(
    tmp_path: Path, program: Callable[[Path], Path], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An explicit setting is an order: nothing else is fetched or tried behind the user's back."""
    monkeypatch.setattr(qemu, "make_root", _must_not_be_called)
    path = program(tmp_path / "q")
    if "0" in message and "within" in message:
        monkeypatch.setattr(qemu, "QUERY_TIMEOUT", 0.3)
    with pytest.raises(EnvironmentProblem, match=message):
        find_qemu(Cache(tmp_path / "cache"), environment={"VMBUS_QEMU": str(path), "PATH": ""})


def test_program_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu, "make_root", _must_not_be_called)
    fake_qemu(tmp_path / "bin/qemu-system-x86_64", "10.1.2")
    fake_qemu(tmp_path / "bin/qemu-img")
    found = find_qemu(Cache(tmp_path / "cache"), environment={"PATH": str(tmp_path / "bin")})
    assert (found.source, found.version) == ("PATH", (10, 1, 2))
    assert found.image_argv == (str(tmp_path / "bin/qemu-img"),)


def test_too_old_program_on_path_gives_way_to_the_private_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_qemu(tmp_path / "bin/qemu-system-x86_64", "7.2.0")
    root = Root(tmp_path / "root", {"qemu-system-x86": "1:11"})
    fake_qemu(root.libraries / "ld-linux-x86-64.so.2", "11.1.3")  # answers for the program that it is told to load
    monkeypatch.setattr(qemu, "make_root", lambda *_: root)
    found = find_qemu(Cache(tmp_path / "cache"), SilentReporter(), {"PATH": str(tmp_path / "bin")})
    assert found.version == (11, 1, 3)
    assert found.source == "Debian package qemu-system-x86 1:11"
    program = str(root.path / "usr/bin/qemu-system-x86_64")
    assert found.argv[:4] == (
        str(root.libraries / "ld-linux-x86-64.so.2"),
        "--library-path",
        str(root.libraries),
        program,
    )
    assert found.argv[4:] == ("-L", str(root.path / "usr/share/qemu"), "-L", str(root.path / "usr/share/seabios"))


# --- libvfio-user ----------------------------------------------------------------------------------------------


def test_explicit_library_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libvfio_user, "build", _must_not_be_called)
    rubbish = tmp_path / "libvfio-user.so"
    with pytest.raises(EnvironmentProblem, match=r"VMBUS_LIBVFIO_USER.* is not a file"):
        libvfio_user.find_library(Cache(tmp_path), environment={"VMBUS_LIBVFIO_USER": str(rubbish)})
    rubbish.write_bytes(b"\x7fELF rubbish")
    with pytest.raises(EnvironmentProblem, match=r"VMBUS_LIBVFIO_USER is .*unset it"):
        libvfio_user.find_library(Cache(tmp_path), environment={"VMBUS_LIBVFIO_USER": str(rubbish)})


def _library(folder: Path, *, between: bool) -> Path:
    """A libvfio-user of no use, of the 2022 generation or of one in between, as far as can be told from outside."""
    folder.mkdir()
    names = [*bindings.FUNCTIONS, *([] if between else ["vfu_get_migr_register_area_size"])]
    text = "#include <stddef.h>\n" + "".join(
        f"size_t {name}(void) {{ return {bindings.SG_SIZE if name == 'dma_sg_size' else 0}; }}\n" for name in set(names)
    )
    (folder / "library.c").write_text(text)
    path = folder / libvfio_user.SONAME
    subprocess.run(
        [libvfio_user.find_compiler(), "-shared", "-fPIC", "-w", "-o", path, folder / "library.c"],
        check=True,
        timeout=60,
    )
    return path


def test_fault_p3_a_system_library_of_an_unsupported_generation_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, between = _library(tmp_path / "old", between=False), _library(tmp_path / "between", between=True)
    assert libvfio_user.loading_problem(old) is None
    assert "differ from both supported generations" in str(libvfio_user.loading_problem(between))
    ours = VfioUserLibrary(tmp_path / "ours.so", "built")
    monkeypatch.setattr(libvfio_user, "build", lambda cache, reporter: ours)
    monkeypatch.setattr(library, "system_path", lambda: between)
    told = Told()
    assert libvfio_user.find(Cache(tmp_path / "cache"), told, {}) == ours
    assert len(told.notes) == 1 and f"the system's {between} is left alone" in told.notes[0]
    monkeypatch.setattr(library, "system_path", lambda: old)
    assert libvfio_user.find(Cache(tmp_path / "cache"), told, {}) == VfioUserLibrary(old, "system")


class Told(SilentReporter):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_fault_p2_a_member_that_would_leave_its_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetched(name: str) -> Path:
        archive = tmp_path / "qemu_1.orig.tar.xz"
        with tarfile.open(archive, "w:xz") as tar:
            for member in ("qemu-1/subprojects/libvfio-user/lib/libvfio-user.c", name):
                entry = tarfile.TarInfo(member)
                entry.size = 4
                tar.addfile(entry, BytesIO(b"code"))
        monkeypatch.setattr(libvfio_user.Apt, "source_archive", lambda *_: archive)
        return libvfio_user.fetch_source(Cache(tmp_path / "cache"), SilentReporter())

    victim = tmp_path / "victim"
    for name in (f"/{victim}", "../../../../victim", "lib/../../victim", "lib/.."):
        with pytest.raises(EnvironmentProblem, match="would leave its folder"):
            fetched(f"qemu-1/subprojects/libvfio-user/{name}")
        assert not victim.exists()
    assert (fetched("qemu-1/subprojects/libvfio-user/lib//tran.c") / "lib/tran.c").read_bytes() == b"code"


@given(st.text(alphabet="a./\0", max_size=12))
def test_fault_p2_no_member_leaves_its_folder(name: str) -> None:
    folder = Path("/somewhere/deep")
    try:
        place = place_below(folder, name, "an archive")
    except EnvironmentProblem:
        return
    assert place != folder and folder in place.parents
    assert Path(os.path.normpath(place)) == place


def test_another_library_is_refused() -> None:
    """It loads, but has none of the functions."""
    assert "vfu_create_ctx" in str(libvfio_user.loading_problem(Path("/lib/x86_64-linux-gnu/libc.so.6")))


def test_missing_compiler_is_one_line_to_paste(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(libvfio_user, "system_library", lambda: None)
    with pytest.raises(EnvironmentProblem) as caught:
        libvfio_user.check_prerequisites(Cache(tmp_path / "cache"), {})
    assert "run: sudo apt-get install -y gcc libc6-dev (or import" in str(caught.value)


def test_failed_build_quotes_the_compiler(tmp_path: Path) -> None:
    compiler = script(tmp_path / "cc", "echo 'linux/vfio.h: No such file' >&2\nexit 1")
    json_c = libvfio_user.JsonC(tmp_path, tmp_path / "libjson-c.so.5", tmp_path / "l", "host")
    with pytest.raises(EnvironmentProblem, match=r"(?s)apt-get install.*linux/vfio\.h: No such file"):
        libvfio_user.compile_library(str(compiler), tmp_path, json_c, tmp_path / "out.so")


def test_compiler_gets_every_source_and_a_private_json_c(tmp_path: Path) -> None:
    compiler = script(tmp_path / "cc", 'printf "%s\\n" "$@" > "$0.arguments"')
    for name in ("dma.c", "pci.c", "tran_pipe.c"):
        (tmp_path / "lib").mkdir(exist_ok=True)
        (tmp_path / "lib" / name).write_text("")
    json_c = libvfio_user.JsonC(tmp_path / "h", tmp_path / "libjson-c.so.5", tmp_path / "l", "package")
    libvfio_user.compile_library(str(compiler), tmp_path, json_c, tmp_path / "out.so")
    arguments = (tmp_path / "cc.arguments").read_text().splitlines()
    assert [Path(part).name for part in arguments if part.endswith(".c")] == ["dma.c", "pci.c"]
    assert "-Wl,-rpath,$ORIGIN" in arguments
    assert "-fvisibility=hidden" in arguments
    assert not any("DNDEBUG" in part or part == "-DDEBUG" for part in arguments)


# --- the accelerator -------------------------------------------------------------------------------------------

QEMU = QemuProgram(("/bin/false",), (11, 1, 0), "test")
KERNEL = Kernel(Path("/nonexistent/vmlinuz"), "6.12", {}, "1")
USERLAND = Root(Path("/nonexistent"), {})


def choose(tmp_path: Path, **environment: str) -> Accelerator:
    return choose_accelerator(QEMU, KERNEL, USERLAND, Cache(tmp_path / "cache"), environment=environment)


def test_explicit_accelerator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accel, "try_accelerator", _must_not_be_called)
    assert choose(tmp_path, VMBUS_ACCELERATOR="tcg").machine_options == ""
    with pytest.raises(EnvironmentProblem, match="kvm or tcg"):
        choose(tmp_path, VMBUS_ACCELERATOR="hvf")


@pytest.mark.parametrize("failure", [None, "the guest died"])
def test_kvm_that_is_asked_for_must_run_a_guest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str | None
) -> None:
    device = tmp_path / "kvm"
    device.write_text("")
    monkeypatch.setattr(accel, "KVM_DEVICE", device)
    monkeypatch.setattr(accel, "try_accelerator", lambda *_: failure)
    if failure is None:
        choice = choose(tmp_path, VMBUS_ACCELERATOR="kvm")
        assert choice.arguments == ("-accel", "kvm")
        assert choice.machine_options == ",kernel-irqchip=split"
    else:
        with pytest.raises(EnvironmentProblem, match="KVM runs no guest here: KVM: the guest died"):
            choose(tmp_path, VMBUS_ACCELERATOR="kvm")


@pytest.mark.parametrize(("there", "reason"), [(False, "there is no"), (True, "may not be opened")])
def test_without_kvm_there_is_no_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool, reason: str
) -> None:
    device = tmp_path / "kvm"
    device.write_text("") if there else None
    monkeypatch.setattr(accel, "KVM_DEVICE", device)
    monkeypatch.setattr(accel, "try_accelerator", _must_not_be_called)
    monkeypatch.setattr("os.access", lambda *_: False)
    choice = choose(tmp_path)
    assert choice.name == "tcg" and reason in choice.reason


@pytest.mark.parametrize(("failure", "name"), [(None, "kvm"), ("the guest died", "tcg")])
def test_trial_decides_once_per_boot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str | None, name: str
) -> None:
    (tmp_path / "kvm").write_text("")
    monkeypatch.setattr(accel, "KVM_DEVICE", tmp_path / "kvm")
    trials: list[str] = []
    monkeypatch.setattr(accel, "try_accelerator", lambda name, *_: trials.append(name) or failure)
    first = choose(tmp_path)
    assert first.name == name and (failure is None or failure in first.reason)
    assert choose(tmp_path) == first and trials == ["kvm"]
    monkeypatch.setattr(accel, "boot_id", lambda: "another")
    choose(tmp_path)
    assert trials == ["kvm", "kvm"]


@pytest.mark.parametrize(
    ("trial", "outcome"),
    [
        (f"echo booting; echo {accel.MARKER}; exec tail -f /dev/null", None),
        ("echo 'KVM internal error. Suberror: 1'; exec tail -f /dev/null", "KVM internal error"),
        ("echo booting; echo 'could not open /dev/kvm' >&2; exit 1", "could not open /dev/kvm"),
        ("exit 0", "without a word"),
        ("echo booting; exec tail -f /dev/null", "within 1 s"),
    ],
)
def test_trial_is_bounded_and_leaves_nothing(tmp_path: Path, trial: str, outcome: str | None) -> None:
    pid_file = tmp_path / "pid"
    start = time.monotonic()
    result = boot_trial(["sh", "-c", f"echo $$ > {pid_file}; {trial}"], 1.0)
    assert time.monotonic() - start < pace.seconds(10)
    if outcome is None:
        assert result is None
    else:
        assert outcome in str(result)
    assert not alive(int(pid_file.read_text()))


# --- all of it together ----------------------------------------------------------------------------------------


def test_remembered_set_up_is_checked(tmp_path: Path) -> None:
    """The record of a completed set-up counts only as long as everything that it names is there."""
    import vmbus.provision as package
    from vmbus.provision.libvfio_user import VfioUserLibrary

    cache = Cache(tmp_path / "cache")
    environment = {"PATH": "", "VMBUS_ACCELERATOR": "tcg"}
    program = fake_qemu(tmp_path / "q")
    folder = tmp_path / "kernel"
    (folder / "modules").mkdir(parents=True)
    (folder / "vmlinuz").write_text("")
    (folder / "modules/vfio.ko").write_text("")
    (tmp_path / "lib.so").write_text("")
    (tmp_path / "guest/usr/bin").mkdir(parents=True)
    (tmp_path / "guest/usr/bin/busybox").write_text("")
    parts = package._Parts(
        QemuProgram((str(program), "-L", str(tmp_path)), (10, 1, 0), "test", ("/bin/qemu-img",)),
        VfioUserLibrary(tmp_path / "lib.so", "test"),
        Kernel(folder / "vmlinuz", "6.12", {"vfio": ()}, "1"),
        tmp_path / "guest",
        Accelerator("tcg", "test"),
    )
    assert not package.is_provisioned(cache, environment)
    memory = package._memory(cache, environment)
    memory.parent.mkdir(parents=True)
    memory.write_text(json.dumps(package._to_json(parts)))
    assert package._remembered(cache, environment) == parts
    assert not package.is_provisioned(cache, {**environment, "VMBUS_ACCELERATOR": "kvm"})
    memory.write_text("{}")
    assert not package.is_provisioned(cache, environment)
    memory.write_text(json.dumps(package._to_json(parts)))
    (tmp_path / "lib.so").unlink()
    assert not package.is_provisioned(cache, environment)


def _must_not_be_called(*_: object, **__: object) -> object:
    raise AssertionError("this must not be tried")
