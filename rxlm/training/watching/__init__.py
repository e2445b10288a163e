"""What a run measures of itself beside its loss; nothing here changes what is trained.

The settings and the values are in :mod:`rxlm.training.watch`.

* ``utilization.py``: operations of the model and peak of the device, hence MFU
* ``memory_use.py``: whether the memory is written, kept apart and read
* ``samples.py``: conversations that the model holds at a validation, and ``samples.jsonl``
* ``failures.py``: what a person is told when numbers go bad or memory runs out
"""
