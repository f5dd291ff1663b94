"""Coverage-guided fuzzing of everything that reads what others wrote.

    pip install atheris
    python -m tests.fuzz                          names the targets
    python -m tests.fuzz events -runs=100000      what follows the target goes to libFuzzer

A finding ends the run, and its input lies in a file `crash-…` in the working folder; given instead of `-runs` it is
run again. Whatever is found becomes a test in test_fuzz_findings.py.
"""
