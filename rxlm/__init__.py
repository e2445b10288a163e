"""rxlm: reactive conversational language models, models with a memory. No torch at import."""

__version__ = "0.1.0"
