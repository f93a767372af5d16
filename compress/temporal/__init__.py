"""Time features as tables."""
