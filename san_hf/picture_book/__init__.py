"""The generated picture-book scenes and how the embedded checkpoint learns from them."""
