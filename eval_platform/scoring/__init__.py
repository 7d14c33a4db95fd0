"""Was it right? Extraction, exact match, F1, choices."""
