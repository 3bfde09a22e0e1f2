"""The command line `lora-lightning`."""
