"""How well a model remembers: recall over turns, perplexity with and without memory, reports.

Everything takes a loaded model and settings and returns plain data; nothing prints. Begin with
``recall`` and ``perplexity`` (what is measured), then ``report`` (what is made of it).
"""
