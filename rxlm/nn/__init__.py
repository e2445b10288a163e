"""Modules over :mod:`rxlm.ops`: attention, feed-forward. Knows nothing of RxT or of memory."""
