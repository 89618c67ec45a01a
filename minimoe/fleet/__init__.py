"""Collections of models: a store of descriptors, filled by many processes, searched for relatives, a forest of them."""
