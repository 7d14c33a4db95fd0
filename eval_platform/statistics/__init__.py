"""How sure are we? Standard errors and intervals."""
