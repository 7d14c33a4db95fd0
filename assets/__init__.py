"""What Dagster materializes. Every asset is a few lines that call the library."""
