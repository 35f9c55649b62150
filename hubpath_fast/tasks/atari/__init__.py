"""Atari: Hub-Pathway over policies, with Data-Efficient Rainbow agents (section 4.3)."""
