"""MLflow: where it lives, and publishing records to it."""
