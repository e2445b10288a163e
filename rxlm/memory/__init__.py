"""Short-term memory: slots as a value, and the network that rewrites them after each turn."""
