"""The suite: six tests of a memory, with the controls that make a number mean something.

``contestant`` says what can be tested; ``facts`` (T1), ``babi`` (T2), ``dialogues`` (T3), ``cost``
(T4), ``rewards`` (T5) and ``slots`` (T6) test it; ``runner`` puts them together, ``tables``,
``figures`` and ``page`` show what came of it. Nothing prints.
"""
