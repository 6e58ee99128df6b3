"""Names of models, without importing anything that loads them."""

# Comes with the package, in `san_hf/checkpoints`.
EMBEDDED_MODEL = "picture-book"
# Said wherever it is used without another one being asked for.
EMBEDDED_NOTE = (
    "Model: picture-book, a tiny one that comes with the package to prove the pipeline. It knows simple drawn scenes "
    "and nothing else; for photographs use --model san-vit-b-16 or your own."
)
# What tells a folder of `san-hf export` from a model's.
EXPORT_FILE = "san_hf.json"
