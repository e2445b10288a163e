"""Files of models: whole or absent, strict, without pickle. Knows nothing of any architecture."""
