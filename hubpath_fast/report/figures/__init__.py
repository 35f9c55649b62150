"""The figures of a report; each takes plain arrays and returns a matplotlib Figure."""
