"""What do we know? The DuckDB catalog and SQL over it, rebuilt from the store at any time."""
