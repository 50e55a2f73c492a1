"""The plan of the house: no module imports in a circle, the core knows none of its observers, and no room is too large.

What breaks a rule today is written down here by name, and only that: a new offender fails, and so does an entry whose
offender is gone. So the lists can only become shorter.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from functools import cache
from pathlib import Path
from typing import NamedTuple

DEVICE = Path(__file__).resolve().parents[2] / "device"

LARGEST = 500  # lines of a file
LARGEST_CLASS = 320
TOO_LARGE = {"device/vmbus/providers/lab/station.py"}
LARGE_CLASSES = {
    "device/vmbus/bus/local:LocalBus",
    "device/vmbus/bus/server:BusServer",
    "device/vmbus/device/device:Device",
    "device/vmbus/kmcl/endpoint:Endpoint",
    "device/vmbus/kmcl/outgoing:Outgoing",
    "device/vmbus/kmcl/saving:SavingChannel",
    "device/vmbus/providers/disk/disk:Disk",
    "device/vmbus/providers/network/adapter:Adapter",
    "device/vmbus/providers/network/card:Card",
    "device/vmbus/providers/network/provider:NetworkProvider",
    "device/vmbus/providers/scsi/adapter:Adapter",
    "device/vmbus/providers/vsock/connection:Connection",
    "device/vmbus/server/app:DeviceServer",
    "device/vmbus/soak/stage:Stage",
    "device/vmbus/testkit/kit:ProviderTest",
    "device/vmbus/testkit/loopback/client:VfioUserClient",
    "device/vmbus/testkit/replay_player:Player",
    "device/vmbus/transport/context:Context",
}
FLOORS = (
    ("places",),
    ("errors",),
    ("util",),
    ("native",),
    ("wire",),
    ("memory",),
    ("ring",),
    ("kmcl",),
    ("bus",),
    ("device",),
    ("providers",),
    ("transport",),
    ("server",),
    ("provision",),
    ("vm",),
    ("snapshot",),
    ("qemu",),
    ("operations",),
    ("observe",),
    ("testbed", "testkit"),
    ("soak",),
    ("cli",),
    ("pytest_plugin", "__main__"),
)
"""The rooms, from the ground up: a room imports from those below its floor, and from no other."""
# Imports that break the plan today.
UPWARD: set[tuple[str, str]] = set()
OBSERVERS = ("vmbus.observe",)  # they look at channels; channels do not look at them
# Imports for the type checker alone that close a circle from one room to another. Inside one room they are fine.
TYPED_CIRCLES: set[tuple[str, str]] = set()
# Circles that only close when a function runs which imports something.
LATE_CIRCLES: set[tuple[str, str]] = set()


class When(Enum):
    """When an import happens."""

    AT_ONCE = "when the module is imported"
    LATE = "when a function runs"
    NEVER = "for the type checker alone"


class Import(NamedTuple):
    name: str  # what follows `import`, or `from` and `import` joined with a dot
    when: When


def imports_of(source: str) -> Iterator[Import]:
    """Every import in a module's text, wherever it stands."""

    def look(node: ast.AST, when: When) -> Iterator[Import]:
        match node:
            case ast.Import(names):
                yield from (Import(alias.name, when) for alias in names)
            case ast.ImportFrom(module, names, level):
                assert module and not level, "relative imports are not used here"
                yield from (Import(f"{module}.{alias.name}", when) for alias in names)
            case ast.If(ast.Name("TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING"), body, orelse):
                yield from (one for child in body for one in look(child, When.NEVER))
                yield from (one for child in orelse for one in look(child, when))
            case _:
                inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                then = When.LATE if inside and when is When.AT_ONCE else when
                yield from (one for child in ast.iter_child_nodes(node) for one in look(child, then))

    return look(ast.parse(source), When.AT_ONCE)


def module_of(name: str, modules: Iterable[str]) -> str | None:
    """The module that an import reads: `a.b.c` is one itself, or something in `a.b`."""
    return next((one for one in (name, name.rpartition(".")[0]) if one in modules), None)


