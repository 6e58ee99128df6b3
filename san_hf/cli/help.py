"""How help is laid out: options in groups, and no type beside what is a switch."""

from typing import Any

from typer.core import TyperCommand, TyperGroup


# A command with more parameters than these lists options of these names together, after those that are asked for most.
MANY = 15
GROUPS = {
    "Words": "expand threshold other synonyms average_synonyms templates colors save_vocabulary",
    "Large images and maps": "tile overlap bands value_range",
    "Labels and files of the set": "image_column label_column ignore_index label_shift label_palette "
    "streaming skip_broken",
    "Running": "overwrite resume allow_urls shard batch_size workers save_every device dtype runtime",
}
_GROUP_OF = {name: group for group, names in GROUPS.items() for name in names.split()}


def arrange(parameters: list[Any]) -> list[Any]:
    """Puts the parameters of a command with many into their groups; those of no group stay among its first options."""
    for parameter in parameters:
        if getattr(parameter, "is_flag", False):
            parameter.metavar = ""
        if len(parameters) > MANY and parameter.name in _GROUP_OF:
            parameter.rich_help_panel = _GROUP_OF[parameter.name]
    return parameters


class Command(TyperCommand):
    """A command whose help is in groups."""

    def get_params(self, ctx: Any) -> list[Any]:
        return arrange(super().get_params(ctx))


class Group(TyperGroup):
    """The commands together, likewise."""

    def get_params(self, ctx: Any) -> list[Any]:
        return arrange(super().get_params(ctx))
