"""Megatron torch_dist checkpoints <-> Hugging Face `nemotron_h` folders; see ../conversion.md."""
