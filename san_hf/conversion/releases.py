"""The models that the authors of SAN released: where they are, and how they are built."""

from dataclasses import dataclass, field

from san_hf.modeling import SANConfig


HUB_REPO = "Mendel192/san"


@dataclass(frozen=True)
class Release:
    """One released checkpoint.

    name: our name for it, an alias wherever a model is asked for.
    filename: the file in `HUB_REPO`.
    patch_embedding: shape of CLIP's patch convolution, (width, channels, patch, patch), which tells them apart.
    config_kwargs: what differs from SANConfig's defaults.
    """

    name: str
    filename: str
    patch_embedding: tuple[int, int, int, int]
    config_kwargs: dict = field(default_factory=dict)

    def config(self) -> SANConfig:
        return SANConfig(**self.config_kwargs)


RELEASES = {
    release.name: release
    for release in (
        Release("san-vit-b-16", "san_vit_b_16.pth", (768, 3, 16, 16)),
        Release(
            "san-vit-large-14",
            "san_vit_large_14.pth",
            (1024, 3, 14, 14),
            {
                "clip_config": {
                    "projection_dim": 768,
                    "vision_config": {
                        "hidden_size": 1024,
                        "intermediate_size": 4096,
                        "num_hidden_layers": 24,
                        "num_attention_heads": 16,
                        "image_size": 336,
                        "patch_size": 14,
                        "projection_dim": 768,
                    },
                    "text_config": {
                        "hidden_size": 768,
                        "intermediate_size": 3072,
                        "num_attention_heads": 12,
                        "projection_dim": 768,
                    },
                },
                "fusion_layers": [[0, 0], [6, 1], [12, 2], [18, 3]],
                "recognition_layer": 18,
                "clip_image_scale": 0.7,
            },
        ),
    )
}
