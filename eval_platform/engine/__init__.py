"""What does it answer? Score and generate."""
