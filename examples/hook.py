"""A small linter whose findings become events; it does its work whatever happens to them.

    python examples/hook.py FILE...

The hook hands each event to `outbox enqueue`. That is another program with a time limit: a locked database, a
full disk, an outbox that is not even installed cost a line on standard error.
"""

import json
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

PATIENCE_S = 5


def record(rule: str, file: str) -> None:
    """Record that a rule fired; what goes wrong is told, not raised."""
    event = {
        "event_type": "rule_fired",
        "rule_ids": [rule],
        "session_id": "hook",
        "file_path": file,
        "fired_at": datetime.now(timezone.utc).isoformat(),
    }
    enqueue = [sys.executable, "-m", "outbox", "enqueue"]
    try:
        subprocess.run(  # noqa: S603 - our own program
            enqueue, input=json.dumps(event).encode(), stdout=subprocess.DEVNULL, timeout=PATIENCE_S, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        print(f"hook: the event is not recorded: {error}", file=sys.stderr)


def main(files: list[str]) -> int:
    """Report each file that counts money in floats; return how many do."""
    found = [file for file in files if "price: float" in Path(file).read_text(encoding="utf-8")]
    for file in found:
        print(f"{file}: a price is no float")
        record("no-float-money", file)
    return len(found)


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
