"""Benchmarks of gconv: `python -m gconv.bench --help`. The method is written down in NOTES.md beside this
file."""
