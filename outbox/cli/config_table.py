"""A table of `outbox.toml`: its settings, and the files and secrets that they name."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from outbox.cli.credentials import Reader, expanded, in_file, in_variable


@dataclass(frozen=True)
class Table:
    """Settings that have been checked."""

    where: str
    """The file and the table, which precede the name of a setting in errors."""
    folder: Path = Path()
    """Where the file is. Paths in it are relative to this folder."""
    settings: dict[str, Any] = field(default_factory=dict)

    def secret(self, name: str, *, is_word: bool = True) -> Reader:
        """Return a function that reads the secret with this name. Without the secret, it returns None."""
        variable, file = (self.settings.get(f"{name}_{kind}") for kind in ("env", "file"))
        return self._reader(variable, file, f"{name}_{'env' if variable else 'file'}", is_word=is_word)

    def header(self, name: str) -> str | Reader:
        """Return the value of a header, or a function that reads it."""
        value = self.settings["headers"][name]
        if isinstance(value, str):
            return value
        return self._reader(value.get("env"), value.get("file"), f"headers.{name}", is_word=False)

    def path(self, given: str) -> Path:
        """Return a path of the file as an absolute one."""
        return self.folder / expanded(given)

    def _reader(self, variable: str | None, file: str | None, setting: str, *, is_word: bool) -> Reader:
        setting = f"{self.where}{setting}"
        if variable:
            return in_variable(variable, setting=setting, is_word=is_word)
        if file:
            return in_file(self.path(file), setting=setting, is_word=is_word)
        return lambda: None
