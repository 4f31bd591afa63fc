"""What a run reads: text to tokens, and tokens to batches."""
