"""What is done with a shelf of cached features: ranking, routing, pruning. See ``features``."""
