"""A worker program for tests of the campaign alone: it does what its plan says, which may be all kinds of wrong.

`python scripted_worker.py FOLDER`; the plan is {"episode": N, "seed": N, "steps": [STEP, ...]}, and a step a list of a
word and its arguments, see below. Without a step that ends it, it passes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any


def say(kind: str, record: object) -> None:
    print(json.dumps({"kind": kind, "record": record}), flush=True)


def main(folder: Path) -> None:
    plan = json.loads((folder / "plan.json").read_bytes())
    episode = plan["episode"]
    operations = 0

    def end(verdict: str, **more: Any) -> None:
        record = {
            "episode": episode,
            "seed": plan["seed"],
            "verdict": verdict,
            "started": "2026-01-01T00:00:00+00:00",
            "seconds": 0.1,
            "operations": operations,
            "workloads": [{"driver": "echo", "verdict": "passed", "transactions": 10}],
        }
        say("episode", record | more)

    def asked_to_end(*_: object) -> None:
        end("interrupted")
        os._exit(0)

    signal.signal(signal.SIGTERM, asked_to_end)
    for word, *arguments in plan["steps"]:
        match word:
            case "operation":
                record = {
                    "episode": episode,
                    "number": operations,
                    "kind": "save_restore",
                    "outcome": "done",
                    "at": 0.1,
                    "seconds": 0.2,
                    "downtime": 0.5,
                    "packets": {"queued": 3, "sent": 4},
                }
                more = dict(arguments[0]) if arguments else {}
                if "letters" in more:  # a long message, of which the plan knows only the length
                    more["message"] = "x" * more.pop("letters")
                say("operation", record | more)
                operations += 1
            case "event":
                say("event", {"episode": episode, "at": 0.1, "text": arguments[0]})
            case "sample":
                say("sample", {"at": 0.1, "transactions": 7, "in_flight": {"queued": 3}})
            case "phase":
                say("phase", arguments[0])
            case "print":
                print(arguments[0], flush=True)
            case "log":
                print(arguments[0], file=sys.stderr, flush=True)
            case "print-long":
                sys.stdout.write("x" * arguments[0] + "\n")
            case "file":
                (folder / arguments[0]).write_bytes(b"y" * arguments[1])
            case "touch":
                Path(arguments[0]).touch()
            case "pid":
                Path(arguments[0] + ".new").write_text(str(os.getpid()))
                Path(arguments[0] + ".new").rename(arguments[0])
            case "wait-for":  # a file, at most a minute
                for _ in range(6000):
                    if Path(arguments[0]).exists():
                        break
                    time.sleep(0.01)
            case "fill":  # a file system: from the first time on, until somebody makes room
                marker, place = Path(arguments[0]), Path(arguments[1])
                if not marker.exists():
                    marker.touch()
                    with (place / "filler").open("wb", buffering=0) as file:
                        try:
                            while file.write(bytes(1 << 16)):
                                pass
                        except OSError as error:
                            end("failed", failure=f"cannot write: {error.strerror}", code="disk-full")
                            return
            case "deaf":
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            case "hang":
                while True:
                    signal.pause()
            case "die":
                os.kill(os.getpid(), getattr(signal, arguments[0]))
            case "exit":
                os._exit(arguments[0])
            case "fail":
                end("failed", failure=arguments[0])
                return
    end("passed")


main(Path(sys.argv[1]))
