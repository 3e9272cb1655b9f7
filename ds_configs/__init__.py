"""DeepSpeed configurations by name (`engine.config=zero2`). Each "auto" is filled from the recipe."""
