"""Errors are told apart by class and code, never by their words; a code survives whatever an error is raised from."""

from __future__ import annotations

import ast
import errno
from collections.abc import Iterator
from pathlib import Path

from vmbus.errors import (
    STATUSES,
    Code,
    EnvironmentProblem,
    ReportedError,
    StateError,
    UsageError,
    VmbusError,
    WaitTimeout,
    code_in,
    code_of,
)
from vmbus.memory.guest import DirtyLogBroken

ROOT = Path(__file__).resolve().parents[2]
_LOOKS = {"startswith", "endswith", "find", "index", "search", "match", "fullmatch", "partition", "split"}


def branches_on_words(source: str) -> list[int]:
    """The lines of a module where the text of an error that was caught is looked into."""

    def words(node: ast.AST, errors: set[str]) -> bool:
        match node:
            case ast.Call(ast.Name("str" | "repr"), [ast.Name(name)]):
                return name in errors
            case ast.Attribute(ast.Name(name), "args" | "message" | "strerror" | "msg"):
                return name in errors
        return False

    def look(node: ast.AST, errors: set[str]) -> Iterator[int]:
        if isinstance(node, ast.ExceptHandler) and node.name:
            errors = errors | {node.name}
        match node:
            case ast.Compare(left, _, others) if any(words(one, errors) for one in (left, *others)):
                yield node.lineno
            case ast.Call(ast.Attribute(value, name), arguments) if name in _LOOKS:
                if any(words(one, errors) for one in (value, *arguments)):
                    yield node.lineno
        for child in ast.iter_child_nodes(node):
            yield from look(child, errors)

    # An error that is handed to a function is one there, too.
    return sorted(look(ast.parse(source), {"error", "failure", "problem"}))


def test_no_program_tells_errors_apart_by_their_words() -> None:
    files = [path for room in ("device", "guest", "bench") for path in (ROOT / room).rglob("*.py")]
    found = {str(path.relative_to(ROOT)): lines for path in files if (lines := branches_on_words(path.read_text()))}
    # What msgspec complains of has its field in the text alone.
    assert list(found) == ["device/vmbus/util/explaining.py"], found
    assert len(files) > 300


def test_sabotage_a_look_into_an_errors_words_is_found() -> None:
    assert branches_on_words("try: f()\nexcept E as e:\n    if 'full' in str(e): g()") == [3]
    assert branches_on_words("def f(error):\n    return str(error).startswith('x') or P.search(str(error))") == [2, 2]
    assert branches_on_words("try: f()\nexcept E as e:\n    say(str(e), 'full' in text, e.code == 'x')") == []


def raised_from(error: VmbusError, cause: BaseException) -> VmbusError:
    error.__cause__ = cause
    return error


def test_the_code_is_that_of_the_error_or_of_what_it_was_raised_from() -> None:
    full = OSError(errno.ENOSPC, "words")
    outer = raised_from(EnvironmentProblem("a"), raised_from(StateError("b"), full))
    assert code_of(outer) == Code.DISK_FULL
    assert code_of(raised_from(EnvironmentProblem("a", code=Code.NOT_CONVERGING), DirtyLogBroken("b"))) == (
        Code.NOT_CONVERGING
    )
    assert code_of(DirtyLogBroken("b")) == Code.LOG_BROKEN
    assert [code_of(one) for one in (None, OSError(errno.EIO, "x"), VmbusError(), ValueError())] == [""] * 4


def test_another_programs_words_have_a_code() -> None:
    assert code_in("dpkg: error: No space left on device") == Code.DISK_FULL == code_in("Disk quota exceeded")
    assert code_in("all is well") == ""


def test_an_error_of_another_process_keeps_its_kind_and_exit_status() -> None:
    for one in (StateError("a"), UsageError("a"), EnvironmentProblem("a"), WaitTimeout("a", 1), VmbusError("a")):
        assert ReportedError(str(one), one.kind).status == one.status == STATUSES.get(one.kind, 1)
    assert ReportedError("a", "internal").status == 1 and ReportedError("a", "environment", status=13).status == 13
