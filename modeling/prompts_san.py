"""Prompt templates that class names are put into before CLIP's text encoder sees them."""

from collections.abc import Sequence


# A class name takes the place of {}. "vild" is what SAN is trained and evaluated with; "imagenet" are the templates
# of CLIP's zero-shot ImageNet classification.
PROMPT_TEMPLATES: dict[str, tuple[str, ...]] = {
    "vild": (
        "a photo of a {}.",
        "This is a photo of a {}",
        "There is a {} in the scene",
        "There is the {} in the scene",
        "a photo of a {} in the scene",
        "a photo of a small {}.",
        "a photo of a medium {}.",
        "a photo of a large {}.",
        "This is a photo of a small {}.",
        "This is a photo of a medium {}.",
        "This is a photo of a large {}.",
        "There is a small {} in the scene.",
        "There is a medium {} in the scene.",
        "There is a large {} in the scene.",
    ),
    "imagenet": (
        "a bad photo of a {}.",
        "a photo of many {}.",
        "a sculpture of a {}.",
        "a photo of the hard to see {}.",
        "a low resolution photo of the {}.",
        "a rendering of a {}.",
        "graffiti of a {}.",
        "a bad photo of the {}.",
        "a cropped photo of the {}.",
        "a tattoo of a {}.",
        "the embroidered {}.",
        "a photo of a hard to see {}.",
        "a bright photo of a {}.",
        "a photo of a clean {}.",
        "a photo of a dirty {}.",
        "a dark photo of the {}.",
        "a drawing of a {}.",
        "a photo of my {}.",
        "the plastic {}.",
        "a photo of the cool {}.",
        "a close-up photo of a {}.",
        "a black and white photo of the {}.",
        "a painting of the {}.",
        "a painting of a {}.",
        "a pixelated photo of the {}.",
        "a sculpture of the {}.",
        "a bright photo of the {}.",
        "a cropped photo of a {}.",
        "a plastic {}.",
        "a photo of the dirty {}.",
        "a jpeg corrupted photo of a {}.",
        "a blurry photo of the {}.",
        "a photo of the {}.",
        "a good photo of the {}.",
        "a rendering of the {}.",
        "a {} in a video game.",
        "a photo of one {}.",
        "a doodle of a {}.",
        "a close-up photo of the {}.",
        "a photo of a {}.",
        "the origami {}.",
        "the {} in a video game.",
        "a sketch of a {}.",
        "a doodle of the {}.",
        "a origami {}.",
        "a low resolution photo of a {}.",
        "the toy {}.",
        "a rendition of the {}.",
        "a photo of the clean {}.",
        "a photo of a large {}.",
        "a rendition of a {}.",
        "a photo of a nice {}.",
        "a photo of a weird {}.",
        "a blurry photo of a {}.",
        "a cartoon {}.",
        "art of a {}.",
        "a sketch of the {}.",
        "a embroidered {}.",
        "a pixelated photo of a {}.",
        "itap of the {}.",
        "a jpeg corrupted photo of the {}.",
        "a good photo of a {}.",
        "a plushie {}.",
        "a photo of the nice {}.",
        "a photo of the small {}.",
        "a photo of the weird {}.",
        "the cartoon {}.",
        "art of the {}.",
        "a drawing of the {}.",
        "a photo of the large {}.",
        "a black and white photo of a {}.",
        "the plushie {}.",
        "a dark photo of a {}.",
        "itap of a {}.",
        "graffiti of the {}.",
        "a toy {}.",
        "itap of my {}.",
        "a photo of a cool {}.",
        "a photo of a small {}.",
        "a tattoo of the {}.",
    ),
}


def split_templates(templates: str | Sequence[str]) -> list[tuple[str, str]]:
    """
    Prompt templates cut at the place of the class name.

    Args:
        templates: a name in `PROMPT_TEMPLATES`, or templates, each with one `{}` for the class name.

    Returns:
        For each template the text before and the text after the class name.

    Raises:
        ValueError: an unknown name, no templates or no list of them, or a template without exactly one `{}`.
    """
    if isinstance(templates, str):
        if templates not in PROMPT_TEMPLATES:
            raise ValueError(
                f"Got prompt_templates={templates!r}, expected one of {list(PROMPT_TEMPLATES)} or a list of templates."
            )
        templates = PROMPT_TEMPLATES[templates]
    if not isinstance(templates, Sequence):
        raise ValueError(
            f"Got {templates!r:.80} as prompt_templates, expected a list of them, or one of {list(PROMPT_TEMPLATES)}."
        )
    pairs = []
    for template in templates:
        if not isinstance(template, str) or template.count("{}") != 1:
            raise ValueError(f"Got the prompt template {template!r}, expected a string with one {{}} for the name.")
        before, _, after = template.partition("{}")
        pairs.append((before, after))
    if not pairs:
        raise ValueError("Got no prompt templates, expected at least one, such as 'a photo of a {}.'.")
    return pairs
