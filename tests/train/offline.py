"""Offline runs of the mirror, read back from their own files."""

import json
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32768, 7


def records(run: Path) -> list[Any]:
    """Every record of the offline runs below a run folder, once all of them are written out."""
    deadline = time.monotonic() + 60
    # the mirror's own process writes a file out a little after its run was finished
    while True:
        runs = [_read(file) for file in sorted(run.glob("wandb/offline-run-*/*.wandb"))]
        if runs and all("exit" in [r.WhichOneof("record_type") for r in found] for found in runs):
            return [record for found in runs for record in found]
        assert time.monotonic() < deadline, "the offline run was never written out"
        time.sleep(0.2)


def history(recorded: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """What was logged, by its name: the parts of its value."""
    found: dict[str, dict[str, Any]] = {}
    for record in recorded:
        if record.WhichOneof("record_type") == "history":
            for item in record.history.item:
                name, *rest = item.nested_key or [item.key]
                found.setdefault(name, {})["/".join(rest)] = json.loads(item.value_json)
    return found


def _read(file: Path) -> list[Any]:
    """Records of LevelDB's log: blocks with chunks of (checksum, length, kind); a record may take several chunks."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    if file.stat().st_size > HEADER:
        content, place, whole = file.read_bytes(), HEADER, b""
        assert content.startswith(b":W&B")
        while place + HEADER <= len(content):
            if BLOCK - place % BLOCK < HEADER:  # too little room for a chunk: filled up
                place += BLOCK - place % BLOCK
                continue
            _, length, kind = struct.unpack("<IHB", content[place : place + HEADER])
            whole += content[place + HEADER : place + HEADER + length]
            place += HEADER + length
            if kind in (1, 4):  # whole, or the last of several
                record = Record()
                record.ParseFromString(whole)
                found.append(record)
                whole = b""
    return found
