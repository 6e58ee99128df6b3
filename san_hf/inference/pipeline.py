"""The pipeline where the package is installed: class names in the forms that the package takes."""

import os
from collections.abc import Mapping
from typing import Any

from san_hf.modeling import pipeline_san
from san_hf.vocabularies import EXPANSIONS
from san_hf.vocabularies.files import is_vocabulary_file


class OpenVocabularySegmentationPipeline(pipeline_san.OpenVocabularySegmentationPipeline):
    """
    The pipeline that a checkpoint declares, whose `candidate_labels` and `expansion` may also be a benchmark's name, a
    file, or names by label, see [`san_hf.data.class_names.read_class_names`]; and `expansion` one of `EXPANSIONS`.
    """

    def _read_class_names(self, source: Any, what: str) -> list[str]:
        # Imported now: they may be what Transformers is being imported for, and it brings this module.
        from san_hf.data.class_names import is_class_list, read_class_names
        from san_hf.inference.vocabulary import Vocabulary, read_expansion

        if isinstance(source, Vocabulary) or is_vocabulary_file(source):
            raise ValueError(
                f"Got a vocabulary as {what}. It has embeddings, synonyms and colours beside its class names: "
                "san_hf.Segmenter and san_hf.Predictor take it; this pipeline takes names."
            )
        if what == "expansion" and isinstance(source, str) and source in EXPANSIONS:
            return read_expansion(source)
        if isinstance(source, os.PathLike | Mapping) or (isinstance(source, str) and is_class_list(source)):
            return read_class_names(source)
        return super()._read_class_names(source, what)
