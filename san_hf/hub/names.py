"""Names of models, without importing anything that loads them."""

# Comes with the package, in `san_hf/checkpoints`.
EMBEDDED_MODEL = "picture-book"
# What tells a folder of `san-hf export` from a model's.
EXPORT_FILE = "san_hf.json"
