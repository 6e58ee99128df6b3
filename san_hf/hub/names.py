"""Names of models, without importing anything that loads them."""

# Comes with the package, in `san_hf/checkpoints`.
EMBEDDED_MODEL = "picture-book"
