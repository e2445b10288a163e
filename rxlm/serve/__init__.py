"""Serving conversations: a store of sessions, the engine that answers them, and how to reach it."""
