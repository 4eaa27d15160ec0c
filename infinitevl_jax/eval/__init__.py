"""Evaluation against labelled data and a blind baseline."""
