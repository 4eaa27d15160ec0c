"""Data sets and training batches. Only this folder imports grain and tensorflow_datasets;
tensorflow itself is never imported."""
