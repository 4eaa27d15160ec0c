"""Model families: how each writes config.json and names its tensors."""
