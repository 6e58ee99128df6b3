"""Model cards: the facts of a checkpoint (`model_cards/*.yaml`) put into one template (`model_cards/template.md`)."""

import json
import re
from importlib.resources import files
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml

from san_hf.messages import escape_markdown


CARDS = files("san_hf.model_cards")

DEFAULTS = {
    "summary": "Open-vocabulary semantic segmentation: a side adapter network on a frozen CLIP.",
    "sample_image": "photo.jpg",
    "sample_classes": ["cat", "grass", "sky"],
    "has_code": True,
    "results": [],
    "definitions": {
        "mIoU": (
            "intersection over union, averaged over the classes that occur in the ground truth, as the release's logs "
            "have it."
        ),
        "mIoU (paper)": (
            "the same sum divided by the number of classes that occur in the ground truth or the predictions, so that "
            "a class that is only predicted counts as 0, as the paper's table has it. Where many classes are "
            "absent from a data set the two differ a lot."
        ),
        "fwIoU": "intersection over union, weighted by the classes' frequency in the ground truth.",
        "mACC": "pixel accuracy of each class, averaged over the classes that occur in the ground truth.",
        "pACC": "share of the labelled pixels that got their label.",
    },
}
# Facts a template may do without.
OPTIONAL = (
    *("license", "notice", "training", "data", "contents", "limits"),
    *("base_model", "base_model_relation", "results_note"),
)
# What a row of results says of its data set beside its name: for the Hub, not for the table.
SOURCE_KEYS = ("dataset_id", "config", "revision", "date")
# Results that the Hub takes, each as a file of its own: by metric, what is added to the file's name, and what to note.
HUB_METRICS = {"mIoU": ("", None), "mIoU (paper)": ("_paper", True)}


def load_facts(name: str) -> dict[str, Any]:
    """The facts of a checkpoint we know by name, see `model_cards/<name>.yaml`.

    Raises:
        KeyError: no such checkpoint.
    """
    path = CARDS / f"{name}.yaml"
    if not path.is_file():
        known = sorted(entry.name.removesuffix(".yaml") for entry in CARDS.iterdir() if entry.name.endswith(".yaml"))
        raise KeyError(f"There are no facts about {name!r}, only about {', '.join(known)}.")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def render_card(
    facts: dict[str, Any],
    model_id: str,
    *,
    provenance: str | None = None,
    facts_are_of_these_weights: bool = True,
) -> ModelCard:
    """The card of a checkpoint, with the metadata that the Hub reads.

    Args:
        facts: `title`, and optionally `license` (as the Hub names it, "cc-by-4.0"; without it the card says that none
            was named), `summary`, `notice` (a plain statement set off at the top), `base_model` and
            `base_model_relation` ("adapter" or "finetune"), `datasets` (both as the Hub names them), `tags`,
            `training`, `data`, `contents` (what is in the folder), `limits` (Markdown), `results` (rows: `dataset`,
            `images` and values by metric, in percent; and of data sets on the Hub `dataset_id`, `config`, `revision`,
            `date`, see [`result_files`]), `results_note` (what they are), `definitions` (meaning of each metric),
            `sample_image`, `sample_classes` (for the example), `has_code` (whether the model's code is saved beside
            the weights; if not, the example loads them with this package).
        model_id: what `from_pretrained` takes: the repository's name on the Hub, or a folder.
        provenance: Markdown, where the weights come from.
        facts_are_of_these_weights: whether training and results are of these very weights. If not, the card says so
            at its top, and its metadata leaves the results out.

    Raises:
        ValueError: facts of other names.
    """
    accepted = {"title", "datasets", "tags", *DEFAULTS, *OPTIONAL}
    if unknown := sorted(set(facts) - accepted):
        known = ", ".join(sorted(accepted))
        raise ValueError(f"Unknown facts for a model card: {', '.join(unknown)}; known are {known}.")
    facts = dict.fromkeys(OPTIONAL) | DEFAULTS | facts
    results = facts["results"] = [
        {key: value for key, value in row.items() if key not in SOURCE_KEYS} for row in facts["results"]
    ]
    facts["results_columns"] = list(dict.fromkeys(column for row in results for column in row))
    if not facts["results_note"]:
        facts["results_note"] = "As published by the authors, in percent; single scale, shortest edge 640 pixels."
    if not facts_are_of_these_weights:
        facts["notice"] = (
            f"The sizes are those of {facts['title']}, and training and results below are that model's. Whether the "
            "weights here are the same was not checked."
        )
        facts["license"] = None
    indexed = results if facts_are_of_these_weights else []
    data = ModelCardData(
        language="en",
        license=facts["license"],
        library_name="transformers",
        pipeline_tag="image-segmentation",
        base_model=facts["base_model"],
        base_model_relation=facts["base_model_relation"],
        datasets=facts.get("datasets"),
        tags=["san", "clip", "semantic-segmentation", "open-vocabulary", *facts.get("tags", [])],
        model_name=facts["title"] if indexed else None,
        eval_results=[
            EvalResult(
                task_type="image-segmentation",
                dataset_type=slug,
                dataset_name=row["dataset"],
                metric_type="mean_iou",
                metric_name="mIoU",
                metric_value=row["mIoU"],
            )
            for slug, row in zip(_slugs([row["dataset"] for row in indexed]), indexed)
            if "mIoU" in row
        ]
        or None,
    )
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"plain": lambda value: escape_markdown(str(value)), "quoted": _quoted}
    template = environment.from_string((CARDS / "template.md").read_text(encoding="utf-8"))
    body = template.render(**facts, model_id=model_id, provenance=provenance)
    return ModelCard(f"---\n{data}\n---\n\n{body}")


def result_files(facts: dict[str, Any]) -> dict[str, str]:
    """
    Results as files for the Hub (`.eval_results/*.yaml`), which shows them on the model's page and the data set's.
    Each names a data set on the Hub, so that there is none for the results on any other. Of several results on one data
    set each has a file of its own, all but the first with a note that says what it is
    (https://huggingface.co/docs/hub/eval-results).

    Args:
        facts: as [`render_card`] takes them.

    Returns:
        Text by the file's name.
    """
    definitions = DEFAULTS["definitions"] | facts.get("definitions", {})
    rows = [row for row in facts.get("results", []) if row.get("dataset_id")]
    found = {}
    for slug, row in zip(_slugs([row["dataset"] for row in rows]), rows):
        for metric, (ending, noted) in HUB_METRICS.items():
            if row.get(metric) is None:
                continue
            entry = EvalResultEntry(
                dataset_id=row["dataset_id"],
                task_id=row.get("config") or "default",
                value=row[metric],
                dataset_revision=row.get("revision"),
                date=row.get("date"),
                notes=f"{metric}: {definitions[metric]}" if noted else None,
            )
            text = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False, allow_unicode=True)
            found[f"{slug}{ending}.yaml"] = text
    return found


def _slugs(names: list[str]) -> list[str]:
    """Names for the Hub, in any script and each once: it takes results of equal ones for those of one data set."""
    slugs: list[str] = []
    for name in names:
        tidy = re.sub(r"[\W_]+", "-", name.lower()).strip("-") or "dataset"
        slug, number = tidy, 1
        while slug in slugs:
            number += 1
            slug = f"{tidy}-{number}"
        slugs.append(slug)
    return slugs


def _quoted(value: str | list[str]) -> str:
    """A text, or a list of texts, as Python has it."""
    return json.dumps(value, ensure_ascii=False)
