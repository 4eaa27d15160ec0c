"""Several processes of one run: how they find one another, and how they agree."""
