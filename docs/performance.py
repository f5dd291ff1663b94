"""Write what was measured into the page that explains it: `python docs/performance.py`."""

from pathlib import Path

from benchmarks import report

PAGE = Path(__file__).with_name("performance.md")

if __name__ == "__main__":
    PAGE.write_text(report.filled(PAGE.read_text(encoding="utf-8"), report.load()), encoding="utf-8")
