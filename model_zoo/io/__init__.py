"""Model files: sharded tensors, checkpoints, exports, published layouts, the model hub."""
