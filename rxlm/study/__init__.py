"""The study: one command from question to report on attention mechanisms at equal parameters.

* ``settings.py``: what a study is (presets), ``mechanisms.py``: what is compared
* ``network.py``, ``calibration.py``: models of equal size; ``gates.py``: what must hold first
* ``bench.py``, ``memory.py``, ``scaling.py``, ``profiling.py``: time and memory
* ``corpus.py``, ``objectives.py``, ``training.py``: perplexity and tasks, by the one Trainer
* ``results.py``, ``manifest.py``: what is on disk; ``runner.py``: what is measured in which order
* ``fits.py``, ``claims.py``, ``figures.py``, ``tables.py``, ``report.py``: what the rows say
* ``comparing.py``, ``checking.py``: two studies; whether one is whole
* ``trainer.py``: the playbook's method names; ``harness.py``: lm-evaluation-harness

No torch at import.
"""
