"""What starts things: new checkpoints, repairs and mirroring, alerts."""
