"""Ground floor: pure tensor functions. No modules, no state, no knowledge of models."""
