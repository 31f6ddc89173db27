"""What chiasm needs of a checkpoint: processor, vision encoder, language model, each loaded apart."""
