"""A mutation fuzzer: small valid inputs, damaged in many ways, handed to everything that reads a file.

`python -m fuzz --help` says how to run it (from Testing/, or with Testing/ on PYTHONPATH). A target makes
mutants and reads them; `runner` does so in processes that it can afford to lose.
"""
