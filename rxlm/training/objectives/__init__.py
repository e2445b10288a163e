"""The training stages, one objective each."""
