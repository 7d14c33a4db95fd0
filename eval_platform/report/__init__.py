"""How does it look? Tables and plots."""
