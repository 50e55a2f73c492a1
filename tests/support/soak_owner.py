"""Runs a scripted campaign in a process of its own, to be killed: `python soak_owner.py FOLDER EPISODES-AS-JSON`."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from support.soak import Script, Sitting

if __name__ == "__main__":
    print(asyncio.run(Sitting(Path(sys.argv[1]), Script(*json.loads(sys.argv[2])))()))
