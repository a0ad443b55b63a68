"""What is known of a model, and how one is loaded."""
