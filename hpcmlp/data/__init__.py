"""Samples: where they come from, how they are cleaned, how they lie on disk."""
