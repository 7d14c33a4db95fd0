"""Which model is it? Find, complete?, identify, bring to local disk."""
