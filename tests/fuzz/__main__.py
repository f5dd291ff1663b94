"""Run one target: `python -m tests.fuzz events -runs=100000`."""

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["outbox"]):
    from .targets import SEEDS, TARGETS, TOKENS


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in TARGETS:
        sys.exit(f"python -m tests.fuzz TARGET [libFuzzer's options]; the targets are {', '.join(TARGETS)}")
    with tempfile.TemporaryDirectory() as seeds, tempfile.NamedTemporaryFile("w") as dictionary:
        for number, seed in enumerate(SEEDS.get(name, [])):
            (Path(seeds) / str(number)).write_bytes(seed)
        dictionary.writelines(f'"{token}"\n' for token in TOKENS)
        dictionary.flush()
        atheris.Setup(
            [sys.argv[0], f"-dict={dictionary.name}", f"-artifact_prefix={Path.cwd()}/", *sys.argv[2:], seeds],
            TARGETS[name],
        )
        atheris.Fuzz()


main()
