"""Runs beside one another: their curves, and what two recipes make of the same data. No torch, but
for the costs of a model.

* ``runs.py``: what a run folder, or a pipeline's, holds
* ``curves.py``: metrics by step, tokens and time
* ``effect.py``: the difference of two groups of runs, and how far it can be trusted
* ``compare.py``: the comparison as JSON-like data; ``tables.py`` and ``page.py`` show it
* ``plots.py``: figures
"""
