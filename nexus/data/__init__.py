"""Data sets: what they hold, how they split, in which order training sees them."""
