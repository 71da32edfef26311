"""A method whose transformer attends over a KV cache and is steered by keys."""
