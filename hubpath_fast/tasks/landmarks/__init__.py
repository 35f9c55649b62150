"""Landmarks: points of a face, or of anything, found as the maxima of maps (section 4.2)."""
