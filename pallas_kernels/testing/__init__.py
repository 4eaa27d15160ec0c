"""What tests of the operators share."""
