"""Everything that is measured of a model beside its teacher, but for quality on a run's own held-out sequences."""

import os
from collections.abc import Callable

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import Recipe
from ..data.packed import PackedDataset
from ..run.records import Measures, TaskScore, TextQuality
from .answers import exact_match, read_questions
from .cost import measure_cost
from .held_out import HeldOut
from .recall import TASKS, measure_recall
from .tasks import measure_tasks

Texts = dict[tuple[str, int], PackedDataset]  # by source ("": all of them) and length


def held_out_texts(recipe: Recipe, whole: PackedDataset, of_source: Callable[[str], PackedDataset]) -> Texts:
    """Held-out text by source, where there are several, and by further lengths.

    Args:
        whole: all of it.
        of_source: reads one source alone.

    Raises:
        DataError: there is less text than one sequence of such a length.
    """
    data, texts = recipe.data, {}
    for source in data.heldout if len(data.heldout) > 1 else []:
        name = os.path.basename(source.rstrip("/")) or source
        texts[source if (name, data.length) in texts else name, data.length] = of_source(source)
    for length in recipe.evaluate.lengths:
        texts["", length] = PackedDataset(whole.corpus, length)
    return texts


def check_measures(recipe: Recipe, whole: PackedDataset, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises RunError for a length too short for recall, and DataError for questions that are none.

    Lengths that are longer than all the text are left out later.
    """
    if recipe.evaluate.questions:
        read_questions(recipe.evaluate.questions)
    for task in recipe.evaluate.recall:
        for length in recipe.evaluate.recall_lengths:
            if length <= len(whole.corpus.tokens):
                TASKS[task](tokenizer, whole.corpus.tokens, length, 1, 0)


class Measuring:
    """The same measures of any model, called with it.

    Args:
        whole: the held-out text, which texts for recall are cut from.
        texts: of `held_out_texts`.
        teacher: that predictions are compared with; None: with none.
        longest: tokens that the models take; None: not known.
        say: takes a line about what is left out.
    """

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: PreTrainedTokenizerBase,
        whole: PackedDataset,
        texts: Texts,
        teacher: PreTrainedModel | None,
        longest: int | None,
        say: Callable[[str], None],
    ):
        self.settings, self.tokenizer, self.haystack = recipe.evaluate, tokenizer, whole.corpus.tokens
        self.costs_at = [length for length in recipe.evaluate.cost_lengths if length < (longest or length + 1)]
        self.questions = read_questions(self.settings.questions) if self.settings.questions else []
        asked, most = recipe.evaluate.recall_lengths, min(longest or len(self.haystack), len(self.haystack))
        self.recall_lengths = [length for length in asked if length <= most]
        if recipe.evaluate.recall and (left_out := sorted(set(asked) - set(self.recall_lengths))):
            who = "the held-out text has" if most == len(self.haystack) else "the model takes"
            say(f"recall at {', '.join(map(str, left_out))} tokens is left out: {who} {most:,}")
        tokens = recipe.evaluate.sequences * recipe.data.length  # of each text, whatever the length of its sequences
        self.texts = {
            key: HeldOut(dataset, max(1, tokens // key[1]), tokenizer, teacher) for key, dataset in texts.items()
        }

    def __call__(self, model: PreTrainedModel) -> Measures:
        settings, recall_lengths = self.settings, self.recall_lengths
        return Measures(
            texts=[TextQuality(*key, held_out.measure(model)) for key, held_out in self.texts.items()],
            recall=measure_recall(
                model, self.tokenizer, self.haystack, settings.recall, recall_lengths, settings.recall_items
            ),
            tasks=self._tasks(model),
            questions=exact_match(model, self.tokenizer, self.questions),
            costs=[measure_cost(model, length) for length in self.costs_at],
        )

    def _tasks(self, model: PreTrainedModel) -> list[TaskScore]:
        settings = self.settings
        if not settings.tasks:
            return []
        return measure_tasks(model, self.tokenizer, settings.tasks, settings.tasks_folder, settings.tasks_limit)
