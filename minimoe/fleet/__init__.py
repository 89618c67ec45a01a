"""Collections of models: a store of descriptors, filled by many processes, searched for relatives, drawn as a forest."""
