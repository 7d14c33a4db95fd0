"""What do we ask? Task files, documents, prompts, requests."""
