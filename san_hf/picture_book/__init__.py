"""The picture book: generated scenes with exact label maps, and the training of the embedded checkpoint on them."""
