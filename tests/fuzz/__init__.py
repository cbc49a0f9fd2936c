"""Files that lie, by the hundred thousand: what reads them answers, or refuses with a typed error.

`make fuzz` tries many mutants of each kind of file, `tests/fuzz/test_fuzz.py` a few hundred. A new
reader is one entry in `targets.py`: files that are right, the one that is changed, a function.
"""
