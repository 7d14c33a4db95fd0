"""One partition per arrival key: `<root name>/<path of the checkpoint>`."""

import dagster as dg

checkpoints = dg.DynamicPartitionsDefinition(name="checkpoints")
