"""What a run is: its settings, where they come from, and what is measured of it."""
