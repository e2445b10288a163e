"""Linear attention for other people's models: one tensor in, one tensor out, as in TPTT.

* :mod:`.layer`: ``LinearAttention``, also as ``rxlm.nn.LinearAttention``
* :mod:`.operator_modes`: the named recurrences and what they are made of
* :mod:`.mixing`: softmax and linear attention side by side (LiZA, memory as gate)
* :mod:`.hugging_face`: the same inside models of transformers
* :mod:`.scaler`: normalised inputs

The formulas are in docs/drop_in_linear_attention.md. Not here: the layer of the Reactive
Transformer (:mod:`rxlm.nn.linear_attention`).
"""
