"""Several processes: launch, process groups, FSDP."""
