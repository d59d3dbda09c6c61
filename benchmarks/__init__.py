"""Measures the engine and its operators. Results are rows in `results/`, with the environment they were measured in;
every table in the documentation is drawn from rows (`python -m ssast.benchmarks.tables`).
"""
