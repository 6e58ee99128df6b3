"""The benchmarks SAN is trained and measured on: what `san-hf prepare` makes of each.

Sizes are those of their owners' releases; licences as their owners state them, where they do.
"""

from dataclasses import dataclass

from san_hf.vocabularies import load_vocabulary


_FLICKR = "The photographs come from Flickr and stay under their photographers' terms."


@dataclass(frozen=True)
class Benchmark:
    """
    A benchmark in its prepared form.

    Attributes:
        name: what `san-hf prepare` calls it; also the name of its class list in `san_hf.vocabularies`.
        title: what people call it.
        splits: number of images of each split.
        ignore_index: value of pixels without a label; 65535 in sets with 16-bit labels.
        source: the owner's page.
        license: as the Hub calls it, "other" where it has no name for it.
        terms: the licence in a sentence.
        original_names: the original implementation's name of each split, where it has one.
    """

    name: str
    title: str
    splits: dict[str, int]
    ignore_index: int
    source: str
    license: str
    terms: str
    original_names: dict[str, str]

    @property
    def class_names(self) -> list[str]:
        """Label i is the i-th."""
        return load_vocabulary(self.name)


BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            name="coco-stuff",
            title="COCO-Stuff 164k",
            splits={"train": 118_287, "validation": 5_000},
            ignore_index=255,
            source="https://github.com/nightrome/cocostuff",
            license="cc-by-4.0",
            terms=f"Annotations: CC BY 4.0. {_FLICKR}",
            original_names={
                "train": "coco_2017_train_stuff_sem_seg",
                "validation": "coco_2017_test_stuff_sem_seg",
            },
        ),
        Benchmark(
            name="voc",
            title="Pascal VOC 2012",
            splits={"train": 10_582, "validation": 1_449},
            ignore_index=255,
            source="http://host.robots.ox.ac.uk/pascal/VOC/voc2012/",
            license="other",
            terms=f"No licence of its own. {_FLICKR}",
            original_names={"validation": "voc_sem_seg_val"},
        ),
        Benchmark(
            name="pascal-context-59",
            title="Pascal Context-59",
            splits={"train": 4_998, "validation": 5_105},
            ignore_index=255,
            source="https://cs.stanford.edu/~roozbeh/pascal-context/",
            license="other",
            terms=f"No licence of its own. {_FLICKR}",
            original_names={"validation": "pcontext_sem_seg_val"},
        ),
        Benchmark(
            name="pascal-context-459",
            title="Pascal Context-459",
            splits={"train": 4_998, "validation": 5_105},
            ignore_index=65535,
            source="https://cs.stanford.edu/~roozbeh/pascal-context/",
            license="other",
            terms=f"No licence of its own. {_FLICKR}",
            original_names={"validation": "pcontext_full_sem_seg_val"},
        ),
        Benchmark(
            name="ade20k-150",
            title="ADE20K-150",
            splits={"train": 20_210, "validation": 2_000},
            ignore_index=255,
            source="http://sceneparsing.csail.mit.edu/",
            license="other",
            terms="See the owner's page: the photographs are for research and education, not for commerce.",
            original_names={"validation": "ade20k_sem_seg_val"},
        ),
        Benchmark(
            name="ade20k-847",
            title="ADE20K-847",
            splits={"train": 25_574, "validation": 2_000},
            ignore_index=65535,
            source="https://groups.csail.mit.edu/vision/datasets/ADE20K/",
            license="other",
            terms="See the owner's page, which asks for registration: for research and education, not for commerce.",
            original_names={"validation": "ade20k_full_sem_seg_val"},
        ),
    )
}
