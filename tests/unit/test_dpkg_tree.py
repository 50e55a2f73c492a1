"""A Debian that was never installed anywhere: the tar of its files, and dpkg's records of them."""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
from pathlib import Path

import pytest

from support.debs import make_deb
from vmbus.provision.dpkg_tree import (
    INFO,
    STATUS,
    TRIGGERS,
    Control,
    TreeWriter,
    conffile_names,
    merged,
    status_stanza,
    trigger_interests,
    write_packages,
)


def tree_of(debs: list[Path]) -> dict[str, tuple[tarfile.TarInfo, bytes]]:
    output = io.BytesIO()
    writer = TreeWriter(output)
    write_packages(writer, debs)
    writer.close()
    with tarfile.open(fileobj=io.BytesIO(output.getvalue())) as tar:
        return {
            member.name: (member, (tar.extractfile(member) or io.BytesIO()).read() if member.isreg() else b"")
            for member in tar
        }


def test_files_keep_their_modes_and_belong_to_root_whoever_runs_this(tmp_path: Path) -> None:
    deb = make_deb(tmp_path, "one", {"usr/bin/su*": "program", "etc/one.conf": "x", "usr/bin/link": "->su"}, {})
    tree = tree_of([deb])
    program, data = tree["usr/bin/su"]
    assert (program.mode, program.uid, program.gid, program.uname, data) == (0o4755, 0, 0, "", b"program")
    assert tree["usr/bin/link"][0].linkname == "su"
    assert tree["etc"][0].isdir() and list(tree).index("etc") < list(tree).index("etc/one.conf")


def test_a_package_from_before_the_merged_usr_lands_in_it(tmp_path: Path) -> None:
    tree = tree_of([make_deb(tmp_path, "old", {"lib/old/a": "a", "bin/old": "b", "bin/same": "=>bin/old"}, {})])
    assert tree["lib"][0].linkname == "usr/lib" and tree["bin"][0].issym()
    assert {"usr/lib/old/a", "usr/bin/old"} < set(tree) and not {"lib/old/a", "bin/old"} & set(tree)
    linked = [tree[name][0] for name in ("usr/bin/old", "usr/bin/same") if tree[name][0].islnk()]
    assert [member.linkname.startswith("usr/bin/") for member in linked] == [True]
    # dpkg goes on calling it what the package calls it.
    assert b"/lib/old/a\n" in tree[f"{INFO}/old.list"][1]


def test_two_packages_share_folders_but_no_file(tmp_path: Path) -> None:
    first = make_deb(tmp_path, "one", {"usr/share/x/one": "1"}, {})
    second = make_deb(tmp_path, "two", {"usr/share/x/two": "2"}, {})
    assert {"usr/share/x/one", "usr/share/x/two"} < set(tree_of([first, second]))
    third = make_deb(tmp_path, "three", {"usr/share/x/one": "3"}, {})
    with pytest.raises(ValueError, match="two packages have the file usr/share/x/one"):
        tree_of([first, third])


def test_dpkg_itself_reads_the_records(tmp_path: Path) -> None:
    """The host's dpkg looks at the tree as at any system: what is unpacked, whose a file is, what was changed."""
    debs = [
        make_deb(
            tmp_path,
            "lib-one",
            {"usr/lib/x86_64-linux-gnu/libone.so.1": "x", "etc/one.conf": "settings"},
            {"postinst": "#!/bin/sh\n", "conffiles": "/etc/one.conf\n", "triggers": "interest-noawait /usr/lib/one\n"},
            "Multi-Arch: same\n",
        ),
        make_deb(tmp_path, "two", {"usr/bin/two*": "2"}, {"triggers": "# none\ninterest update-two\n"}),
    ]
    output = io.BytesIO()
    writer = TreeWriter(output)
    write_packages(writer, debs)
    writer.close()
    root = tmp_path / "root"
    with tarfile.open(fileobj=io.BytesIO(output.getvalue())) as tar:
        if hasattr(tarfile, "fully_trusted_filter"):  # Python before 3.11.4 trusts everything, and knows no other way
            tar.extraction_filter = tarfile.fully_trusted_filter
        tar.extractall(root)
    admin = f"--admindir={root}/var/lib/dpkg"
    query = ["dpkg-query", admin, "-W", "-f", "${binary:Package} ${Status} ${Conffiles}\\n"]
    shown = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    settings = hashlib.md5(b"settings").hexdigest()
    assert shown == [
        f"lib-one:amd64 install ok unpacked  /etc/one.conf {settings}",
        "two install ok unpacked ",
    ]
    owner = ["dpkg-query", admin, "-S", "/usr/lib/x86_64-linux-gnu/libone.so.1"]
    assert subprocess.run(owner, capture_output=True, text=True).stdout.startswith("lib-one:amd64: ")
    assert (root / TRIGGERS / "File").read_text() == "/usr/lib/one lib-one:amd64/noawait\n"
    assert (root / TRIGGERS / "update-two").read_text() == "two\n"
    assert (root / INFO / "lib-one:amd64.postinst").stat().st_mode & 0o111
    assert (root / STATUS).stat().st_size


def test_records_in_detail() -> None:
    text = "Package: p\nVersion: 2\nArchitecture: all\nDescription: d\n more\n"
    control = Control(
        text,
        {
            "conffiles": b"/etc/a\nremove-on-upgrade /etc/gone\n",
            "triggers": b"activate ldconfig\ninterest /x\n",
        },
    )
    assert conffile_names(control) == ["/etc/a"]
    assert status_stanza(control, {"/etc/a": "0123"}) == (
        "Package: p\nStatus: install ok unpacked\nVersion: 2\nArchitecture: all\nDescription: d\n more\n"
        "Conffiles:\n /etc/a 0123\n"
    )
    assert trigger_interests([control]) == {"File": ["/x p"]}
    assert (control.label, control.package.version) == ("p", "2")


@pytest.mark.parametrize(
    ("name", "spelt"),
    [
        ("./", ""),
        ("./lib/x", "usr/lib/x"),
        ("./lib", "lib"),
        ("./lib64/ld", "usr/lib64/ld"),
        ("./usr/lib/x", "usr/lib/x"),
    ],
)
def test_paths(name: str, spelt: str) -> None:
    assert merged(name) == spelt
