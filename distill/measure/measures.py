"""Everything that is measured of a model beside its teacher, but for quality on a run's own held-out sequences."""

from collections.abc import Callable

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.packed import PackedDataset
from ..run.records import Measures, TextQuality
from ..settings import EvaluateConfig
from .held_out import HeldOut
from .recall import measure_recall


class Measuring:
    """The same measures of any model.

    Args:
        texts: by source ("" for all of them together) and length, held-out sequences.
        haystack: tokens (T,) that texts for recall are cut from.
        say: takes a line about what is left out.
    """

    def __init__(
        self,
        settings: EvaluateConfig,
        tokenizer: PreTrainedTokenizerBase,
        texts: dict[tuple[str, int], PackedDataset],
        haystack: Tensor,
        tokens: int,
        teacher: PreTrainedModel | None = None,
        say: Callable[[str], None] = print,
    ):
        self.settings, self.tokenizer, self.haystack = settings, tokenizer, haystack
        longest = None if teacher is None else getattr(teacher.config, "max_position_embeddings", None)
        self.recall_lengths = [length for length in settings.recall_lengths if length <= (longest or length)]
        if left_out := sorted(set(settings.recall_lengths) - set(self.recall_lengths)):
            say(f"recall at {', '.join(map(str, left_out))} tokens is left out: the teacher takes {longest:,}")
        self.texts = {
            key: HeldOut(dataset, max(1, tokens // key[1]), tokenizer, teacher) for key, dataset in texts.items()
        }

    def __call__(self, model: PreTrainedModel) -> Measures:
        settings = self.settings
        return Measures(
            texts=[TextQuality(*key, held_out.measure(model)) for key, held_out in self.texts.items()],
            recall=measure_recall(
                model, self.tokenizer, self.haystack, settings.recall, self.recall_lengths, settings.recall_items
            ),
        )
