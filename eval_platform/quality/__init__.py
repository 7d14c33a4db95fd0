"""May we publish it? Checks and decisions."""
