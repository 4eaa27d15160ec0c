"""Training runs whose commands, configurations and logs are recorded here."""
