"""Feature caching as step programs."""