@cache
def house() -> dict[str, dict[str, set[When]]]:
    """For every module of the device the modules that it imports, and when."""
    files = {
        ".".join(path.relative_to(DEVICE).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (DEVICE / "vmbus").rglob("*.py")
    }
    found: dict[str, dict[str, set[When]]] = {module: {} for module in files}
    for module, path in files.items():
        for name, when in imports_of(path.read_text()):
            target = module_of(name, files)
            # To import from a package runs its __init__ first; from one's own package that has begun already.
            for one in (target, target and target.rpartition(".")[0]):
                if one and one != module and not module.startswith(f"{one}."):
                    found[module].setdefault(one, set()).add(when)
    return found


def edges(*when: When) -> dict[str, set[str]]:
    """Who imports whom, of the imports that happen then."""
    return {module: {to for to, times in imports.items() if times & set(when)} for module, imports in house().items()}


def in_circles(graph: Mapping[str, set[str]]) -> set[tuple[str, str]]:
    """The edges from whose end a way leads back to their beginning."""

    def reach(start: str) -> set[str]:
        seen, todo = {start}, [start]
        while todo:
            new = graph.get(todo.pop(), set()) - seen
            seen |= new
            todo += new
        return seen

    ways = {module: reach(module) for module in graph}
    return {(module, to) for module, tos in graph.items() for to in tos if module in ways.get(to, ())}


def room(module: str) -> str:
    return ".".join(module.split(".")[:2])


def without_packages(found: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Only the modules that were meant, not the packages that came with them."""
    return found - {(a, b.rpartition(".")[0]) for a, b in found}


def test_no_module_imports_in_a_circle() -> None:
    assert in_circles(edges(When.AT_ONCE)) == set()


def test_no_circle_closes_when_a_function_runs() -> None:
    assert in_circles(edges(When.AT_ONCE, When.LATE)) == LATE_CIRCLES


def test_circles_of_types_between_rooms_are_known() -> None:
    typed = edges(When.NEVER)
    found = {(a, b) for a, b in in_circles(edges(*When)) if b in typed[a] and room(a) != room(b)}
    assert without_packages(found) == TYPED_CIRCLES


def floor(module: str) -> int:
    name = module.split(".")[1]
    return next(number for number, rooms in enumerate(FLOORS) if name in rooms)


def upward(graph: Mapping[str, set[str]]) -> set[tuple[str, str]]:
    """The imports that lead from one room to another which is not below it. The package itself is on no floor."""
    found = {(a, b) for a, tos in graph.items() for b in tos if "." in a and "." in b and room(a) != room(b)}
    return {(a, b) for a, b in found if floor(b) >= floor(a)}


def test_every_room_imports_from_floors_below_it() -> None:
    assert without_packages(upward(edges(*When))) == UPWARD


def test_the_picture_of_the_floors_is_the_plan() -> None:
    page = (DEVICE.parent / "docs" / "architecture.md").read_text()
    picture = page.partition("## The floors\n")[2].partition("\n## ")[0].split("```")[1]
    rooms = {name for level in FLOORS for name in level} - {"__main__"}
    drawn = [[word for word in line[24:51].split() if word in rooms] for line in picture.splitlines()]
    order = [name for line in reversed(drawn) for name in line]
    assert sorted(order) == sorted(rooms)
    assert [floor(f"vmbus.{name}") for line in reversed(drawn) for name in reversed(line)] == sorted(
        floor(f"vmbus.{name}") for name in rooms
    )


def test_kmcl_does_not_know_who_looks_at_it() -> None:
    everything = edges(*When)
    found = {(a, b) for a in everything for b in everything[a] if room(a) == "vmbus.kmcl" and room(b) in OBSERVERS}
    assert without_packages(found) == set()


def ours() -> list[Path]:
    return [
        path
        for root in ("device", "guest", "bench")
        for path in sorted((DEVICE.parent / root).rglob("*.*"))
        if path.suffix in (".py", ".c", ".h") and not path.name.endswith(".mod.c")
    ]


def test_no_file_is_too_large() -> None:
    sizes = {path.relative_to(DEVICE.parent).as_posix(): len(path.read_text().splitlines()) for path in ours()}
    assert {"device/vmbus/kmcl/endpoint.py", "guest/kernel/synic.c"} <= set(sizes)
    assert {name for name, lines in sizes.items() if lines > LARGEST} == TOO_LARGE


def test_no_class_is_too_large() -> None:
    found = {
        f"{path.relative_to(DEVICE.parent).with_suffix('').as_posix()}:{one.name}": (one.end_lineno or 0)
        - one.lineno
        + 1
        for path in ours()
        if path.suffix == ".py"
        for one in ast.parse(path.read_text()).body
        if isinstance(one, ast.ClassDef)
    }
    assert "device/vmbus/qemu/instance:Instance" in found
    assert {name for name, lines in found.items() if lines > LARGEST_CLASS} == LARGE_CLASSES


# ---- the rules themselves can fail -----------------------------------------------------------------------------------


def test_a_circle_is_found_and_what_hangs_on_it_is_not() -> None:
    graph = {"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": set(), "e": {"a"}}
    assert in_circles(graph) == {("a", "b"), ("b", "c"), ("c", "a")}
    assert in_circles({**graph, "c": set()}) == set()


def test_an_import_from_above_is_found_and_one_from_below_is_not() -> None:
    graph = {"vmbus.kmcl.x": {"vmbus.bus.y", "vmbus.kmcl.z", "vmbus.wire.a"}, "vmbus.testkit.b": {"vmbus.testbed.c"}}
    assert upward(graph) == {("vmbus.kmcl.x", "vmbus.bus.y"), ("vmbus.testkit.b", "vmbus.testbed.c")}


def test_every_kind_of_import_is_seen() -> None:
    source = """
import a
from b.c import d
if TYPE_CHECKING:
    from e import f
    def one(): import g
else:
    import h
def two():
    from i import j
    if typing.TYPE_CHECKING:
        import k
class Three:
    import m
    def four(self):
        try:
            import n
        finally:
            pass
"""
    assert {name: when.name for name, when in imports_of(source)} == {
        **dict.fromkeys(["a", "b.c.d", "h", "m"], "AT_ONCE"),
        **dict.fromkeys(["i.j", "n"], "LATE"),
        **dict.fromkeys(["e.f", "g", "k"], "NEVER"),
    }
    assert module_of("b.c.d", ["b.c"]) == "b.c" and module_of("b.c", ["b.c"]) == "b.c" and module_of("os", []) is None


def test_the_house_has_all_its_rooms() -> None:
    assert {"vmbus.kmcl", "vmbus.kmcl.ddi.rows", "vmbus.cli.__main__"} <= set(house())
    assert When.AT_ONCE in house()["vmbus.kmcl.client"]["vmbus.kmcl.channel"]
    assert house()["vmbus.kmcl.ddi.calls"]["vmbus.kmcl.server"] == {When.LATE}
