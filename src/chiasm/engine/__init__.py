"""The built-in engine: scheduler, block manager, encoder cache manager, model runner, sampler."""
