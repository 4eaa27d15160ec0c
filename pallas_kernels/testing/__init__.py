"""Shared parts of the operators' tests."""
