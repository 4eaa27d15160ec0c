"""Data sets and how they become batches. Only here are grain and tensorflow_datasets imported
(tensorflow itself never is)."""
