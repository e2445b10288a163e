"""The Reactive Transformer: configuration, components, models, conversation. No torch at import."""
