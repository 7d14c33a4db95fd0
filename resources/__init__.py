"""What assets and sensors work with: the store, the evaluator, the warehouse. Thin: the library does the work."""
