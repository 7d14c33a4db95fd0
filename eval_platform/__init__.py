"""eval-platform: evaluates every checkpoint as it arrives, and publishes only numbers that can be believed."""

__version__ = "0.1.0"
